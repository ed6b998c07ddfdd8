package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// openLive opens one gRPC stream, one WebSocket and two TCP connections and keeps
// talking on them. What it returns asserts that none of them noticed anything
// while both sides' certificates were renewed several times and the first ones expired.
func (a *appMesh) openLive(t *testing.T) func(*testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })

	stream, err := a.dialGRPC(t, frontend, onGRPC).FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ws, err := a.dialWebSocket(frontend, onHTTP)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.Close() })
	declared, undeclared := a.dialTCP(t, frontend, onTCP), a.dialTCP(t, frontend, onAnyTCP)

	var mu sync.Mutex
	pings, broken := map[string]int{}, map[string]error{}
	talk := func(name string, ping func() error) {
		wg.Go(func() {
			for ctx.Err() == nil {
				err := ping()
				mu.Lock()
				if err != nil && ctx.Err() == nil {
					broken[name] = err
					mu.Unlock()
					return
				}
				pings[name]++
				mu.Unlock()
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
	talk("grpc", func() error { return pingGRPC(stream, 100) })
	talk("websocket", func() error { return pingWebSocket(ws, "ping") })
	for name, c := range map[string]net.Conn{"tcp": declared, "tcp undeclared": undeclared} {
		talk(name, func() error {
			_ = c.SetDeadline(time.Now().Add(patience))
			return pingTCP(c, "\x00ping")
		})
	}
	watched := map[string]*serials{"shop/orders": {}, frontend: {}}
	for who, s := range watched {
		wg.Go(func() {
			_ = workloadapi.WatchX509Context(ctx, s, workloadapi.WithAddr("unix://"+a.file().Workloads[who].Socket))
		})
	}
	return func(t *testing.T) {
		for who, s := range watched {
			eventually(t, who+" has had four certificates", func() error {
				if n := s.count(); n < 4 {
					return fmt.Errorf("%d", n)
				}
				return nil
			})
		}
		mu.Lock()
		for name, err := range broken {
			t.Errorf("%s: %v after %d round trips", name, err, pings[name])
		}
		before := fmt.Sprint(pings)
		mu.Unlock()
		eventually(t, "all of them still talk", func() error {
			mu.Lock()
			defer mu.Unlock()
			for _, name := range []string{"grpc", "websocket", "tcp", "tcp undeclared"} {
				if pings[name] < 10 {
					return fmt.Errorf("%s: %d round trips", name, pings[name])
				}
			}
			if fmt.Sprint(pings) == before {
				return errors.New("nothing moves")
			}
			return nil
		})
		// They would hold up a drain.
		cancel()
		ws.Close()
		declared.Close()
		undeclared.Close()
	}
}

const denyClosed = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules: [{to: [{operation: {ports: ["9011", "9012"]}}]}]
`

// testPolicyCloses: a policy that would refuse them now closes the TCP connection
// and the WebSocket that are open, and no others.
func (a *appMesh) testPolicyCloses(t *testing.T) {
	tcp, other := a.dialTCP(t, frontend, onClosedTCP), a.dialTCP(t, frontend, onTCP)
	ws, err := a.dialWebSocket(frontend, onClosedHTTP)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	if err := errors.Join(pingTCP(tcp, "hello"), pingTCP(other, "hello"), pingWebSocket(ws, "hello")); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() { _, err := io.ReadAll(tcp); ended <- stillOpen("tcp", err) }()
	go func() {
		_ = ws.SetDeadline(time.Now().Add(patience))
		_, err := io.ReadAll(ws)
		ended <- stillOpen("websocket", err)
	}()
	a.write("70-closed.yaml", denyClosed)
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if err := pingTCP(other, "hello again"); err != nil {
		t.Errorf("a connection that the policy does not name: %v", err)
	}
	refusedTCP(t, a.dialTCP(t, frontend, onClosedTCP), "hello")
	if code, _, err := a.get(frontend, onClosedHTTP, "/headers"); err != nil || code != 403 {
		t.Errorf("%d %v", code, err)
	}
	// And it opens again.
	if err := os.Remove(filepath.Join(a.file().PolicyDir, "70-closed.yaml")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the port is open again", func() error {
		c, err := net.Dial("tcp", a.outbounds[frontend][onClosedTCP])
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		return pingTCP(c, "hello")
	})
}

// stillOpen: any end will do but that of our own patience.
func stillOpen(what string, err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the %s connection was not closed", what)
	}
	return nil
}

// testDrain: on SIGTERM nothing new is accepted, the request in flight gets its
// answer, and then the proxy ends by itself.
func (a *appMesh) testDrain(t *testing.T) {
	type answer struct {
		code int
		body string
		err  error
	}
	for name, slow := range map[string]func() answer{
		"receiver": func() answer {
			code, body, err := a.get(frontend, onHTTP, "/slow")
			return answer{code, body, err}
		},
		"receiver, http/2 from the caller": func() answer {
			h2c := &http.Transport{Protocols: &http.Protocols{}}
			h2c.Protocols.SetUnencryptedHTTP2(true)
			defer h2c.CloseIdleConnections()
			resp, err := (&http.Client{Transport: h2c, Timeout: patience}).Get(a.url(frontend, onHTTP, "/slow"))
			if err != nil {
				return answer{err: err}
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			return answer{resp.StatusCode, string(body), err}
		},
	} {
		result := make(chan answer, 1)
		go func() { result <- slow() }()
		select {
		case <-a.http.arrived:
		case <-time.After(patience):
			t.Fatalf("%s: the request does not arrive: %v", name, <-result)
		}
		a.receiver.signal(syscall.SIGTERM)
		eventually(t, name+" accepts no more", func() error {
			c, err := net.Dial("tcp", a.inbound[onHTTP])
			if err != nil {
				return nil
			}
			c.Close()
			return errors.New("it accepts")
		})
		if !a.receiver.alive() {
			t.Fatalf("%s: it did not wait for the request", name)
		}
		a.http.release <- struct{}{}
		if got := <-result; got.err != nil || got.code != 200 || got.body != "finished" {
			t.Errorf("%s: %+v", name, got)
		}
		if code := a.receiver.wait(t); code != 0 {
			t.Errorf("%s: exit code %d", name, code)
		}
		// The next one takes its place on the same ports.
		a.receiver = a.receive("receiver", a.inbound)
		a.settle()
	}
}
