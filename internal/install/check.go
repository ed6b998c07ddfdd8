package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// cluster is what the checks look at, read once.
type cluster struct {
	inventory *Inventory
	nodes     []corev1.Node
	pods      []corev1.Pod
	// namespaces are the labels of each.
	namespaces map[string]map[string]string
	// noNodes and noPods say why these are not known.
	noNodes, noPods error
}

// Check says whether what is installed is well, by what the API server knows. It
// changes nothing.
func (in *Installer) Check(ctx context.Context) []Result {
	var out results
	view, err := in.view(ctx)
	if err != nil {
		out.unknown("cluster", err)
		return out
	}
	if !in.checkInstallation(ctx, view, &out) {
		return out // nothing else is there to be looked at
	}
	for _, check := range []func(context.Context, *cluster, *results){
		in.checkServer, in.checkAgents, in.checkDriver, in.checkTaints,
		in.checkKeys, in.checkTrust, in.checkVersions, in.checkInjection, in.checkPolicies,
	} {
		if ctx.Err() != nil {
			out.fail("time", "give more with --timeout", "not everything was checked: %v", ctx.Err())
			return out
		}
		check(ctx, view, &out)
	}
	return out
}

func (in *Installer) view(ctx context.Context) (*cluster, error) {
	v := &cluster{namespaces: map[string]map[string]string{}}
	var err error
	if v.inventory, err = in.readInventory(ctx); err != nil {
		return nil, err
	}
	// Who may read only a part is told of that part.
	if nodes, err := in.cfg.Kubernetes.CoreV1().Nodes().List(ctx, metav1.ListOptions{}); err != nil {
		v.noNodes = fmt.Errorf("nodes: %w", err)
	} else {
		v.nodes = nodes.Items
	}
	if namespaces, err := in.cfg.Kubernetes.CoreV1().Namespaces().List(ctx, metav1.ListOptions{}); err != nil {
		v.noPods = fmt.Errorf("namespaces: %w", err)
	} else {
		for _, ns := range namespaces.Items {
			v.namespaces[ns.Name] = ns.Labels
		}
	}
	if v.pods, err = in.pods(ctx); err != nil {
		v.noPods = err
	}
	return v, nil
}

// of returns our own pods of a component.
func (v *cluster) of(namespace, app string) []*corev1.Pod {
	var out []*corev1.Pod
	for i := range v.pods {
		if p := &v.pods[i]; p.Namespace == namespace && p.Labels["app"] == app && p.DeletionTimestamp == nil {
			out = append(out, p)
		}
	}
	return out
}

// checkInstallation reports whether there is one.
func (in *Installer) checkInstallation(ctx context.Context, v *cluster, out *results) bool {
	const check = "installation"
	live, err := in.get(ctx, ref{Kind: "Deployment", Namespace: in.cfg.Namespace, Name: "castellan-server"})
	switch {
	case err != nil:
		out.unknown(check, err)
		return false
	case v.inventory == nil && live == nil:
		out.fail(check, "castellan install; or name its namespace", "Castellan is not in namespace %s", in.cfg.Namespace)
		return false
	case v.inventory == nil:
		out.ok(check, "by %s", orUnknown(live.GetLabels()[labelManagedBy]))
		return true
	}
	var missing []string
	for _, r := range v.inventory.Objects {
		o, err := in.get(ctx, r)
		if err != nil {
			out.unknown(check, err)
			return true
		}
		if o == nil {
			missing = append(missing, r.String())
		}
	}
	if len(missing) > 0 {
		out.fail(check, "castellan install makes them again (with the values of before: -f)", "missing: %s", some(missing))
		return true
	}
	out.ok(check, "%s, %s", v.inventory.AppVersion, count(len(v.inventory.Objects), "object"))
	return true
}

func orUnknown(s string) string {
	if s == "" {
		return "somebody"
	}
	return s
}

// ServerCheck is the name of the check whether the server is ready.
const ServerCheck = "server"

func (in *Installer) checkServer(ctx context.Context, _ *cluster, out *results) {
	in.checkRollout(ctx, ServerCheck, ref{Kind: "Deployment", Namespace: in.cfg.Namespace, Name: "castellan-server"}, out)
}

// checkRollout reports whether all pods are ready and of the latest version.
func (in *Installer) checkRollout(ctx context.Context, check string, r ref, out *results) {
	live, err := in.get(ctx, r)
	if err != nil {
		out.unknown(check, err)
		return
	}
	if live == nil {
		out.fail(check, "castellan install", "%s does not exist", r)
		return
	}
	done, state, err := rolledOut(live)
	switch {
	case err != nil:
		out.unknown(check, err)
	case !done:
		if why := in.whyNot(ctx, r); why != "" {
			state += ": " + why
		}
		out.fail(check, fmt.Sprintf("kubectl -n %s logs %s/%s", r.Namespace, strings.ToLower(r.Kind), r.Name), "%s", state)
	default:
		out.ok(check, "%s", state)
	}
}

// checkAgents: every node that should have a ready agent has one.
func (in *Installer) checkAgents(ctx context.Context, v *cluster, out *results) {
	r := ref{Kind: "DaemonSet", Namespace: in.cfg.Namespace, Name: "castellan-agent"}
	in.checkRollout(ctx, "agents", r, out)
	if err := errors.Join(v.noNodes, v.noPods); err != nil {
		out.unknown("agent on each node", err)
		return
	}
	ready := map[string]bool{}
	for _, pod := range v.of(in.cfg.Namespace, r.Name) {
		if podReady(pod) {
			ready[pod.Spec.NodeName] = true
		}
	}
	live, err := in.get(ctx, r)
	if err != nil || live == nil {
		return // said above
	}
	selector, _, _ := unstructured.NestedStringMap(live.Object, "spec", "template", "spec", "nodeSelector")
	for i := range v.nodes {
		node := &v.nodes[i]
		if !onLinux(node) || ready[node.Name] || !matches(node.Labels, selector) {
			continue
		}
		out.fail("agent on "+node.Name, fmt.Sprintf("kubectl -n %s get pods -o wide --field-selector spec.nodeName=%s", in.cfg.Namespace, node.Name),
			"none is ready; pods with an identity cannot start there")
	}
}

func matches(labels, selector map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}

// checkDriver: the kubelet of each node with an agent knows the driver.
func (in *Installer) checkDriver(ctx context.Context, v *cluster, out *results) {
	const check = "CSI driver"
	if live, err := in.get(ctx, ref{Kind: "CSIDriver", Name: Driver}); err != nil {
		out.unknown(check, err)
		return
	} else if live == nil {
		out.fail(check, "castellan install", "the CSIDriver %s does not exist", Driver)
		return
	}
	if v.noPods != nil {
		out.unknown(check, v.noPods)
		return
	}
	registered := map[string]bool{}
	list, err := in.cfg.Kubernetes.StorageV1().CSINodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		out.unknown(check, err)
		return
	}
	for i := range list.Items {
		for _, d := range list.Items[i].Spec.Drivers {
			registered[list.Items[i].Name] = registered[list.Items[i].Name] || d.Name == Driver
		}
	}
	var missing []string
	agents := v.of(in.cfg.Namespace, "castellan-agent")
	for _, pod := range agents {
		if podReady(pod) && !registered[pod.Spec.NodeName] {
			missing = append(missing, pod.Spec.NodeName)
		}
	}
	if len(missing) > 0 {
		out.fail(check, "is agent.kubeletDir the kubelet's root directory? The agent's log says what the kubelet answered", "not registered on %s", some(missing))
		return
	}
	out.ok(check, "registered on %s", count(len(agents), "node"))
}

func (in *Installer) checkTaints(_ context.Context, v *cluster, out *results) {
	const check = "node taints"
	if v.noNodes != nil {
		out.unknown(check, v.noNodes)
		return
	}
	var list []string
	for i := range v.nodes {
		if tainted(&v.nodes[i]) {
			list = append(list, v.nodes[i].Name)
		}
	}
	if len(list) > 0 {
		out.fail(check, "the server takes the taint away once the node's agent is ready", "%s on %s: no pod starts there", TaintKey, some(list))
		return
	}
	out.ok(check, "none of ours")
}

// checkKeys: the authority has written its keys.
func (in *Installer) checkKeys(ctx context.Context, _ *cluster, out *results) {
	const check = "authority's keys"
	secret, err := in.get(ctx, ref{Kind: "Secret", Namespace: in.cfg.Namespace, Name: "castellan-ca"})
	switch {
	case apierrors.IsForbidden(err):
		out.warn(check, "", "you may not read the Secret castellan-ca; that is as it should be for most")
	case err != nil:
		out.unknown(check, err)
	case secret == nil:
		out.fail(check, "while the server runs, castellan install puts it back: the server fills it from memory", "the Secret castellan-ca does not exist")
	default:
		if data, _, _ := unstructured.NestedMap(secret.Object, "data"); len(data) == 0 {
			out.fail(check, "the server writes it at its first start; read its log", "the Secret castellan-ca is empty")
			return
		}
		out.ok(check, "in the Secret castellan-ca")
	}
}

// checkVersions: server, agents and sidecars are of one version.
func (in *Installer) checkVersions(_ context.Context, v *cluster, out *results) {
	const check = "versions"
	if v.noPods != nil {
		out.unknown(check, v.noPods)
		return
	}
	want := ""
	for _, pod := range v.of(in.cfg.Namespace, "castellan-server") {
		want = tagOf(pod.Spec.Containers, "castellan-server")
	}
	if want == "" {
		return // there is no server, as was said
	}
	var agents []string
	for _, pod := range v.of(in.cfg.Namespace, "castellan-agent") {
		if tag := tagOf(pod.Spec.Containers, "castellan-agent"); tag != want {
			agents = append(agents, fmt.Sprintf("%s has %s", pod.Spec.NodeName, tag))
		}
	}
	if len(agents) > 0 {
		out.warn(check, "an upgrade is under way, or was interrupted: castellan install", "the server is %s, but %s", want, some(agents))
	}
	proxies, old := 0, []string(nil)
	for i := range v.pods {
		tag := proxyTag(&v.pods[i])
		if tag == "" || v.pods[i].DeletionTimestamp != nil {
			continue
		}
		proxies++
		if tag != want {
			old = append(old, v.pods[i].Namespace+"/"+v.pods[i].Name)
		}
	}
	if len(old) > 0 {
		out.warn(check, "restart them (kubectl rollout restart) to get the new one", "%s of another version than the server's %s: %s", count(len(old), "proxy"), want, some(old))
	}
	if len(agents)+len(old) == 0 {
		out.ok(check, "all %s; %s in pods", want, count(proxies, "sidecar"))
	}
}

// proxyTag is the version of a pod's sidecar, empty where it has none.
func proxyTag(pod *corev1.Pod) string {
	if pod.Labels[labelTLSMode] != "istio" {
		return ""
	}
	return tagOf(slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers), "castellan-proxy")
}

// tagOf is the tag of an image by its last name.
func tagOf(containers []corev1.Container, name string) string {
	for _, c := range containers {
		image, _, _ := strings.Cut(c.Image, "@")
		if tag, ok := strings.CutPrefix(image[strings.LastIndex(image, "/")+1:], name+":"); ok {
			return tag
		}
	}
	return ""
}
