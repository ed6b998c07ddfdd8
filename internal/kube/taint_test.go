package kube_test

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"castellan.dev/identity"
	"castellan.dev/internal/kube"
)

// agentView is a view of pods that tells of changes.
type agentView struct {
	*podView
	mu     sync.Mutex
	tell   []func(old, next metav1.Object)
	synced bool
}

func (v *agentView) OnPod(f func(old, next metav1.Object)) { v.tell = append(v.tell, f) }

func (v *agentView) Synced() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.synced
}

func (v *agentView) sync() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.synced = true
}

func (v *agentView) put(t *testing.T, p *corev1.Pod) {
	t.Helper()
	if err := v.pods.Add(p); err != nil {
		t.Fatal(err)
	}
	for _, f := range v.tell {
		f(nil, p)
	}
}

func (v *agentView) remove(t *testing.T, p *corev1.Pod) {
	t.Helper()
	if err := v.pods.Delete(p); err != nil {
		t.Fatal(err)
	}
	for _, f := range v.tell {
		f(p, nil)
	}
}

func agentOn(node string, ready corev1.ConditionStatus, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "castellan-agent-" + node, UID: types.UID("agent-" + node)},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: "castellan-agent"},
		Status:     corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}}},
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func node(name string, taints ...corev1.Taint) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/os": "linux"}}, Spec: corev1.NodeSpec{Taints: taints}}
}

// daemonSet is that of the agents.
func daemonSet(change ...func(*appsv1.DaemonSet)) *appsv1.DaemonSet {
	d := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "castellan-agent"}}
	for _, c := range change {
		c(d)
	}
	return d
}

var (
	foreign = corev1.Taint{Key: "node.kubernetes.io/unreachable", Effect: corev1.TaintEffectNoExecute}
	ours    = corev1.Taint{Key: "castellan.dev/agent-not-ready", Effect: corev1.TaintEffectNoSchedule}
)

func (c *fakeCluster) taintsOf(t *testing.T, name string) []string {
	t.Helper()
	n, err := c.Clientset.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, x := range n.Spec.Taints {
		keys = append(keys, x.Key)
	}
	return keys
}

func newTaints(t *testing.T, c *fakeCluster, off bool, log *syncedLog) *agentView {
	t.Helper()
	agents, err := identity.NewAccount(namespace, "castellan-agent")
	if err != nil {
		t.Fatal(err)
	}
	v := &agentView{podView: newPodScene(t).view}
	startPart(t, kube.KeepTaints(c.client(), v, kube.TaintConfig{Agents: []identity.Account{agents}, Off: off, Log: log.logger()}))
	return v
}

// TestTaints: a node is tainted while no agent on it is ready, others' taints are
// theirs, and nothing is done before pods are known.
func TestTaints(t *testing.T) {
	windows := node("windows")
	windows.Labels["kubernetes.io/os"] = "windows"
	c := newCluster(t, node("ready"), node("bare"), node("full", foreign, ours), node("pending", foreign), windows, daemonSet())
	v := newTaints(t, c, false, &syncedLog{})
	v.put(t, agentOn("ready", corev1.ConditionTrue))
	v.put(t, agentOn("full", corev1.ConditionTrue))
	v.put(t, agentOn("pending", corev1.ConditionFalse))
	impostor := agentOn("bare", corev1.ConditionTrue, func(p *corev1.Pod) { p.Spec.ServiceAccountName = "default" })
	v.put(t, impostor)
	within30s(t, "nodes are known", func() bool { return c.count("list", "nodes") > 0 })
	if c.count("patch", "nodes") != 0 {
		t.Error("tainted before pods are known")
	}
	v.sync()
	is := func(name string, want ...string) {
		t.Helper()
		within30s(t, name, func() bool { return slices.Equal(c.taintsOf(t, name), want) })
	}
	is("bare", ours.Key)
	is("pending", foreign.Key, ours.Key)
	is("full", foreign.Key)
	v.put(t, agentOn("pending", corev1.ConditionTrue))
	is("pending", foreign.Key)
	v.put(t, agentOn("bare", corev1.ConditionTrue))
	is("bare")
	v.remove(t, agentOn("bare", corev1.ConditionTrue))
	is("bare", ours.Key)
	now := metav1.Now()
	v.put(t, agentOn("pending", corev1.ConditionTrue, func(p *corev1.Pod) { p.DeletionTimestamp = &now }))
	is("pending", foreign.Key, ours.Key)
	// A new node, and one whose taint somebody removes.
	if _, err := c.Clientset.CoreV1().Nodes().Create(t.Context(), node("new"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	is("new", ours.Key)
	n, err := c.Clientset.CoreV1().Nodes().Get(t.Context(), "new", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n = n.DeepCopy()
	n.Spec.Taints = []corev1.Taint{foreign}
	if _, err := c.Clientset.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	is("new", foreign.Key, ours.Key)
	if err := c.Clientset.CoreV1().Nodes().Delete(t.Context(), "new", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	is("ready")
	is("windows")
	for _, name := range []string{"pending"} {
		n, _ := c.Clientset.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if n.Spec.Taints[0] != foreign || n.Spec.Taints[1] != ours {
			t.Errorf("%v", n.Spec.Taints)
		}
	}
}

// TestTaintsAreConflictSafe: a patch made from an old view is refused, and made anew
// from the new one.
func TestTaintsAreConflictSafe(t *testing.T) {
	c := newCluster(t, node("a", foreign), daemonSet())
	v := newTaints(t, c, false, &syncedLog{})
	var once sync.Once
	c.setFail(func(verb, resource string) error {
		if verb != "patch" {
			return nil
		}
		var err error
		once.Do(func() {
			err = apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, "a", nil)
			n, gerr := c.Tracker().Get(corev1.SchemeGroupVersion.WithResource("nodes"), "", "a")
			if gerr != nil {
				t.Error(gerr)
				return
			}
			fresh := n.(*corev1.Node).DeepCopy()
			fresh.ResourceVersion, fresh.Spec.Taints = "999", nil
			if uerr := c.Tracker().Update(corev1.SchemeGroupVersion.WithResource("nodes"), fresh, ""); uerr != nil {
				t.Error(uerr)
			}
		})
		return err
	})
	v.sync()
	within30s(t, "tainted", func() bool { return slices.Equal(c.taintsOf(t, "a"), []string{ours.Key}) })
}

// TestTaintsWithoutAgents: where the agents are uninstalled no node is tainted when
// they go, and those that are lose the taint; not to know changes nothing.
func TestTaintsWithoutAgents(t *testing.T) {
	now := metav1.Now()
	leaving := func(d *appsv1.DaemonSet) { d.DeletionTimestamp, d.Finalizers = &now, []string{"foregroundDeletion"} }
	for name, objects := range map[string][]runtime.Object{
		"deleted": nil, "being deleted": {daemonSet(leaving)}, "another's": {daemonSet(func(d *appsv1.DaemonSet) { d.Namespace = "other" })},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, append(objects, node("a"), node("b", foreign, ours))...)
			v := newTaints(t, c, false, &syncedLog{})
			v.put(t, agentOn("a", corev1.ConditionFalse))
			v.sync()
			within30s(t, "untainted", func() bool { return slices.Equal(c.taintsOf(t, "b"), []string{foreign.Key}) })
			if got := c.taintsOf(t, "a"); len(got) != 0 {
				t.Errorf("a has %q", got)
			}
		})
	}
	c := newCluster(t, node("a"), node("b", ours), daemonSet())
	c.setFail(func(verb, resource string) error {
		if resource == "daemonsets" {
			return apierrors.NewForbidden(schema.GroupResource{Resource: "daemonsets"}, "castellan-agent", errors.New("no"))
		}
		return nil
	})
	var log syncedLog
	v := newTaints(t, c, false, &log)
	v.sync()
	within30s(t, "told", func() bool { return strings.Contains(log.String(), "daemonset") })
	if a, b := c.taintsOf(t, "a"), c.taintsOf(t, "b"); len(a) != 0 || len(b) != 1 || c.count("patch", "nodes") != 0 {
		t.Errorf("a has %q, b %q", a, b)
	}
}

// TestTaintsOff: what an earlier configuration left is removed, once; without the
// permission the server goes on.
func TestTaintsOff(t *testing.T) {
	c := newCluster(t, node("a", foreign, ours), node("b"), node("c", ours))
	newTaints(t, c, true, &syncedLog{})
	within30s(t, "removed", func() bool {
		return slices.Equal(c.taintsOf(t, "a"), []string{foreign.Key}) && len(c.taintsOf(t, "c")) == 0
	})
	if n := c.count("patch", "nodes"); n != 2 {
		t.Errorf("%d patches", n)
	}
	c = newCluster(t)
	c.setFail(func(verb, resource string) error {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "", errors.New("no"))
	})
	var log syncedLog
	newTaints(t, c, true, &log)
	within30s(t, "told", func() bool {
		return strings.Contains(log.String(), "kubectl taint nodes --all castellan.dev/agent-not-ready-")
	})
}
