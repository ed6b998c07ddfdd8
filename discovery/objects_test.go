package discovery_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/discovery"
	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
)

// apiServer is an ObjectSource and an Inventory.
type apiServer struct {
	mu      sync.Mutex
	objects []discovery.Object
	file    *workloads.File
	changed chan struct{}
}

func (a *apiServer) Objects() ([]discovery.Object, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.objects, a.changed
}

func (a *apiServer) Current() *workloads.File {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.file
}

func (a *apiServer) Changed() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

func (a *apiServer) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *apiServer) policies(objects ...discovery.Object) {
	a.set(func() { a.objects = append([]discovery.Object{}, objects...) })
}

// object makes one of YAML, with the metadata an API server gives.
func object(t *testing.T, uid string, generation int64, text string) discovery.Object {
	t.Helper()
	var o map[string]any
	if err := yaml.Unmarshal([]byte(text), &o); err != nil {
		t.Fatal(err)
	}
	meta := o["metadata"].(map[string]any)
	meta["uid"], meta["generation"] = uid, generation
	raw, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return discovery.Object{Kind: fmt.Sprint(o["kind"]), Namespace: fmt.Sprint(meta["namespace"]), Name: fmt.Sprint(meta["name"]),
		UID: uid, Generation: generation, JSON: raw}
}

func cluster() *workloads.File {
	account := func(name string) identity.Account {
		a, err := identity.NewAccount("shop", name)
		if err != nil {
			panic(err)
		}
		return a
	}
	return &workloads.File{Resolved: true,
		Workloads: []workloads.Workload{
			{Namespace: "shop", ServiceAccount: "orders", PodUID: "pod-orders", PodName: "orders-1", Node: "one", Labels: map[string]string{"app": "orders"}, Address: "10.0.0.1", Revision: 1},
			{Namespace: "shop", ServiceAccount: "legacy", PodUID: "pod-legacy", PodName: "legacy-1", Node: "one", Labels: map[string]string{"app": "legacy"}, Address: "10.0.0.2", OutsideMesh: true, Revision: 2},
			{Namespace: "evil", ServiceAccount: "evil", PodUID: "pod-evil", PodName: "evil-1", Node: "two", Labels: map[string]string{"app": "orders"}, Address: "10.0.0.9", Revision: 3},
		},
		Services: []workloads.Service{
			{Namespace: "shop", Name: "orders", Ports: []workloads.ServicePort{{Number: 80}, {Number: 90}}, Accounts: []identity.Account{account("orders")}, Revision: 1, Endpoints: []workloads.Endpoint{
				{Workload: "pod-orders", Address: "10.0.0.1", Ports: map[uint16]uint16{80: 8080}},
				{Workload: "pod-evil", Address: "10.0.0.9", Ports: map[uint16]uint16{80: 8080}},
				{Workload: "pod-gone", Address: "10.0.0.5", Ports: map[uint16]uint16{80: 8080}}}},
			{Namespace: "shop", Name: "legacy", Ports: []workloads.ServicePort{{Number: 80}}, Accounts: []identity.Account{}, Revision: 2, Endpoints: []workloads.Endpoint{
				{Workload: "pod-legacy", Address: "10.0.0.2", Ports: map[uint16]uint16{80: 80}, OutsideMesh: true},
				{Address: "192.0.2.1", Ports: map[uint16]uint16{80: 80}, OutsideMesh: true}}},
			{Namespace: "shop", Name: "declared", Ports: []workloads.ServicePort{{Number: 80}}, Accounts: []identity.Account{}, SubjectAltNames: []string{"spiffe://cluster.local/ns/x/sa/y"}, Revision: 3, Endpoints: []workloads.Endpoint{
				{Address: "192.0.2.1", Ports: map[uint16]uint16{80: 80}}}},
		}}
}

// startObjects runs a server on an API server's objects.
func startObjects(t *testing.T, api *apiServer) *setup {
	t.Helper()
	s := prepare(t, nil)
	s.startOn(discovery.NewObjects(discovery.ObjectsConfig{Source: api, Mesh: s.mesh}), api)
	return s
}

// statuses writes each as "ns/name uid generation state selected/programmed/refused fields".
func statuses(s *discovery.Server) []string {
	all, _ := s.Statuses()
	out := []string{}
	for _, d := range all {
		state := "refused"
		switch {
		case d.Accepted:
			state = "accepted"
		case d.LastGoodInForce:
			state = "last-good"
		case d.Denies:
			state = "denies"
		}
		line := fmt.Sprintf("%s/%s %s@%d %s %d/%d/%d", d.Namespace, d.Name, d.UID, d.Generation, state, d.Selected, d.Programmed, d.Refused)
		for _, f := range d.Findings {
			if f.Severity == "error" {
				line += " " + f.Field
			}
		}
		out = append(out, line)
	}
	return out
}

func (s *setup) reach(want ...string) {
	s.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		all, changed := s.server.Statuses()
		got := statuses(s.server)
		if all != nil && slices.Equal(got, want) {
			return
		}
		select {
		case <-changed:
		case <-time.After(time.Until(deadline)):
			s.t.Fatalf("statuses are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

func TestObjects(t *testing.T) {
	api := &apiServer{changed: make(chan struct{})}
	s := startObjects(t, api)
	if all, _ := s.server.Statuses(); all != nil || s.server.Ready() == nil {
		t.Fatalf("statuses %v before anything is known", all)
	}
	// One without the other is not enough: no policy is not "no policies".
	api.set(func() { api.file = cluster() })
	if s.server.Ready() == nil {
		t.Fatal("ready without policies")
	}
	good := object(t, "u1", 1, allow("orders", "orders", "frontend"))
	api.policies(good, object(t, "u2", 1, allow("legacy", "legacy", "x")))
	s.reach("shop/orders u1@1 accepted 1/0/0", "shop/legacy u2@1 accepted 0/0/0")
	f := s.follow(s.agent("one"))
	s.told(f, "pod-orders", "orders=frontend")
	s.told(f, "pod-legacy", "none") // outside the mesh
	s.eventually("acknowledgement", func() bool {
		s.report("one", "pod-orders", f)
		return slices.Contains(statuses(s.server), "shop/orders u1@1 accepted 1/1/0")
	})
	// Edited into something refused: the last good version stays, and is acknowledged.
	api.policies(object(t, "u1", 2, broken("orders", "orders")))
	s.reach("shop/orders u1@2 last-good 1/1/0 spec.rules[0].from[0].source.prinzipals")
	s.told(f, "pod-orders", "orders=frontend")
	// Made anew under the same name: another object, which inherits nothing.
	api.policies(object(t, "u9", 1, broken("orders", "orders")))
	s.reach("shop/orders u9@1 denies 1/0/0 spec.rules[0].from[0].source.prinzipals")
	s.told(f, "pod-orders", "deny")
	api.policies(object(t, "u9", 2, allow("orders", "orders", "other")))
	s.reach("shop/orders u9@2 accepted 1/0/0")
	s.told(f, "pod-orders", "orders=other")
	// The API server's word on an object's name counts, not the text's.
	lying := good
	lying.Name = "another"
	api.policies(lying)
	s.reach("shop/another u1@1 denies 1/0/0 metadata")
	// Nothing known any more is not nothing there.
	api.set(func() { api.objects = nil })
	api.set(func() { api.file = cluster() })
	s.reach("shop/another u1@1 denies 1/0/0 metadata")
	api.policies()
	s.reach()
	s.told(f, "pod-orders", "")
	api.policies(good)
	s.reach("shop/orders u1@1 accepted 1/1/0") // what it was told before, and acknowledged
	many := make([]discovery.Object, 20_001)
	for i := range many { // no namespace's share alone comes to so many
		many[i].Kind, many[i].Namespace, many[i].Name = policy.KindAuthorization, fmt.Sprint("n", i%11), fmt.Sprint("p", i)
	}
	api.policies(append(many, good)...)
	s.eventually("a word on too many", func() bool {
		return slices.ContainsFunc(s.policies().GetPolicies(), func(p *castellanv1.PolicyStatus) bool {
			return len(p.GetFindings()) == 2 && strings.Contains(p.GetFindings()[1].GetReason(), "1819 policies, 1818 are allowed")
		})
	})
	s.told(f, "pod-orders", "orders=frontend")
	if w := s.policies().GetWorkloads(); len(w) != 2 || w[0].GetPodName() != "orders-1" {
		t.Errorf("workloads: %v", w)
	}
}

// TestObjectsAfterRestart: an object's last good version outlives the server, as
// long as it is the same object.
func TestObjectsAfterRestart(t *testing.T) {
	api := &apiServer{changed: make(chan struct{}), file: cluster()}
	api.policies(object(t, "u1", 1, allow("orders", "orders", "frontend")), object(t, "u2", 1, allow("second", "orders", "frontend")))
	s := startObjects(t, api)
	s.reach("shop/orders u1@1 accepted 1/0/0", "shop/second u2@1 accepted 1/0/0")
	s.stop()
	api.policies(object(t, "u1", 2, broken("orders", "orders")), object(t, "u3", 1, broken("second", "orders")))
	s.startOn(discovery.NewObjects(discovery.ObjectsConfig{Source: api, Mesh: s.mesh}), api)
	s.reach("shop/orders u1@2 last-good 1/0/0 spec.rules[0].from[0].source.prinzipals", "shop/second u3@1 denies 1/0/0 spec.rules[0].from[0].source.prinzipals")
}

// TestClusterServices: who must answer is the service's word, each endpoint keeps
// its own identity, and what is outside the mesh says so.
func TestClusterServices(t *testing.T) {
	api := &apiServer{changed: make(chan struct{}), file: cluster()}
	api.policies()
	s := startObjects(t, api)
	f := s.follow(s.agent("one"))
	get := func(name string) string {
		var m castellanv1.ServiceIdentity
		f.get(name, &m)
		var out []string
		for _, e := range m.GetEndpoints() {
			out = append(out, fmt.Sprintf("%s %v %s %t", e.GetAddress(), e.GetPorts(), strings.TrimPrefix(e.GetSpiffeId(), "spiffe://cluster.local/"), e.GetOutsideMesh()))
		}
		return strings.Join(append(out, m.GetExpectedIds()...), "; ")
	}
	want := map[string]string{
		"shop/orders":   "10.0.0.1 map[80:8080] ns/shop/sa/orders false; 10.0.0.9 map[80:8080] ns/evil/sa/evil false; spiffe://cluster.local/ns/shop/sa/orders",
		"shop/legacy":   "10.0.0.2 map[80:80] ns/shop/sa/legacy true; 192.0.2.1 map[80:80]  true",
		"shop/declared": "192.0.2.1 map[80:80]  false; spiffe://cluster.local/ns/x/sa/y",
	}
	for name, text := range want {
		s.eventually(name, func() bool { return get(name) != "" })
		if diff := cmp.Diff(text, get(name)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	// A pod outside the mesh has no policy, and still may say what it was served.
	s.report("one", "pod-legacy", f)
}

func (s *setup) report(node, uid string, f *follower) {
	s.t.Helper()
	var p castellanv1.WorkloadPolicy
	version, _ := f.get(uid, &p)
	account := map[string]string{"pod-orders": "orders", "pod-legacy": "legacy"}[uid]
	_, err := castellanv1.NewNodeClient(f.conn).Report(s.t.Context(), &castellanv1.ReportRequest{Node: node, Workloads: []*castellanv1.WorkloadReport{{
		PodUid: uid, Namespace: "shop", ServiceAccount: account, Streams: []*castellanv1.StreamReport{{Client: "proxy", Resources: []*castellanv1.ResourceReport{
			{TypeUrl: castellanv1.TypeWorkloadPolicy, Name: uid, Acked: version}}}}}}})
	if err != nil {
		s.t.Fatal(err)
	}
}

// TestRefusedByProxies: a refusal is told apart from silence.
func TestRefusedByProxies(t *testing.T) {
	api := &apiServer{changed: make(chan struct{}), file: cluster()}
	api.policies(object(t, "u1", 1, allow("orders", "orders", "frontend")))
	s := startObjects(t, api)
	s.reach("shop/orders u1@1 accepted 1/0/0")
	f := s.follow(s.agent("one"))
	_, err := castellanv1.NewNodeClient(f.conn).Report(t.Context(), &castellanv1.ReportRequest{Node: "one", Workloads: []*castellanv1.WorkloadReport{{
		PodUid: "pod-orders", Namespace: "shop", ServiceAccount: "orders", Streams: []*castellanv1.StreamReport{{Resources: []*castellanv1.ResourceReport{
			{TypeUrl: castellanv1.TypeWorkloadPolicy, Name: "pod-orders", Nacked: "v", Reason: "why"}}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	s.reach("shop/orders u1@1 accepted 1/0/1")
}

// TestNamespaceWithTooMany: whoever may write policies of one namespace cannot keep
// those of others from counting, nor displace what is there.
func TestNamespaceWithTooMany(t *testing.T) {
	api := &apiServer{changed: make(chan struct{}), file: cluster()}
	s := prepare(t, nil)
	source := discovery.NewObjects(discovery.ObjectsConfig{Source: api, Mesh: s.mesh})
	old := object(t, "u1", 1, strings.Replace(allow("zzz", "orders", "x"), "metadata: {", "metadata: {creationTimestamp: '2020-01-01T00:00:00Z', ", 1))
	objects := []discovery.Object{old}
	for i := range 2001 {
		objects = append(objects, object(t, fmt.Sprint("m", i), 1, strings.Replace(allow(fmt.Sprint("m", i), "nobody", "x"), "metadata: {", "metadata: {creationTimestamp: '2021-01-01T00:00:00Z', ", 1)))
	}
	other := object(t, "u2", 1, strings.Replace(allow("other", "orders", "x"), "namespace: shop", "namespace: evil", 1))
	api.policies(append(objects, other)...)
	docs, _ := source.Documents()
	refused := 0
	for _, d := range docs {
		if d.Refused() {
			refused++
			if d.UID == "u1" || d.UID == "u2" {
				t.Errorf("%s was displaced: %v", d.Ref, d.Findings)
			}
		}
	}
	if refused != 2 {
		t.Errorf("%d refused of 2002 in one namespace", refused)
	}
}
