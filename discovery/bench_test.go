package discovery_test

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/discovery"
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

func (f *feed) Current() *workloads.File { return &f.file }
func (f *feed) Changed() <-chan struct{} { return nil }

func (f *feed) set(i int, d discovery.FileDocument) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.docs = append([]discovery.FileDocument(nil), f.docs...)
	f.docs[i] = d
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
