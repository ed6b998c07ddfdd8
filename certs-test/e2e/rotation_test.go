package e2e_test

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// serials collects what one Workload API stream was given.
type serials struct {
	mu   sync.Mutex
	seen []string
}

func (s *serials) OnX509ContextUpdate(c *workloadapi.X509Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, fmt.Sprintf("%x", c.DefaultSVID().Certificates[0].SerialNumber))
}

func (s *serials) OnX509ContextWatchError(error) {}

func (s *serials) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.seen)
}

// load asks without pause until stop, and counts what is not 200.
func (m *mesh) load(callers int) (stop func() (requests, failed int64, first string)) {
	var requests, failed atomic.Int64
	var first atomic.Value
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for ctx.Err() == nil {
				code, body, err := m.ask("shop/frontend", "orders", "GET", "/")
				requests.Add(1)
				if err != nil || code != 200 {
					failed.Add(1)
					first.CompareAndSwap(nil, fmt.Sprintf("%d %q %v", code, body, err))
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	return func() (int64, int64, string) {
		cancel()
		wg.Wait()
		what, _ := first.Load().(string)
		return requests.Load(), failed.Load(), what
	}
}

// TestRotationUnderLoad: with 10-second leaves, several rotations pass and no
// request fails; every stream is given each new certificate.
func TestRotationUnderLoad(t *testing.T) {
	m := start(t, shortDir(t), "--svid-ttl", "10s")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	streams := make([]*serials, 10)
	for i := range streams {
		streams[i] = &serials{}
		wg.Go(func() {
			_ = workloadapi.WatchX509Context(ctx, streams[i], workloadapi.WithAddr("unix://"+m.file().Workloads["shop/orders"].Socket))
		})
	}
	stop := m.load(4)
	for i, s := range streams {
		eventually(t, fmt.Sprintf("stream %d sees four certificates", i), func() error {
			if n := s.count(); n < 4 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
	}
	requests, failed, first := stop()
	cancel()
	wg.Wait()
	if failed > 0 || requests == 0 {
		t.Errorf("%d of %d requests failed, first: %s", failed, requests, first)
	}
}

// TestServerAway: a server that does not answer takes nothing down that is valid.
func TestServerAway(t *testing.T) {
	m := start(t, shortDir(t))
	pid := m.file().Server.PID
	stop := m.load(2)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			_ = syscall.Kill(pid, syscall.SIGCONT)
		}
	}
	defer resume()
	// A client that starts now is served all the same, from what the agent holds.
	castellan(t, "cert", "inspect", "unix:"+m.file().Workloads["shop/orders"].Socket).want(t, 0, "sa/orders")
	// A proxy that starts now gets its certificate and its policy from the agent.
	proxy := m.file().Workloads["shop/orders"].PID
	requests, failed, first := stop()
	if failed > 0 || requests == 0 {
		t.Errorf("%d of %d requests failed, first: %s", failed, requests, first)
	}
	if err := syscall.Kill(proxy, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.wantStatus("shop/frontend", "orders", "GET", "/", 200)
	m.wantStatus("guest/intruder", "orders", "GET", "/", 403)
	resume()
	eventually(t, "the server is ready again", func() error { return ready(m.file().Server.HTTP) })
}

// TestAgentRestart: a restarted agent serves at once, and streams come back by
// themselves with no request failing for want of a certificate.
func TestAgentRestart(t *testing.T) {
	m := start(t, shortDir(t))
	stop := m.load(2)
	s := &serials{}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = workloadapi.WatchX509Context(ctx, s, workloadapi.WithAddr("unix://"+m.file().Workloads["shop/orders"].Socket))
	}()
	eventually(t, "a certificate", func() error {
		if s.count() == 0 {
			return fmt.Errorf("none")
		}
		return nil
	})
	before := s.count()
	if err := syscall.Kill(m.file().Agent.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stream is served again", func() error {
		if s.count() == before {
			return fmt.Errorf("nothing yet")
		}
		return nil
	})
	requests, failed, first := stop()
	cancel()
	<-done
	if failed > 0 || requests == 0 {
		t.Errorf("%d of %d requests failed, first: %s", failed, requests, first)
	}
}

// TestStateIsPrivate: keys and tokens are their owner's alone.
func TestStateIsPrivate(t *testing.T) {
	m := start(t, shortDir(t))
	for _, p := range []string{"server", "issuer", "tokens"} {
		st, err := os.Stat(m.path(p))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", p, st.Mode())
		}
	}
	for _, p := range []string{"issuer/workloads.key", "issuer/users.key", "tokens/agent", "tokens/shop.orders"} {
		st, err := os.Stat(m.path(p))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", p, st.Mode())
		}
	}
}
