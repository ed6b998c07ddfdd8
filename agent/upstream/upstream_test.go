package upstream_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
	"castellan.dev/agent/upstream"
	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/xds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// follower is a running one with all that it needs.
type follower struct {
	*upstream.Follower
	t       *testing.T
	server  *agenttest.Server
	rotator *svid.Rotator
	own     *svid.Source
	log     *safeBuffer
	stop    func()
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func follow(t *testing.T, s *agenttest.Server) *follower {
	t.Helper()
	f := &follower{t: t, server: s, log: &safeBuffer{}}
	td := spiffeid.RequireTrustDomainFromString(agenttest.TrustDomain)
	token := caclient.CredentialFile(s.TokenFile(agenttest.AgentAccount, "agent-uid"))
	client, err := caclient.New(caclient.Config{Address: s.Addr(), Name: "127.0.0.1", BundleFile: s.BundleFile, AgentToken: token, TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	if f.rotator, err = svid.NewRotator(svid.Config{Issuer: client, TrustDomain: td}); err != nil {
		t.Fatal(err)
	}
	f.own = f.rotator.Add(svid.Identity{Token: token})
	f.Follower, err = upstream.New(upstream.Config{
		Client: client, Own: f.own, Renew: func() { f.rotator.Renew(f.own) }, Reached: f.rotator.Retry, Trust: f.rotator,
		TrustDomain: td, Node: "local", Log: slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = f.rotator.Run(ctx) })
	wg.Go(func() {
		if err := f.Run(ctx); err != nil {
			t.Errorf("follower: %v", err)
		}
	})
	f.stop = sync.OnceFunc(func() { cancel(); wg.Wait(); client.Close() })
	t.Cleanup(f.stop)
	return f
}

func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// shows waits until a view has exactly these resources of a type.
func shows(t *testing.T, v *upstream.View, url string, want ...string) {
	t.Helper()
	eventually(t, func() error {
		got, _ := v.Resources(url)
		if got == nil || !slices.Equal(slices.Sorted(maps.Keys(got)), want) {
			return fmt.Errorf("shows %v, want %v", slices.Sorted(maps.Keys(got)), want)
		}
		return nil
	})
}

func resource(t *testing.T, name string, m *castellanv1.WorkloadPolicy) xds.Resource {
	t.Helper()
	r, err := xds.NewResource(name, m)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestViewsShowOnePodsPolicy(t *testing.T) {
	s := agenttest.New(t)
	s.Table.Set(upstream.TypeWorkloadPolicy, xds.NewSnapshot(
		resource(t, "uid-1", &castellanv1.WorkloadPolicy{Namespace: "a"}), resource(t, "uid-2", &castellanv1.WorkloadPolicy{Namespace: "b"})))
	f := follow(t, s)
	v := f.View()
	defer v.Close()
	eventually(t, func() error {
		if !f.Synced() || !f.Connected() {
			return fmt.Errorf("not synced")
		}
		return nil
	})
	if got, changed := v.Resources(upstream.TypeWorkloadPolicy); got != nil || changed == nil {
		t.Errorf("before the pod is known: %v", got)
	}
	v.SetPod("uid-1")
	shows(t, v, upstream.TypeWorkloadPolicy, "uid-1")
	v.SetPod("uid-2")
	shows(t, v, upstream.TypeWorkloadPolicy, "uid-2")
	v.SetPod("uid-3") // no policy of it: nothing, and the stream's client is told so
	shows(t, v, upstream.TypeWorkloadPolicy)
	if got, changed := v.Resources("type.googleapis.com/something.Else"); got != nil || changed != nil {
		t.Error("a type that is not served is shown")
	}
}

func TestResourcesRefusedKeepTheLastGood(t *testing.T) {
	s := agenttest.New(t)
	s.Publish("shop/orders", &castellanv1.ServiceIdentity{Namespace: "shop", Name: "orders"})
	f := follow(t, s)
	v := f.View()
	defer v.Close()
	shows(t, v, upstream.TypeServiceIdentity, "shop/orders")
	shows(t, v, upstream.TypeBundle, agenttest.TrustDomain)
	for _, test := range []struct {
		name     string
		resource func() xds.Resource
		want     string
	}{
		{"garbage", func() xds.Resource {
			return xds.Resource{Name: "shop/x", Version: "1", Body: &anypb.Any{TypeUrl: upstream.TypeServiceIdentity, Value: []byte{0xff}}}
		}, `resource "shop/x" is not a type.googleapis.com/castellan.v1.ServiceIdentity`},
		{"another type", func() xds.Resource {
			return xds.Resource{Name: "default", Version: "1", Body: &anypb.Any{TypeUrl: upstream.TypeBundle}}
		}, `resource "default" is of type "type.googleapis.com/castellan.v1.Bundle"`},
		{"a bundle under another name", func() xds.Resource {
			r, err := xds.NewResource("other.example", &castellanv1.Bundle{TrustDomain: agenttest.TrustDomain})
			if err != nil {
				t.Fatal(err)
			}
			return r
		}, `bundle "other.example" is of trust domain "cluster.local"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			url := upstream.TypeServiceIdentity
			switch test.name {
			case "another type":
				url = upstream.TypeDenylist
			case "a bundle under another name":
				url = upstream.TypeBundle
			}
			before, _ := s.Table.Resources(url)
			next := maps.Clone(before)
			r := test.resource()
			next[r.Name] = r
			s.Table.Set(url, next)
			eventually(t, func() error {
				if !strings.Contains(strings.ReplaceAll(f.log.String(), `\`, ""), test.want) { // less slog's quoting
					return fmt.Errorf("not refused")
				}
				return nil
			})
			if got, _ := v.Resources(url); got[r.Name].Version != "" {
				t.Error("it is shown")
			}
			s.Table.Set(url, before)
		})
	}
	shows(t, v, upstream.TypeServiceIdentity, "shop/orders")
}

func TestBundlesThatGo(t *testing.T) {
	s := agenttest.New(t)
	f := follow(t, s)
	v := f.View()
	defer v.Close()
	own, _ := s.Table.Resources(upstream.TypeBundle)
	foreign, err := xds.NewResource("other.example", &castellanv1.Bundle{TrustDomain: "other.example", X509Authorities: [][]byte{agenttest.NewAuthority(t, "o").Root.Raw}})
	if err != nil {
		t.Fatal(err)
	}
	both := maps.Clone(own)
	both["other.example"] = foreign
	s.Table.Set(upstream.TypeBundle, both)
	shows(t, v, upstream.TypeBundle, agenttest.TrustDomain, "other.example")
	s.Table.Set(upstream.TypeBundle, xds.Snapshot{})
	// A foreign trust domain goes; our own stays.
	shows(t, v, upstream.TypeBundle, agenttest.TrustDomain)
	if trust := f.rotator.Trust(); trust == nil || len(trust.Federated) != 0 || len(trust.Own.X509) != 1 {
		t.Errorf("trust: %+v", trust)
	}
}

func TestReports(t *testing.T) {
	s := agenttest.New(t)
	f := follow(t, s)
	w := f.Reports.Workload(f.own)
	observer, end := w.Stream("ads")
	observer.(xds.NodeObserver).Node("proxy")
	many := map[string]string{}
	for n := range 1500 {
		many[fmt.Sprintf("shop/s%04d", n)] = "v1"
	}
	observer.Acked(upstream.TypeServiceIdentity, many)
	observer.Acked(upstream.TypeWorkloadPolicy, map[string]string{"uid": "v1", "gone": "v1"})
	observer.Nacked(upstream.TypeWorkloadPolicy, map[string]string{"uid": "v2"}, strings.Repeat("x", 5000))
	observer.Acked(upstream.TypeWorkloadPolicy, map[string]string{"gone": ""})

	last := func() *castellanv1.StreamReport {
		reports := s.Reports()
		if len(reports) == 0 || len(reports[len(reports)-1].GetWorkloads()) == 0 || len(reports[len(reports)-1].GetWorkloads()[0].GetStreams()) == 0 {
			return nil
		}
		return reports[len(reports)-1].GetWorkloads()[0].GetStreams()[0]
	}
	eventually(t, func() error {
		if r := last(); r == nil || len(r.GetResources()) < 1000 {
			return fmt.Errorf("not reported")
		}
		return nil
	})
	r := last()
	first := r.GetResources()[0]
	if r.GetClient() != "ads:proxy" || len(r.GetResources()) != 1000 {
		t.Errorf("client %q with %d resources, want 1000", r.GetClient(), len(r.GetResources()))
	}
	if first.GetName() != "uid" || first.GetAcked() != "v1" || first.GetNacked() != "v2" || len(first.GetReason()) != 1024 {
		t.Errorf("first is %s acked %q nacked %q", first.GetName(), first.GetAcked(), first.GetNacked())
	}
	if slices.ContainsFunc(r.GetResources(), func(r *castellanv1.ResourceReport) bool { return r.GetName() == "gone" }) {
		t.Error("what is gone is reported")
	}

	t.Run("an acknowledgement ends the refusal", func(t *testing.T) {
		acked := time.Now()
		observer.Acked(upstream.TypeWorkloadPolicy, map[string]string{"uid": "v3"})
		eventually(t, func() error {
			for _, r := range last().GetResources() {
				if r.GetName() == "uid" && r.GetAcked() == "v3" && r.GetNacked() == "" && r.GetReason() == "" {
					return nil
				}
			}
			return fmt.Errorf("not reported")
		})
		t.Logf("reported after %v", time.Since(acked))
	})
	t.Run("a burst makes few reports", func(t *testing.T) {
		before := len(s.Reports())
		for n := range 500 {
			observer.Acked(upstream.TypeDenylist, map[string]string{"default": fmt.Sprint(n)})
		}
		eventually(t, func() error {
			for _, r := range last().GetResources() {
				if r.GetName() == "default" && r.GetAcked() == "499" {
					return nil
				}
			}
			return fmt.Errorf("not reported")
		})
		if n := len(s.Reports()) - before; n > 5 {
			t.Errorf("%d reports for one burst", n)
		}
	})
	t.Run("what could not be sent is sent when the server is back", func(t *testing.T) {
		s.Stop()
		end()
		eventually(t, func() error {
			if !strings.Contains(f.log.String(), "report not sent") {
				return fmt.Errorf("not tried")
			}
			return nil
		})
		s.Start()
		eventually(t, func() error {
			if last() != nil {
				return fmt.Errorf("the stream that ended is still reported")
			}
			return nil
		})
	})
	w.Close()
}

func TestNoWorkloadMakesTheReportTooLarge(t *testing.T) {
	s := agenttest.New(t)
	f := follow(t, s)
	greedy := f.Reports.Workload(f.own)
	reason := strings.Repeat("x", 1024)
	for n := range 200 {
		o, end := greedy.Stream("ads")
		t.Cleanup(end)
		o.(xds.NodeObserver).Node(fmt.Sprintf("client-%03d", n))
		versions := map[string]string{}
		for m := range 500 {
			versions[fmt.Sprintf("shop/s%04d", m)] = "v1"
		}
		o.Acked(upstream.TypeServiceIdentity, versions)
		if n%2 == 0 {
			o.Nacked(upstream.TypeServiceIdentity, versions, reason)
		}
	}
	// Reports of 30 such workloads are still one that the server takes.
	for range 29 {
		w := f.Reports.Workload(f.own)
		for n := range 40 {
			o, end := w.Stream("ads")
			t.Cleanup(end)
			versions := map[string]string{}
			for m := range 100 {
				versions[fmt.Sprintf("shop/s%04d", m)] = "v1"
			}
			o.(xds.NodeObserver).Node(fmt.Sprint(n))
			o.Nacked(upstream.TypeServiceIdentity, versions, reason)
		}
	}
	eventually(t, func() error {
		reports := s.Reports()
		if len(reports) == 0 || len(reports[len(reports)-1].GetWorkloads()) != 30 {
			return fmt.Errorf("not reported")
		}
		r := reports[len(reports)-1]
		if size := proto.Size(r); size > 4<<20 {
			t.Fatalf("a report of %d bytes, the server takes 4 MiB", size)
		}
		for _, w := range r.GetWorkloads() {
			resources := 0
			for _, st := range w.GetStreams() {
				resources += len(st.GetResources())
			}
			if len(w.GetStreams()) > 64 || resources > 10_000 {
				t.Fatalf("%d streams with %d resources, the server takes 64 with 10000", len(w.GetStreams()), resources)
			}
		}
		if last := r.GetWorkloads()[29].GetStreams(); len(last) == 0 {
			return fmt.Errorf("a workload is not heard")
		}
		return nil
	})
}

func TestARootsFileThatChangesEndsTheStream(t *testing.T) {
	s := agenttest.New(t)
	f := follow(t, s)
	eventually(t, func() error {
		if !f.Connected() {
			return fmt.Errorf("not connected")
		}
		return nil
	})
	streams := s.Streams()
	next := agenttest.NewAuthority(t, "next")
	s.Serve(next)
	s.WriteBundle(next.Root)
	eventually(t, func() error {
		if s.Streams() == streams || !f.Connected() {
			return fmt.Errorf("still the old stream")
		}
		return nil
	})
}
