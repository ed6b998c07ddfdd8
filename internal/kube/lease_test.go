package kube_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"castellan.dev/internal/kube"
)

// candidate is a server with something to lead.
type candidate struct {
	lease *kube.Lease
	at    atomic.Int32 // how many parts run now
	terms atomic.Int32
}

// crowd counts the parts of all candidates that run at the same time.
type crowd struct{ now, most atomic.Int32 }

func newCandidate(t *testing.T, c *fakeCluster, name string, crowd *crowd) (*candidate, func() error) {
	t.Helper()
	x := &candidate{}
	var err error
	if x.lease, err = kube.NewLease(c.client(), kube.LeaseConfig{Name: "castellan-server", Holder: name}); err != nil {
		t.Fatal(err)
	}
	part := func(ctx context.Context) error {
		x.terms.Add(1)
		if n := crowd.now.Add(1); n > crowd.most.Load() {
			crowd.most.Store(n)
		}
		x.at.Add(1)
		<-ctx.Done()
		<-time.After(50 * time.Millisecond) // it takes its time to end
		x.at.Add(-1)
		crowd.now.Add(-1)
		return ctx.Err()
	}
	return x, startPart(t, x.lease.Lead(part))
}

// TestOneLeads: one candidate leads at a time; when it ends, it gives the Lease back
// once its parts have ended, and the next leads at once.
func TestOneLeads(t *testing.T) {
	c := newCluster(t, &coordinationv1.Lease{ObjectMeta: named("castellan-server")}) // as the installer makes it
	var all crowd
	a, stopA := newCandidate(t, c, "a", &all)
	within30s(t, "a leads", func() bool { return a.lease.Leading() && a.at.Load() == 1 })
	b, stopB := newCandidate(t, c, "b", &all)
	<-time.After(100 * time.Millisecond)
	if b.lease.Leading() {
		t.Error("two lead")
	}
	if err := stopA(); err != nil {
		t.Error(err)
	}
	if a.lease.Leading() || a.at.Load() != 0 {
		t.Error("a leads though it has ended")
	}
	lease, err := c.Clientset.CoordinationV1().Leases(namespace).Get(t.Context(), "castellan-server", metav1.GetOptions{})
	if err != nil || lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity == "a" {
		t.Errorf("not given back: %v, %v", lease.Spec, err)
	}
	within30s(t, "b leads", func() bool { return b.at.Load() == 1 })
	if err := stopB(); err != nil {
		t.Error(err)
	}
	if n := all.most.Load(); n != 1 {
		t.Errorf("%d led at once", n)
	}
	if c.count("create", "leases") != 0 {
		t.Error("a Lease was created")
	}
}

// TestLostLease: without the API server the parts end in time, the candidate does
// not, and it leads again later.
func TestLostLease(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for a Lease to run out")
	}
	c := newCluster(t, &coordinationv1.Lease{ObjectMeta: named("castellan-server")})
	var all crowd
	a, stop := newCandidate(t, c, "a", &all)
	within30s(t, "a leads", func() bool { return a.at.Load() == 1 })
	c.setFail(func(string, string) error { return errors.New("connection refused") })
	within30s(t, "a leads no more", func() bool { return a.at.Load() == 0 && !a.lease.Leading() })
	c.setFail(nil)
	within30s(t, "a leads again", func() bool { return a.at.Load() == 1 && a.terms.Load() == 2 })
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// TestLeaseEndsBeforeLeading: a candidate that never led ends at once, and one that
// is not permitted says so once.
func TestLeaseEndsBeforeLeading(t *testing.T) {
	c := newCluster(t)
	c.setFail(func(string, string) error {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "leases"}, "castellan-server", errors.New("no"))
	})
	var log syncedLog
	l, err := kube.NewLease(c.client(), kube.LeaseConfig{Name: "castellan-server", Log: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	stop := startPart(t, l.Lead(func(context.Context) error { t.Error("leads"); return nil }))
	within30s(t, "a second attempt", func() bool { return c.count("get", "leases") > 1 })
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := strings.Count(log.String(), "the Lease cannot be had"); n != 1 {
		t.Errorf("told %d times\n%s", n, log.String())
	}
}

// TestPartThatFails ends the server, as any part does.
func TestPartThatFails(t *testing.T) {
	c := newCluster(t, &coordinationv1.Lease{ObjectMeta: named("castellan-server")})
	l, err := kube.NewLease(c.client(), kube.LeaseConfig{Name: "castellan-server"})
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := l.Lead(func(context.Context) error { return broken })(t.Context()); !errors.Is(err, broken) {
		t.Error(err)
	}
}
