package install

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
)

const (
	// TaintKey keeps pods from nodes without a ready agent.
	TaintKey = "castellan.dev/agent-not-ready"
	// Driver is the CSI driver's name.
	Driver = "csi.castellan.dev"

	labelTLSMode = "security.istio.io/tlsMode"
)

// Uninstall takes everything out again that Install put in: first the webhooks, so
// that no step leaves a cluster that cannot start pods; then the server, so that it
// taints no node again; then the rest. What holds state stays, and so do the CRDs
// with everybody's policies, unless purge.
func (in *Installer) Uninstall(ctx context.Context, purge bool) error {
	objects, err := in.installed(ctx)
	if err != nil {
		return err
	}
	in.warnOfPods(ctx)
	if err := in.removeStage(ctx, objects, stageWebhooks); err != nil {
		return err
	}
	if err := in.removeStage(ctx, objects, stageServer); err != nil {
		return err
	}
	if err := in.untaint(ctx); err != nil {
		return err
	}
	if err := in.removeStage(ctx, objects, stageAgent); err != nil {
		return err
	}
	for _, r := range objects {
		if kinds[r.Kind].stage != stageGround {
			continue
		}
		o, err := in.get(ctx, r)
		if err != nil {
			return err
		}
		switch {
		case o == nil:
		case kept(o) && !purge:
			in.progress("keeping %s", r)
		default:
			if err := in.remove(ctx, r); err != nil {
				return err
			}
		}
	}
	if purge {
		if err := in.purge(ctx); err != nil {
			return err
		}
	}
	return in.remove(ctx, inventoryRef(in.cfg.Namespace))
}

// installed is the list of what is there: the inventory's, or where that was lost,
// what this version would install.
func (in *Installer) installed(ctx context.Context) ([]ref, error) {
	server := ref{Kind: "Deployment", Namespace: in.cfg.Namespace, Name: "castellan-server"}
	live, err := in.get(ctx, server)
	if err != nil {
		return nil, err
	}
	if live != nil {
		if by := live.GetLabels()[labelManagedBy]; by != "" && by != manager {
			return nil, &ConflictError{Object: server.String(), Manager: by}
		}
	}
	inv, err := in.readInventory(ctx)
	if err != nil {
		return nil, err
	}
	if inv != nil {
		return inv.Objects, nil
	}
	r, err := Render(Options{Namespace: in.cfg.Namespace})
	if err != nil {
		return nil, err
	}
	var list []ref
	for _, o := range r.Objects {
		live, err := in.get(ctx, refOf(o))
		if err != nil {
			return nil, err
		}
		if live != nil && live.GetLabels()[labelManagedBy] == manager {
			list = append(list, refOf(o))
		}
	}
	if len(list) == 0 {
		in.progress("nothing of Castellan is in namespace %s", in.cfg.Namespace)
	}
	return list, nil
}

// removeStage removes what was applied in a stage, and waits until its pods are gone.
func (in *Installer) removeStage(ctx context.Context, objects []ref, s stage) error {
	for _, r := range objects {
		if kinds[r.Kind].stage != s {
			continue
		}
		in.progress("removing %s", r)
		if err := in.remove(ctx, r); err != nil {
			return err
		}
		if s != stageServer && s != stageAgent {
			continue
		}
		if err := in.gone(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

func (in *Installer) gone(ctx context.Context, r ref) error {
	return in.until(ctx, r.Name+" to end", func(ctx context.Context) (bool, string, error) {
		pods, err := in.cfg.Kubernetes.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + r.Name})
		if err != nil {
			return false, "", err
		}
		return len(pods.Items) == 0, fmt.Sprintf("%d pods left", len(pods.Items)), nil
	})
}

// warnOfPods tells of pods that hold an identity: without an agent on their node
// they get no new certificate, and the kubelet cannot take their volume down.
func (in *Installer) warnOfPods(ctx context.Context) {
	pods, err := in.pods(ctx)
	if err != nil {
		in.progress("warning: could not look for pods that use Castellan: %v", err)
		return
	}
	perNamespace := map[string]int{}
	total := 0
	for i := range pods {
		if usesVolume(&pods[i]) {
			perNamespace[pods[i].Namespace]++
			total++
		}
	}
	if total == 0 {
		return
	}
	var list []string
	for _, ns := range slices.Sorted(maps.Keys(perNamespace)) {
		list = append(list, fmt.Sprintf("%s (%d)", ns, perNamespace[ns]))
	}
	in.progress("warning: %d pods still have an identity of Castellan: %s", total, strings.Join(list, ", "))
	in.progress("warning: they keep their certificate until it expires, and stay Terminating when deleted, as no agent takes their volume down; restart them without injection first, or install again to end them")
}

// pageSize bounds what one answer of a list holds.
const pageSize = 500

// pods lists all pods of the cluster.
func (in *Installer) pods(ctx context.Context) ([]corev1.Pod, error) {
	var all []corev1.Pod
	opts := metav1.ListOptions{Limit: pageSize}
	for {
		page, err := in.cfg.Kubernetes.CoreV1().Pods(metav1.NamespaceAll).List(ctx, opts)
		if err != nil {
			return nil, fmt.Errorf("pods: %w", err)
		}
		all = append(all, page.Items...)
		if page.Continue == "" {
			return all, nil
		}
		opts.Continue = page.Continue
	}
}

func usesVolume(pod *corev1.Pod) bool {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return false
	}
	return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.CSI != nil && v.CSI.Driver == Driver })
}

// untaint gives the nodes back to everybody.
func (in *Installer) untaint(ctx context.Context) error {
	nodes, err := in.cfg.Kubernetes.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("nodes: %w", err)
	}
	for i := range nodes.Items {
		if !tainted(&nodes.Items[i]) {
			continue
		}
		name := nodes.Items[i].Name
		in.progress("removing the taint %s of node %s", TaintKey, name)
		err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
			node, err := in.cfg.Kubernetes.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == TaintKey })
			_, err = in.cfg.Kubernetes.CoreV1().Nodes().Update(ctx, node, metav1.UpdateOptions{FieldManager: manager})
			return err
		})
		if err != nil {
			return fmt.Errorf("node %s: remove the taint %s: %w", name, TaintKey, err)
		}
	}
	return nil
}

func tainted(node *corev1.Node) bool {
	return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == TaintKey })
}

// purge removes the CRDs that we installed, with all policies, and the namespace
// where it is ours, with the authority's keys and the ledger.
func (in *Installer) purge(ctx context.Context) error {
	r, err := Render(Options{Namespace: in.cfg.Namespace})
	if err != nil {
		return err
	}
	for _, crd := range r.CRDs {
		live, err := in.get(ctx, refOf(crd))
		if err != nil {
			return err
		}
		if live == nil || live.GetLabels()[labelManagedBy] != manager {
			continue
		}
		in.progress("removing %s with all its objects", crd.GetName())
		if err := in.remove(ctx, refOf(crd)); err != nil {
			return err
		}
	}
	namespace := ref{Kind: "Namespace", Name: in.cfg.Namespace}
	live, err := in.get(ctx, namespace)
	if err != nil || live == nil || live.GetLabels()[labelName] != release {
		return err
	}
	in.progress("removing namespace %s", in.cfg.Namespace)
	if err := in.remove(ctx, namespace); err != nil {
		return err
	}
	return in.until(ctx, "namespace "+in.cfg.Namespace+" to end", func(ctx context.Context) (bool, string, error) {
		live, err := in.get(ctx, namespace)
		return live == nil, "", err
	})
}
