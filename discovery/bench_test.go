package discovery_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/discovery"
	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
)

// feed is a Source and an Inventory in memory.
type feed struct {
	mu      sync.Mutex
	docs    []discovery.FileDocument
	file    workloads.File
	changed chan struct{}
}

func (f *feed) Documents() ([]discovery.FileDocument, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.docs, f.changed
}

func (f *feed) Current() *workloads.File {
	f.mu.Lock()
	defer f.mu.Unlock()
	file := f.file
	return &file
}

func (f *feed) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *feed) set(i int, d discovery.FileDocument) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.docs = append([]discovery.FileDocument(nil), f.docs...)
	f.docs[i] = d
	close(f.changed)
	f.changed = make(chan struct{})
}

// resolve makes the workloads those of a cluster, with services in front of them.
func (f *feed) resolve(services int) {
	f.file.Resolved = true
	for i := range f.file.Workloads {
		w := &f.file.Workloads[i]
		w.Revision, w.Address, w.Ports = uint64(i+1), fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255), []workloads.Port{{Number: 8080, Protocol: "http"}}
		s := i % services
		if i < services {
			f.file.Services = append(f.file.Services, workloads.Service{Namespace: "ns0", Name: fmt.Sprint("svc", s), Hosts: []string{fmt.Sprint("svc", s, ".ns0")},
				Accounts: []identity.Account{}, Ports: []workloads.ServicePort{{Number: 80, Protocol: "http"}}, Revision: uint64(s + 1)})
		}
		f.file.Services[s].Endpoints = append(f.file.Services[s].Endpoints, workloads.Endpoint{Workload: w.PodUID, Address: w.Address, Ports: map[uint16]uint16{80: 8080}})
	}
}

// relabel changes the labels of one workload, as one reading replaces another.
func (f *feed) relabel(i int, labels map[string]string, revision uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.file.Workloads = slices.Clone(f.file.Workloads)
	f.file.Workloads[i].Labels, f.file.Workloads[i].Revision = labels, revision
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *feed) setAll(doc func(int) discovery.FileDocument) {
	f.mu.Lock()
	defer f.mu.Unlock()
	docs := make([]discovery.FileDocument, len(f.docs))
	for i := range docs {
		docs[i] = doc(i)
	}
	f.docs = docs
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *feed) drop(i int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.docs = slices.Delete(slices.Clone(f.docs), i, i+1)
	close(f.changed)
	f.changed = make(chan struct{})
}

func document(i, namespaces int, account string) discovery.FileDocument {
	doc := policy.Document{Kind: policy.KindAuthorization, Metadata: policy.Metadata{Namespace: fmt.Sprintf("ns%d", i%namespaces), Name: fmt.Sprintf("p%d", i)},
		Authorization: &policy.AuthorizationPolicy{Selector: &policy.Selector{MatchLabels: map[string]string{"app": fmt.Sprintf("app%d", i/namespaces)}},
			Rules: []policy.Rule{{From: []policy.From{{Source: &policy.Source{Principals: []string{"cluster.local/ns/a/sa/" + account}}}}}}}}
	raw, _ := json.Marshal(doc)
	return discovery.FileDocument{File: "x", JSON: raw, Document: doc,
		Ref: discovery.Ref{Kind: doc.Kind, Namespace: doc.Metadata.Namespace, Name: doc.Metadata.Name}}
}

// large is a mesh of 10,000 workloads and 1,000 policies in so many namespaces.
func large(namespaces int) *feed {
	f := &feed{changed: make(chan struct{})}
	for i := range 1000 {
		f.docs = append(f.docs, document(i, namespaces, "first"))
	}
	for i := range 10_000 {
		f.file.Workloads = append(f.file.Workloads, workloads.Workload{Namespace: fmt.Sprintf("ns%d", i%namespaces), ServiceAccount: "a",
			PodUID: fmt.Sprintf("pod%d", i), Node: fmt.Sprintf("node%d", i%100), Labels: map[string]string{"app": fmt.Sprintf("app%d", i/namespaces%1000), "tier": "x"}})
	}
	return f
}

func run(tb testing.TB, f *feed) *discovery.Server {
	tb.Helper()
	s, err := discovery.New(discovery.Config{Source: f, Workloads: f, TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
		NodeOf: func(context.Context, string) (string, error) { return "", discovery.ErrUnknownNode }})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	tb.Cleanup(func() { cancel(); <-done })
	for s.Ready() != nil {
		time.Sleep(time.Millisecond)
	}
	return s
}

func version(tb testing.TB, s *discovery.Server, pod int) string {
	tb.Helper()
	resp, err := s.Policies(tb.Context(), &castellanv1.PoliciesRequest{})
	if err != nil {
		tb.Fatal(err)
	}
	return resp.GetWorkloads()[pod].GetVersion()
}

// TestLarge: one change in a large mesh changes only whom it selects.
func TestLarge(t *testing.T) {
	f := large(10)
	s := run(t, f)
	selected, other := version(t, s, 0), version(t, s, 1)
	f.set(0, document(0, 10, "second"))
	deadline := time.Now().Add(20 * time.Second)
	for version(t, s, 0) == selected {
		if time.Now().After(deadline) {
			t.Fatal("the change did not arrive")
		}
		time.Sleep(time.Millisecond)
	}
	if version(t, s, 1) != other {
		t.Error("a workload that is not selected got another version")
	}
}

// TestLargeCluster: a change in a large cluster is the same as everything made
// anew, whether of a workload or of a policy.
func TestLargeCluster(t *testing.T) {
	f := large(10)
	f.resolve(1000)
	s := run(t, f)
	same := func() {
		t.Helper()
		fresh := run(t, f)
		want, err := fresh.Policies(t.Context(), &castellanv1.PoliciesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(20 * time.Second)
		for {
			got, err := s.Policies(t.Context(), &castellanv1.PoliciesRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if proto.Equal(got, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("what was changed differs from what is made anew")
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	same()
	f.relabel(3, map[string]string{"app": "app7"}, 20_000)
	same()
	f.set(17, document(17, 10, "second"))
	same()
	// Another selector: whom it selected and whom it selects now both change.
	moved := document(17, 10, "third")
	moved.Document.Authorization.Selector.MatchLabels = map[string]string{"app": "app5"}
	moved.JSON, _ = json.Marshal(moved.Document)
	f.set(17, moved)
	same()
	// So many at once that nobody asks each.
	f.setAll(func(i int) discovery.FileDocument { return document(i, 10, "fourth") })
	same()
	f.drop(4)
	same()
}

// BenchmarkChange is one changed policy among 1,000 to its publication for 10,000
// workloads.
func BenchmarkChange(b *testing.B) {
	for _, namespaces := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("namespaces=%d", namespaces), func(b *testing.B) {
			f := large(namespaces)
			s := run(b, f)
			for i := 0; b.Loop(); i++ {
				before := version(b, s, 0)
				f.set(0, document(0, namespaces, fmt.Sprint("a", i)))
				for version(b, s, 0) == before {
					time.Sleep(100 * time.Microsecond)
				}
			}
		})
	}
}

// BenchmarkWorkloadChange is one changed pod among 10,000, with 1,000 services and
// 1,000 policies, to its publication.
func BenchmarkWorkloadChange(b *testing.B) {
	f := large(10)
	f.resolve(1000)
	s := discovery.NewBare(f)
	s.Turn()
	for i := 0; b.Loop(); i++ {
		f.relabel(0, map[string]string{"app": fmt.Sprint("app", i%1000)}, uint64(20_000+i))
		s.Turn()
	}
}

// BenchmarkPolicyChange is the same with one changed policy.
func BenchmarkPolicyChange(b *testing.B) {
	f := large(10)
	f.resolve(1000)
	s := discovery.NewBare(f)
	s.Turn()
	for i := 0; b.Loop(); i++ {
		f.set(0, document(0, 10, fmt.Sprint("a", i)))
		s.Turn()
	}
}
