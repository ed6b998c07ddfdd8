package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"castellan.dev/identity"
	"castellan.dev/internal/run"
)

// AgentTaint keeps pods from a node that has no ready agent.
const AgentTaint = "castellan.dev/agent-not-ready"

// TaintConfig says which nodes are kept free of pods.
type TaintConfig struct {
	// Agents are the accounts that agents run as. Their DaemonSets have their names.
	Agents []identity.Account
	// Off removes the taints there are, once.
	Off bool
	Log *slog.Logger
	Now func() time.Time
}

// agents is what is known of agents' pods; *Informers is it.
type agents interface {
	view
	OnPod(f func(old, next metav1.Object))
}

// KeepTaints taints every node (of Linux: elsewhere no agent can run) on which no
// agent is ready, and removes the taint as soon as one is. It keeps new pods away
// and evicts none; what must run without an agent, first of all the agents and this
// server, tolerates it. While pods are not known nothing is done. Where the agents'
// DaemonSet is deleted no agent is waited for: whoever uninstalls, by whatever tool,
// must not be left with nodes that take no pod. It must be called before the informers
// run.
//
// RBAC: nodes list, watch, patch, cluster-wide, as they have no other scope; daemonsets
// get, of the agents' names.
func KeepTaints(c *Client, informers agents, cfg TaintConfig) run.Part {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	t := &taints{cfg: cfg, c: c, informers: informers}
	t.keeper = newKeeper("taints of nodes", cfg.Log, t.keep)
	if cfg.Off {
		return t.removeAll
	}
	informers.OnPod(func(old, next metav1.Object) {
		if t.isAgent(old) || t.isAgent(next) {
			t.keeper.wake()
		}
	})
	return t.run
}

type taints struct {
	cfg       TaintConfig
	c         *Client
	informers agents
	keeper    *keeper
	nodes     *mirror
}

func (t *taints) run(ctx context.Context) error {
	api := t.c.Kubernetes().CoreV1().Nodes()
	t.nodes = t.c.mirror(watched{
		kind: "nodes", sample: &corev1.Node{}, list: listing(api.List), open: api.Watch, reduce: reduceNode,
		change: func(old, next metav1.Object) {
			// Most of what nodes tell is their heartbeat.
			if before, ok := old.(*corev1.Node); !ok || next == nil || before.UID != next.GetUID() || t.differ(next) {
				t.keeper.wake()
			}
		},
	}, t.cfg.Log, t.cfg.Now)
	return run.All(ctx, t.nodes.part, t.keeper.Run)
}

// reduceNode keeps what decides about the taint.
func reduceNode(o runtime.Object) runtime.Object {
	n, ok := o.(*corev1.Node)
	if !ok {
		return o
	}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name: n.Name, UID: n.UID, ResourceVersion: n.ResourceVersion, DeletionTimestamp: n.DeletionTimestamp,
			Labels: map[string]string{corev1.LabelOSStable: n.Labels[corev1.LabelOSStable]},
		},
		Spec: corev1.NodeSpec{Taints: n.Spec.Taints},
	}
}

func (t *taints) isAgent(o metav1.Object) bool {
	pod, ok := o.(*corev1.Pod)
	return ok && slices.ContainsFunc(t.cfg.Agents, func(a identity.Account) bool {
		return a.Namespace() == pod.Namespace && a.Name() == pod.Spec.ServiceAccountName
	})
}

// ready reports whether an agent is ready on a node.
func (t *taints) ready(node string) (bool, error) {
	objects, err := t.informers.Pods().ByIndex(IndexNode, node)
	return slices.ContainsFunc(objects, func(o any) bool {
		pod, ok := o.(*corev1.Pod)
		return ok && t.isAgent(pod) && pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
	}), err
}

// differ reports whether a node's taint is not as it should be.
func (t *taints) differ(o metav1.Object) bool {
	node, ok := o.(*corev1.Node)
	if !ok || !t.informers.Synced() {
		return false
	}
	ready, err := t.ready(node.Name)
	return err == nil && ready == (tainted(node) >= 0)
}

func tainted(node *corev1.Node) int {
	return slices.IndexFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == AgentTaint && t.Effect == corev1.TaintEffectNoSchedule })
}

// keep puts every node right that is known.
func (t *taints) keep(ctx context.Context) (time.Duration, error) {
	if !t.informers.Synced() || !t.nodes.synced.Load() {
		return unreadyEvery, nil
	}
	var errs []error
	due := sync.OnceValues(func() (bool, error) { return t.due(ctx) })
	for _, o := range t.nodes.List() {
		node, ok := o.(*corev1.Node)
		if !ok || node.DeletionTimestamp != nil || ctx.Err() != nil {
			continue
		}
		if os := node.Labels[corev1.LabelOSStable]; os != "" && os != "linux" {
			continue
		}
		want, err := t.ready(node.Name)
		if want = !want; want && err == nil {
			want, err = due()
		}
		if err == nil && want != (tainted(node) >= 0) {
			err = t.patch(ctx, node, want)
		}
		// Somebody else changed the node meanwhile: the watch brings it, and wakes us.
		if err != nil && !apierrors.IsConflict(err) {
			errs = append(errs, fmt.Errorf("node %q: %w", node.Name, err))
		}
	}
	return 0, errors.Join(errs...)
}

// due reports whether agents are to be expected on nodes. Not to know changes nothing
// on any node.
func (t *taints) due(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for _, a := range t.cfg.Agents {
		set, err := t.c.Kubernetes().AppsV1().DaemonSets(a.Namespace()).Get(ctx, a.Name(), metav1.GetOptions{})
		if err == nil && set.DeletionTimestamp == nil {
			return true, nil
		}
		if absent(err) != nil {
			return false, fmt.Errorf("daemonset %s/%s: %w", a.Namespace(), a.Name(), err)
		}
	}
	return false, nil
}

// operation is one of a JSON patch (RFC 6902).
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// patch adds or removes our taint and touches nothing else. That the resource
// version is replaced by the one we know makes the API server refuse the patch when
// it is another by now, and with it the positions in the list.
func (t *taints) patch(ctx context.Context, node *corev1.Node, add bool) error {
	ours := corev1.Taint{Key: AgentTaint, Effect: corev1.TaintEffectNoSchedule}
	operations := []operation{{"replace", "/metadata/resourceVersion", node.ResourceVersion}}
	switch at := tainted(node); {
	case add && len(node.Spec.Taints) == 0:
		operations = append(operations, operation{"add", "/spec/taints", []corev1.Taint{ours}})
	case add:
		operations = append(operations, operation{"add", "/spec/taints/-", ours})
	default:
		operations = append(operations, operation{Op: "remove", Path: fmt.Sprintf("/spec/taints/%d", at)})
	}
	data, err := json.Marshal(operations)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = t.c.Kubernetes().CoreV1().Nodes().Patch(ctx, node.Name, types.JSONPatchType, data, metav1.PatchOptions{FieldManager: fieldManager})
	if err == nil {
		t.cfg.Log.Info("taint of a node changed", "node", node.Name, "tainted", add)
	}
	return absent(err)
}

// removeAll removes the taints that an earlier configuration left. Without the
// permission there is nothing to be done: who takes it away removes the taints.
func (t *taints) removeAll(ctx context.Context) error {
	for wait := keeperFirstRetry; ; wait = min(2*wait, keeperLastRetry) {
		err := t.removeOnce(ctx)
		switch {
		case apierrors.IsForbidden(err):
			t.cfg.Log.Info("nodes may not be asked for, so that no taint of ours is removed; if there are any: kubectl taint nodes --all " + AgentTaint + "-")
			fallthrough
		case err == nil:
			<-ctx.Done()
			return ctx.Err()
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

func (t *taints) removeOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	list, err := t.c.Kubernetes().CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var errs []error
	for i := range list.Items {
		if tainted(&list.Items[i]) >= 0 {
			errs = append(errs, t.patch(ctx, &list.Items[i], false)) // a conflict is tried again
		}
	}
	return errors.Join(errs...)
}

// OnPod has f told of every change of a pod: old is nil for a new one, next for a
// deleted one. It must be called before Run; f must not wait.
func (i *Informers) OnPod(f func(old, next metav1.Object)) {
	i.pods.changed = append(i.pods.changed, f)
}
