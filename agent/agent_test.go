package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/agenttest"
)

func TestGoSpiffeWorksUnchanged(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account, "shop/frontend"))
	ctx := t.Context()

	t.Run("X509Source", func(t *testing.T) {
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(n.socket(0))))
		if err != nil {
			t.Fatal(err)
		}
		defer source.Close()
		got, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if got.ID.String() != agenttest.ID(account) || got.Hint != account {
			t.Errorf("got %q hint %q", got.ID, got.Hint)
		}
		if _, _, err := x509svid.Verify(got.Certificates, source); err != nil {
			t.Errorf("chain does not verify: %v", err)
		}
	})
	t.Run("JWTSource and ValidateJWTSVID", func(t *testing.T) {
		source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(n.socket(0))))
		if err != nil {
			t.Fatal(err)
		}
		defer source.Close()
		svid, err := source.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "payments"})
		if err != nil {
			t.Fatal(err)
		}
		if svid.ID.String() != agenttest.ID(account) {
			t.Errorf("JWT-SVID of %q", svid.ID)
		}
		if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"payments"}); err != nil {
			t.Errorf("go-spiffe refuses it: %v", err)
		}
		// Another workload's agent socket validates it too.
		got, err := n.spiffe(1).ValidateJWTSVID(ctx, svid.Marshal(), "payments")
		if err != nil || got.ID != svid.ID {
			t.Errorf("ValidateJWTSVID: %v %v", got, err)
		}
	})
	t.Run("bundles", func(t *testing.T) {
		c := n.spiffe(0)
		var x *x509bundle.Set
		var j *jwtbundle.Set
		var err error
		if x, err = c.FetchX509Bundles(ctx); err != nil || x.Len() != 1 {
			t.Fatalf("X.509 bundles: %v %v", x, err)
		}
		if j, err = c.FetchJWTBundles(ctx); err != nil || j.Len() != 1 {
			t.Fatalf("JWT bundles: %v %v", j, err)
		}
		if keys := j.Bundles()[0].JWTAuthorities(); len(keys) != 1 {
			t.Errorf("%d JWT authorities, want the one with use jwt-svid", len(keys))
		}
	})
	t.Run("health and reflection", func(t *testing.T) {
		conn := n.dial(0)
		for _, service := range []string{"", "SpiffeWorkloadAPI", "envoy.service.secret.v3.SecretDiscoveryService"} {
			eventually(t, func() error {
				resp, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{Service: service})
				if err == nil && resp.GetStatus() != healthv1.HealthCheckResponse_SERVING {
					err = fmt.Errorf("%q is %s", service, resp.GetStatus())
				}
				return err
			})
		}
		stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil || !strings.Contains(resp.String(), "SpiffeWorkloadAPI") {
			t.Errorf("reflection: %v %v", resp, err)
		}
	})
	n.ready()
	for _, secret := range []string{"PRIVATE KEY", agenttest.Token(account, "uid-orders")[:60]} {
		if strings.Contains(n.logs.String(), secret) {
			t.Errorf("log holds a secret (%s)", secret[:10])
		}
	}
}

// watcher records every update of a Workload API stream.
type watcher struct {
	updates chan *workloadapi.X509Context
	errs    chan error
}

func watch(t *testing.T, n *node, i int) *watcher {
	t.Helper()
	w := &watcher{updates: make(chan *workloadapi.X509Context, 1000), errs: make(chan error, 1000)}
	ctx, cancel := context.WithCancel(t.Context())
	c := n.spiffe(i)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.WatchX509Context(ctx, w)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return w
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.updates <- c }

func (w *watcher) OnX509ContextWatchError(err error) { w.errs <- err }

func (w *watcher) next(t *testing.T) *workloadapi.X509Context {
	t.Helper()
	select {
	case c := <-w.updates:
		return c
	case <-time.After(20 * time.Second):
		t.Fatal("no update in 20 s")
		return nil
	}
}

func TestRotationReachesEveryOpenStreamWithoutAGap(t *testing.T) {
	s := agenttest.New(t)
	s.Set(func(k *agenttest.Knobs) { k.TTL = 2 * time.Second })
	n := start(t, s, configure(t, s, account))
	streams := []*watcher{watch(t, n, 0), watch(t, n, 0), watch(t, n, 0)}
	var last []string
	for range 4 {
		var serials []string
		for _, w := range streams {
			c := w.next(t)
			leaf := c.DefaultSVID().Certificates[0]
			if left := time.Until(leaf.NotAfter); left <= 0 {
				t.Errorf("served a certificate that expired %v ago", -left)
			}
			serials = append(serials, leaf.SerialNumber.String())
		}
		if serials[0] != serials[1] || serials[1] != serials[2] {
			t.Errorf("streams were sent different certificates: %v", serials)
		}
		last = append(last, serials[0])
	}
	for i := 1; i < len(last); i++ {
		if last[i] == last[i-1] {
			t.Errorf("the same certificate twice")
		}
	}
	for _, w := range streams {
		select {
		case err := <-w.errs:
			t.Errorf("stream broke: %v", err)
		default:
		}
	}
	if got := s.MaxInFlight("CreateCertificate", account); got != 1 {
		t.Errorf("%d requests in flight for one identity", got)
	}
	eventually(t, func() error { // the client may be told before the metric is
		if got := n.metric("castellan_agent_push_seconds", "workloadapi"); got < 9 {
			return fmt.Errorf("%v pushes measured", got)
		}
		return nil
	})
}

func TestServerAway(t *testing.T) {
	s := agenttest.New(t)
	s.Set(func(k *agenttest.Knobs) { k.TTL = 4 * time.Second })
	n := start(t, s, configure(t, s, account))
	w := watch(t, n, 0)
	first := w.next(t).DefaultSVID()
	s.Stop()

	t.Run("what is valid is served until it expires, to new streams too", func(t *testing.T) {
		got, err := n.spiffe(0).FetchX509SVID(t.Context())
		if err != nil || got.ID != first.ID {
			t.Fatalf("%v %v", got, err)
		}
	})
	t.Run("then it is withdrawn", func(t *testing.T) {
		var err error
		for err == nil {
			select {
			case c := <-w.updates: // a renewal may have been under way
				first = c.DefaultSVID()
			case err = <-w.errs:
			case <-time.After(20 * time.Second):
				t.Fatal("not withdrawn in 20 s")
			}
		}
		if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "no identity issued") {
			t.Errorf("stream ended with %v", err)
		}
		if left := time.Until(first.Certificates[0].NotAfter); left > 0 {
			t.Errorf("withdrawn %v before it expired", left)
		}
	})
	t.Run("and given again when the server is back", func(t *testing.T) {
		s.Start()
		if left := time.Until(w.next(t).DefaultSVID().Certificates[0].NotAfter); left <= 0 {
			t.Error("an expired certificate")
		}
	})
}

func TestServerRefuses(t *testing.T) {
	s := agenttest.New(t)
	s.Set(func(k *agenttest.Knobs) { k.TTL = 3 * time.Second })
	n := start(t, s, configure(t, s, account))
	w := watch(t, n, 0)
	last := w.next(t).DefaultSVID()
	s.Set(func(k *agenttest.Knobs) {
		k.Before = func(_ context.Context, a string) error {
			if a == account {
				return status.Error(codes.PermissionDenied, "pod is gone")
			}
			return nil
		}
	})
	for {
		select {
		case c := <-w.updates:
			last = c.DefaultSVID()
			continue
		case err := <-w.errs:
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("got %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("not withdrawn in 20 s")
		}
		break
	}
	if left := time.Until(last.Certificates[0].NotAfter); left > 0 {
		t.Errorf("withdrawn %v before it expired", left)
	}
	// A refused workload does not make the agent unready, and the others go on.
	n.ready()
	if n.metric("castellan_agent_rotations_total", "refused") == 0 {
		t.Error("refusals are not counted")
	}
}

func TestBeforeTheFirstCertificate(t *testing.T) {
	s := agenttest.New(t)
	s.Stop()
	n := start(t, s, configure(t, s, account))
	ctx := withHeader(t.Context())
	_, err := n.spiffe(0).FetchX509SVID(ctx)
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	if err := n.agent.Checks()["identity"](); err == nil || err.Error() != "certificate starting, last attempt: unreachable" {
		t.Errorf("readiness: %v", err)
	}
	w := watch(t, n, 0)
	s.Start()
	if got := w.next(t).DefaultSVID().ID.String(); got != agenttest.ID(account) {
		t.Errorf("got %q", got)
	}
	n.ready()
}

func TestRestart(t *testing.T) {
	s := agenttest.New(t)
	cfg := configure(t, s, account)
	n := start(t, s, cfg)
	w := watch(t, n, 0)
	before := w.next(t).DefaultSVID()
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(cfg.Workloads[0].Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket left behind: %v", err)
	}
	if err := <-w.errs; status.Code(err) != codes.Unavailable {
		t.Errorf("streams end with %v, want Unavailable", err)
	}
	start(t, s, cfg)
	after := w.next(t).DefaultSVID()
	if after.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) == 0 {
		t.Error("the same certificate after a restart: was the key on disk?")
	}
}

func TestSocketsInUse(t *testing.T) {
	s := agenttest.New(t)
	cfg := configure(t, s, account, "shop/frontend")
	first := start(t, s, cfg)
	first.ready()
	second := start(t, s, cfg)
	if err := second.stop(); err == nil || !strings.Contains(err.Error(), "is in use by a live process; stop it, or choose another path") {
		t.Errorf("got %v", err)
	}
	second.stop = func() error { return nil }
	if _, err := first.spiffe(1).FetchX509SVID(t.Context()); err != nil {
		t.Errorf("the first agent lost its socket: %v", err)
	}
}
