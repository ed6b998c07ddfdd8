package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"castellan.dev/api/policy"
	"castellan.dev/internal/kube"
)

// desk is a cluster whose policies have verdicts.
type desk struct {
	*policyCluster
	client *fake.Clientset

	mu       sync.Mutex
	verdicts []kube.Verdict
	changed  chan struct{}
	now      time.Time
	patches  []string
	refuse   error
	version  int
	looks    int // how often the verdicts were asked for
}

func (d *desk) say(v ...kube.Verdict) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.verdicts = v
	close(d.changed)
	d.changed = make(chan struct{})
}

func (d *desk) written() int { d.mu.Lock(); defer d.mu.Unlock(); return len(d.patches) }

func (d *desk) time() time.Time { d.mu.Lock(); defer d.mu.Unlock(); return d.now }

func (d *desk) pass(t time.Duration) {
	d.mu.Lock()
	d.now = d.now.Add(t)
	v := d.verdicts
	d.mu.Unlock()
	d.say(v...)
}

// looked waits until what was said last has been acted on as a whole: it is asked for at
// the beginning of each turn, so a turn with it has ended when it is asked for again.
func (d *desk) looked() {
	d.t.Helper()
	count := func() int { d.mu.Lock(); defer d.mu.Unlock(); return d.looks }
	before := count()
	eventually(d.t, "the verdicts are looked at", func() bool { d.pass(0); return count() >= before+2 })
}

func newDesk(t *testing.T, objects ...runtime.Object) *desk {
	t.Helper()
	d := &desk{policyCluster: newPolicyCluster(t, "v1", objects...), client: fake.NewClientset(), changed: make(chan struct{}),
		now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), version: 100}
	d.dynamic.PrependReactor("patch", "*", d.patch)
	s, err := kube.NewStatuses(kube.StatusesConfig{Kubernetes: d.client, Dynamic: d.dynamic, Policies: d.informers.Policies(),
		Verdicts: func() ([]kube.Verdict, <-chan struct{}) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.looks++
			return d.verdicts, d.changed
		},
		Now: d.time})
	if err != nil {
		t.Fatal(err)
	}
	background(t, d.informers.Run, func(ctx context.Context) error {
		for (d.informers.Policies().Ready() != nil || d.opened.Load() < 3) && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		return s.Run(ctx)
	})
	return d
}

// patch does what an API server would: it minds the version, and only touches status.
// What is too late for the version is no write.
func (d *desk) patch(a clienttesting.Action) (bool, runtime.Object, error) {
	p := a.(clienttesting.PatchAction)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refuse != nil {
		d.patches = append(d.patches, string(p.GetPatch()))
		return true, nil, d.refuse
	}
	if p.GetSubresource() != "status" {
		return true, nil, errors.New("not the status")
	}
	old, err := d.dynamic.Tracker().Get(p.GetResource(), p.GetNamespace(), p.GetName())
	if err != nil {
		return true, nil, err
	}
	was := old.(*unstructured.Unstructured)
	before, err := json.Marshal(was)
	if err != nil {
		return true, nil, err
	}
	after, err := jsonpatch.MergePatch(before, p.GetPatch())
	if err != nil {
		return true, nil, err
	}
	next := &unstructured.Unstructured{}
	if err := json.Unmarshal(after, next); err != nil {
		return true, nil, err
	}
	if next.GetResourceVersion() != was.GetResourceVersion() {
		return true, nil, apierrors.NewConflict(schema.GroupResource{}, p.GetName(), errors.New("changed"))
	}
	d.patches = append(d.patches, string(p.GetPatch()))
	d.version++
	next.SetResourceVersion(strconv.Itoa(d.version))
	return true, next, d.dynamic.Tracker().Update(p.GetResource(), next, p.GetNamespace())
}

func at() schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: policy.Group, Version: "v1", Resource: "authorizationpolicies"}
}

// read returns the conditions as "Type=Status/Reason@generation since message".
func (d *desk) read(name string) []string {
	o, err := d.dynamic.Resource(at()).Namespace("shop").Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		return []string{err.Error()}
	}
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	var out []string
	for _, raw := range list {
		c := raw.(map[string]any)
		if c["type"] == "Other" {
			out = append(out, "Other")
			continue
		}
		since, _ := time.Parse(time.RFC3339, fmt.Sprint(c["lastTransitionTime"]))
		out = append(out, fmt.Sprintf("%v=%v/%v@%v %s %v", c["type"], c["status"], c["reason"], c["observedGeneration"], since.Format("05"), c["message"]))
	}
	return out
}

func (d *desk) reads(name string, want ...string) {
	d.t.Helper()
	var got []string
	deadline := time.Now().Add(patience)
	for got = d.read(name); !slices.Equal(got, want); got = d.read(name) {
		if time.Now().After(deadline) {
			d.t.Fatalf("conditions are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (d *desk) events() []string {
	list, err := d.client.CoreV1().Events("shop").List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range list.Items {
		out = append(out, fmt.Sprintf("%s %s %s/%s %s x%d", e.Type, e.Reason, e.InvolvedObject.Kind, e.InvolvedObject.Name, e.InvolvedObject.UID, e.Count))
	}
	slices.Sort(out)
	return out
}

func verdict(change func(*kube.Verdict)) kube.Verdict {
	v := kube.Verdict{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "one", UID: "uid-one", Generation: 3, Accepted: true, Selected: 4, Programmed: 4}
	if change != nil {
		change(&v)
	}
	return v
}

func TestStatuses(t *testing.T) {
	d := newDesk(t, authorization("one"))
	d.say(verdict(func(v *kube.Verdict) { v.Programmed = 3 }))
	d.reads("one", "Other", "Accepted=True/Accepted@3 05 the policy is in force", "Programmed=False/Pending@3 05 3 of 4 proxies have acknowledged")
	d.pass(10 * time.Second)
	d.say(verdict(nil))
	d.reads("one", "Other", "Accepted=True/Accepted@3 05 the policy is in force", "Programmed=True/Programmed@3 15 4 of 4 proxies have acknowledged")
	// A pod that has only just started says nothing against the policy.
	d.say(verdict(func(v *kube.Verdict) { v.Selected = 5 }))
	d.looked()
	d.pass(5 * time.Second)
	d.looked()
	d.say(verdict(nil))
	d.looked()
	if n := d.written(); n != 2 {
		t.Errorf("%d writes: %s", n, strings.Join(d.patches, "\n"))
	}
	// One that goes on lacking it does, after fifteen seconds of it.
	d.say(verdict(func(v *kube.Verdict) { v.Selected = 5 }))
	lacking := d.time()
	eventually(t, "that one proxy lacks it is said", func() bool {
		d.looked()
		if d.written() > 2 {
			return true
		}
		d.pass(6 * time.Second)
		return false
	})
	if after := d.time().Sub(lacking); after < 15*time.Second {
		t.Errorf("it is said after %s already", after)
	}
	at := d.time().Format("05")
	d.reads("one", "Other", "Accepted=True/Accepted@3 05 the policy is in force", "Programmed=False/Pending@3 "+at+" 4 of 5 proxies have acknowledged")
	d.say(verdict(func(v *kube.Verdict) {
		v.Generation, v.Accepted, v.LastGood = 4, false, true
		v.Errors = []string{`spec.action: "NO": allowed: ALLOW, DENY`, "b", "c", "d", "e"}
	}))
	d.reads("one", "Other", `Accepted=False/Invalid@4 `+at+` spec.action: "NO": allowed: ALLOW, DENY; b; c; and 2 more; its last good version stays in force`,
		"Programmed=False/NotAccepted@4 "+at+" this version is in force nowhere; 4 of 4 proxies have acknowledged what is in its place")
	d.say(verdict(func(v *kube.Verdict) {
		v.Generation, v.Selected, v.Programmed, v.Warnings = 5, 0, 0, []string{"risky"}
	}))
	d.reads("one", "Other", "Accepted=True/AcceptedWithWarnings@5 "+at+" the policy is in force; risky", "Programmed=True/NoWorkloads@5 "+at+" it selects no workload of the mesh")
	eventually(t, "events", func() bool {
		return slices.Equal(d.events(), []string{
			"Normal Accepted AuthorizationPolicy/one uid-one x1", "Normal Accepted AuthorizationPolicy/one uid-one x1",
			"Normal Programmed AuthorizationPolicy/one uid-one x1", "Normal Programmed AuthorizationPolicy/one uid-one x1",
			"Warning NotProgrammed AuthorizationPolicy/one uid-one x1", "Warning Refused AuthorizationPolicy/one uid-one x1"})
	})
	// A verdict on another object of the name is none on this one.
	before := d.written()
	d.say(verdict(func(v *kube.Verdict) { v.UID, v.Accepted = "uid-other", false }))
	d.pass(time.Minute)
	d.looked()
	if n := d.written(); n != before {
		t.Errorf("%d writes more", n-before)
	}
}

func TestStatusConflict(t *testing.T) {
	d := newDesk(t, authorization("one"))
	d.refuse = apierrors.NewConflict(schema.GroupResource{}, "one", errors.New("changed"))
	d.say(verdict(nil))
	eventually(t, "a first try", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.patches) == 1 })
	// Somebody else writes a condition in between; it stays.
	o := authorization("one")
	o.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Other"}, map[string]any{"type": "Accepted", "status": "Unknown"}}}
	o.SetResourceVersion("50")
	if err := d.dynamic.Tracker().Update(at(), o, "shop"); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	d.refuse = nil
	d.mu.Unlock()
	d.pass(time.Second)
	eventually(t, "both", func() bool { d.pass(time.Second); return len(d.read("one")) == 3 })
	d.reads("one", "Other", "Accepted=True/Accepted@3 "+d.read("one")[1][len("Accepted=True/Accepted@3 "):][:2]+" the policy is in force",
		d.read("one")[2])
}

// TestStatusFlood: a policy that flaps makes a bounded number of Events.
func TestStatusFlood(t *testing.T) {
	d := newDesk(t, authorization("one"))
	for i := range 30 {
		good := i%2 == 0
		d.say(verdict(func(v *kube.Verdict) {
			v.Generation, v.Accepted, v.Denies, v.Errors = int64(i+4), good, !good, []string{fmt.Sprint("wrong ", i)}
		}))
		want := map[bool]string{true: "Accepted=True", false: "Accepted=False"}[good]
		eventually(t, want, func() bool { got := d.read("one"); return len(got) == 3 && strings.HasPrefix(got[1], want) })
	}
	creations := 0
	for _, a := range d.client.Actions() {
		if a.GetResource().Resource == "events" {
			creations++
		}
	}
	if creations > 22 { // ten of either type, and what a minute lets through
		t.Errorf("%d writes of Events", creations)
	}
}
