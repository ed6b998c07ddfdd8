package proxy_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"castellan.dev/internal/config"
	"castellan.dev/internal/tlsconf/tlsconftest"
	"castellan.dev/proxy"
)

func limit(change func(*config.ProxyLimits)) option {
	return func(c *config.Proxy) { change(&c.Limits) }
}

func drainIn(d time.Duration) option {
	return func(c *config.Proxy) { c.DrainTimeout = config.Duration(d) }
}

// gate is an application whose answers wait until they are let go.
type gate struct {
	addr    string
	arrived chan struct{}
	open    chan struct{}
}

func newGate(t testing.TB) *gate {
	g := &gate{arrived: make(chan struct{}, 100), open: make(chan struct{})}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.arrived <- struct{}{}
		select {
		case <-g.open:
		case <-r.Context().Done():
		}
		_, _ = io.WriteString(w, "done")
	}))
	t.Cleanup(s.Close)
	g.addr = s.Listener.Addr().String()
	return g
}

func TestDrainLetsRequestsEnd(t *testing.T) {
	g := newGate(t)
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Publish(strict)
	r := start(t, a, g.addr, drainIn(patience)).ready()
	cert := a.Issuer.Leaf(t, frontend)
	busy := dialTLS(t, r.inbound, cert, "http/1.1")
	idle := dialTLS(t, r.inbound, cert, "http/1.1")
	_, _ = io.WriteString(busy.conn, "GET / HTTP/1.1\r\nHost: orders\r\n\r\n")
	<-g.arrived

	stopped := make(chan error, 1)
	go func() { stopped <- r.stop() }()
	eventually(t, "draining", func() bool { return r.CheckDraining() != nil })
	idle.closed()
	eventually(t, "no more accepted", func() bool {
		c, err := net.Dial("tcp", r.inbound)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(g.open)
	resp, err := http.ReadResponse(busy.r, nil)
	if err != nil {
		t.Fatalf("the request under way was lost: %v", err)
	}
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 200 || string(body) != "done" {
		t.Fatalf("%d %q", resp.StatusCode, body)
	}
	busy.closed()
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(r.access.String(), `"status":200`) {
		t.Fatal("the last request is not in the log")
	}
}

func TestDrainIsBounded(t *testing.T) {
	g := newGate(t)
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Publish(strict)
	r := start(t, a, g.addr, drainIn(50*time.Millisecond)).ready()
	busy := dialTLS(t, r.inbound, a.Issuer.Leaf(t, frontend), "http/1.1")
	_, _ = io.WriteString(busy.conn, "GET / HTTP/1.1\r\nHost: orders\r\n\r\n")
	<-g.arrived
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	busy.closed()
}

func TestDrainEndsTCP(t *testing.T) {
	r, ca := tcpMesh(t, strict, drainIn(50*time.Millisecond))
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio")
	live.echo("x")
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	live.closed()
	if !strings.Contains(r.access.String(), `"protocol":"TCP"`) {
		t.Fatal("the connection is not in the log")
	}
}

// The agent going away and coming back disturbs nothing; what it then has to say counts.
func TestAgentRestart(t *testing.T) {
	r, ca := mesh(t, strict+frontendMayGet)
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1")
	live.mustGet(200)
	r.agent.Stop()
	live.mustGet(200)
	dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1").mustGet(200)
	r.agent.Serve()
	defer r.agent.Stop()
	r.agent.Publish(strict + strings.Replace(frontendMayGet, "sa/frontend", "sa/payments", 1))
	eventually(t, "new policy after the restart", func() bool {
		// Anew each time: a request that is in flight at that moment ends with its connection.
		resp, err := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1").get()
		return err == nil && resp.StatusCode == 403
	})
}

// A certificate that would not be accepted is refused, and the last good one stays.
func TestBadCertificateIsRefused(t *testing.T) {
	r, ca := mesh(t, strict)
	for name, bad := range map[string]*tls.Certificate{
		"expired":          ca.Leaf(t, orders, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }),
		"not a workload's": ca.Leaf(t, orders, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"x.example"} }),
	} {
		good := r.agent.Issuer.Leaf(t, orders)
		_ = good
		r.agent.Secrets(bad, r.agent.Root)
		eventually(t, name+" refused", func() bool {
			for _, rec := range r.agent.Recorder.Records() {
				if rec.TypeURL == secretType && rec.Nacked != "" {
					return true
				}
			}
			return false
		})
		dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1").mustGet(200)
		r.agent.Secrets(ca.Leaf(t, orders), r.agent.Root)
		r.agent.Settled()
	}
}

func TestConnectionLimits(t *testing.T) {
	r, ca := mesh(t, strict, limit(func(l *config.ProxyLimits) { l.MaxConnections, l.MaxPerSource = 2, 2 }))
	cert := ca.Leaf(t, frontend)
	first, second := dialTLS(t, r.inbound, cert, "http/1.1"), dialTLS(t, r.inbound, cert, "http/1.1")
	first.mustGet(200)
	second.mustGet(200)
	if c, err := tls.Dial("tcp", r.inbound, clientTLS(cert)); err == nil {
		c.Close()
		t.Fatal("a third connection was taken")
	}
	first.conn.Close()
	eventually(t, "a place is free again", func() bool {
		c, err := tls.Dial("tcp", r.inbound, clientTLS(cert))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	if n := r.metric("castellan_proxy_connections_refused_total"); n == 0 {
		t.Fatal("refusals were not counted")
	}
}

// Clients that never finish a handshake hold neither a place nor the others up for long.
func TestHandshakeLimits(t *testing.T) {
	r, ca := mesh(t, strict, limit(func(l *config.ProxyLimits) {
		l.MaxHandshakes, l.HandshakeTimeout = 1, config.Duration(200*time.Millisecond)
	}))
	var silent []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", r.inbound)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	for _, c := range silent {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.ReadAll(c); err != nil {
			t.Fatalf("a silent client was kept: %v", err)
		}
	}
	eventually(t, "served again", func() bool {
		c, err := tls.Dial("tcp", r.inbound, clientTLS(ca.Leaf(t, frontend), "http/1.1"))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func TestHeaderLimit(t *testing.T) {
	r, ca := mesh(t, strict)
	s := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1")
	go func() {
		_, _ = fmt.Fprintf(s.conn, "GET / HTTP/1.1\r\nHost: orders\r\nX-Big: %s\r\n\r\n", strings.Repeat("x", 40<<10))
	}()
	resp, err := http.ReadResponse(bufio.NewReader(s.conn), nil)
	if err != nil || resp.StatusCode != 431 {
		t.Fatalf("%v, %v", resp, err)
	}
}

// One listener that cannot be opened opens none.
func TestListenIsAllOrNothing(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	cfg := config.Proxy{AgentSocket: a.Socket, Inbound: []config.Inbound{{Listen: "127.0.0.1:0", App: "127.0.0.1:1"}, {Listen: taken.Addr().String(), App: "127.0.0.1:1"}}}
	r := &running{t: t}
	r.Proxy, err = newProxy(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Listen(); err == nil || !strings.HasPrefix(err.Error(), "proxy: inbound listener: listen tcp") || len(r.Addrs()) != 0 {
		t.Fatalf("err %v, %v open", err, r.Addrs())
	}
}

// Requests go on unharmed while certificates rotate below them, on both sides.
func TestRotationUnderLoad(t *testing.T) {
	p := newPair(t, "http", newApp(t))
	stop := make(chan struct{})
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			c, _ := httpClient(t, nil)
			for {
				select {
				case <-stop:
					return
				default:
				}
				resp, err := c.Post("http://"+p.frontend.outbound[0]+"/", "text/plain", strings.NewReader("payload"))
				if err != nil {
					t.Errorf("request failed: %v", err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode != 200 {
					t.Errorf("request failed: %d", resp.StatusCode)
					return
				}
			}
		})
	}
	for range 20 {
		short := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Second) }
		p.orders.agent.Secrets(p.orders.agent.Issuer.Leaf(t, orders, short), p.root)
		p.frontend.agent.Secrets(p.frontend.agent.Issuer.Leaf(t, frontend, short), p.root)
		p.orders.agent.Settled()
		p.frontend.agent.Settled()
	}
	close(stop)
	workers.Wait()
}

func newProxy(cfg config.Proxy) (*proxy.Proxy, error) {
	return proxy.New(proxy.Config{Proxy: cfg, Registerer: newRegistry()})
}
