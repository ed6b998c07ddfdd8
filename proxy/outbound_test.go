package proxy_test

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// pair is a frontend whose outbound listener leads to orders' inbound one.
type pair struct {
	root             *tlsconftest.CA
	frontend, orders *running
}

func newPair(t testing.TB, protocol, app string, options ...option) *pair {
	t.Helper()
	root := tlsconftest.NewRoot(t)
	server := newAgent(t, root, orders)
	server.Secrets(server.Issuer.Leaf(t, orders), root)
	server.Policy.Ports[0].Protocol = protocol
	server.Publish(strict)
	p := &pair{root: root, orders: start(t, server, app, options...).ready()}

	client := newAgent(t, root, frontend)
	client.Secrets(client.Issuer.Leaf(t, frontend), root)
	client.Publish(strict)
	client.Service("orders", protocol, []string{orders}, [2]string{p.orders.inbound, orders})
	p.frontend = start(t, client, newApp(t), append(options, outboundTo("shop/orders"))...).ready()
	return p
}

func plainGet(t testing.TB, url string) answer {
	t.Helper()
	c, _ := httpClient(t, nil)
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return ask(t, c, req)
}

func TestOutboundThroughBothProxies(t *testing.T) {
	p := newPair(t, "http", newApp(t))
	a := plainGet(t, "http://"+p.frontend.outbound[0]+"/a/b?c=d")
	if a.status != 200 || a.echo.Path != "/a/b" || a.echo.Query != "c=d" {
		t.Fatalf("%d %q", a.status, a.body)
	}
	if got := a.echo.Header.Get("X-Forwarded-Client-Cert"); !strings.HasSuffix(got, "URI="+frontend) {
		t.Fatalf("xfcc %q", got)
	}
	p.frontend.logged(`"direction":"outbound"`, `"destination":"shop/orders"`, `"peer":"`+orders+`"`, `"status":200`)
	p.orders.logged(`"direction":"inbound"`, `"peer":"`+frontend+`"`, `"status":200`)
}

// What a client of the mesh is asked for and told: Istio's SNI and ALPN.
func TestOutboundSNIAndALPN(t *testing.T) {
	for protocol, want := range map[string]string{"http": "istio-http/1.1", "tcp": "istio"} {
		root := tlsconftest.NewRoot(t)
		a := newAgent(t, root, frontend)
		a.Secrets(a.Issuer.Leaf(t, frontend), root)
		a.Publish(strict)
		hello := make(chan *tls.ClientHelloInfo, 10)
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
			Certificates: []tls.Certificate{*a.Issuer.Leaf(t, orders)}, ClientAuth: tls.RequireAnyClientCert,
			GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) { hello <- h; return nil, nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = c.(*tls.Conn).Handshake()
				c.Close()
			}
		}()
		a.Service("orders", protocol, []string{orders}, [2]string{l.Addr().String(), orders})
		r := start(t, a, newApp(t), outboundTo("shop/orders")).ready()
		c, err := net.Dial("tcp", r.outbound[0])
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: orders\r\n\r\n")
		select {
		case h := <-hello:
			if h.ServerName != "outbound_.80_._.orders.shop.svc.cluster.local" || h.SupportedProtos[0] != want {
				t.Errorf("%s: SNI %q, ALPN %q", protocol, h.ServerName, h.SupportedProtos)
			}
		case <-time.After(patience):
			t.Errorf("%s: nobody called", protocol)
		}
		c.Close()
		l.Close()
	}
}

func TestSecureNaming(t *testing.T) {
	tests := map[string]struct {
		// runs is who really answers, declared who the server says is there.
		runs, declared string
		expected       []string
		mesh           string
		status         int
		log            []string
	}{
		"authz-33 right": {runs: orders, declared: orders, expected: []string{orders}, status: 200},
		"authz-33 endpoint runs as another account": {
			runs: payments, declared: orders, expected: []string{orders}, status: 502,
			log: []string{"destination is not who is expected there", `"peer":"` + payments + `"`, orders},
		},
		"authz-33 of the service's set, but not the endpoint's own": {
			runs: payments, declared: orders, expected: []string{orders, payments}, status: 502,
			log: []string{"destination is not who is expected there", `"peer":"` + payments + `"`},
		},
		"authz-33 endpoint's own is not expected by the service": {
			runs: payments, declared: payments, expected: []string{orders}, status: 502,
			log: []string{"destination is not who is expected there", `"service_expects":["` + orders + `"]`},
		},
		"authz-33 empty expected set": {
			runs: orders, declared: orders, status: 502,
			log: []string{"destination is not who is expected there", `"peer":"` + orders + `"`},
		},
		"authz-33 nothing declared at all": {
			runs: orders, status: 502, log: []string{"destination is not who is expected there"},
		},
		"authz-33 declared by the service alone": {runs: orders, expected: []string{orders}, status: 200},
		"authz-33 prefix of the identity":        {runs: orders + "-evil", declared: orders, expected: []string{orders}, status: 502},
		"authz-33 same path in an alias": {
			runs: "spiffe://old.example/ns/shop/sa/orders", declared: orders, expected: []string{orders},
			mesh: `{"trustDomain":"cluster.local","trustDomainAliases":["old.example"]}`, status: 200,
		},
		"authz-33 same path in a trust domain that is no alias": {
			runs: "spiffe://other.example/ns/shop/sa/orders", declared: orders, expected: []string{orders}, status: 502,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			root := tlsconftest.NewRoot(t)
			a := newAgent(t, root, frontend)
			a.Secrets(a.Issuer.Leaf(t, frontend), root)
			if tt.mesh != "" {
				a.Policy.Mesh = []byte(tt.mesh)
			}
			a.Publish(strict)
			l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*a.Issuer.Leaf(t, tt.runs)}, ClientAuth: tls.RequireAnyClientCert})
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })}
			go func() { _ = server.Serve(l) }()
			t.Cleanup(func() { server.Close() })
			a.Service("orders", "http", tt.expected, [2]string{l.Addr().String(), tt.declared})
			r := start(t, a, newApp(t), outboundTo("shop/orders")).ready()
			got := plainGet(t, "http://"+r.outbound[0]+"/")
			if got.status != tt.status {
				t.Fatalf("%d %q", got.status, got.body)
			}
			if tt.status != 200 && strings.Contains(got.body, "spiffe") {
				t.Fatalf("the answer tells too much: %q", got.body)
			}
			if len(tt.log) > 0 {
				waitLine(t, r.log, tt.log...)
			}
		})
	}
}

func TestOutboundFailures(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, frontend)
	r := start(t, a, newApp(t), outboundTo("shop/orders", "shop/unknown"))
	if got := plainGet(t, "http://"+r.outbound[0]+"/"); got.status != 503 || got.body != "no identity yet\n" {
		t.Fatalf("without an identity: %d %q", got.status, got.body)
	}
	a.Secrets(a.Issuer.Leaf(t, frontend), root)
	a.Publish(strict)
	r.ready()
	if got := plainGet(t, "http://"+r.outbound[1]+"/"); got.status != 502 || got.body != "destination not available\n" {
		t.Fatalf("unknown destination: %d %q", got.status, got.body)
	}
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	a.Service("orders", "http", []string{orders}, [2]string{dead.Addr().String(), orders})
	eventually(t, "dead endpoint tried", func() bool { return plainGet(t, "http://"+r.outbound[0]+"/").status == 503 })
	r.logged(`"reason":"upstream_connect_failed"`, `"destination":"shop/orders"`)
	a.Service("orders", "http", []string{orders})
	eventually(t, "no endpoint", func() bool {
		plainGet(t, "http://"+r.outbound[0]+"/")
		return strings.Contains(r.access.String(), `"reason":"no_endpoint"`)
	})
}

// One endpoint is away: every request is answered by the other.
func TestOutboundRetriesAnotherEndpoint(t *testing.T) {
	p := newPair(t, "http", newApp(t))
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	p.frontend.agent.Service("orders", "http", []string{orders},
		[2]string{dead.Addr().String(), orders}, [2]string{p.orders.inbound, orders})
	p.frontend.agent.Settled()
	for range 20 {
		if got := plainGet(t, "http://"+p.frontend.outbound[0]+"/"); got.status != 200 {
			t.Fatalf("%d %q", got.status, got.body)
		}
	}
}

func TestOutboundSpreadsOverEndpoints(t *testing.T) {
	p := newPair(t, "http", newApp(t))
	second := newAgent(t, p.root, orders)
	second.Secrets(second.Issuer.Leaf(t, orders), p.root)
	second.Publish(strict)
	other := start(t, second, newApp(t)).ready()
	p.frontend.agent.Service("orders", "http", []string{orders},
		[2]string{p.orders.inbound, orders}, [2]string{other.inbound, orders})
	c, _ := httpClient(t, nil)
	eventually(t, "both endpoints used", func() bool {
		req, _ := http.NewRequest("GET", "http://"+p.frontend.outbound[0]+"/", nil)
		if got := ask(t, c, req); got.status != 200 {
			t.Fatalf("%d", got.status)
		}
		return p.orders.metric("castellan_proxy_requests_total") > 0 && other.metric("castellan_proxy_requests_total") > 0
	})
}

// TestWebSocket: both proxies tunnel an upgrade to websocket, and no other.
func TestWebSocket(t *testing.T) {
	app := newTCPApp(t, func(c net.Conn) {
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		if !strings.Contains(strings.ToLower(string(b[:n])), "upgrade: websocket") {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
		_, _ = io.Copy(c, c)
	})
	p := newPair(t, "http", app)
	upgrade := func(to string) (net.Conn, string) {
		c, err := net.Dial("tcp", p.frontend.outbound[0])
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: orders\r\nConnection: Upgrade\r\nUpgrade: "+to+"\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
		var head []byte
		one := make([]byte, 1)
		for !strings.HasSuffix(string(head), "\r\n\r\n") {
			if _, err := io.ReadFull(c, one); err != nil {
				t.Fatalf("%s: %v after %q", to, err, head)
			}
			head = append(head, one...)
		}
		return c, string(head)
	}
	c, head := upgrade("websocket")
	if !strings.HasPrefix(head, "HTTP/1.1 101") {
		t.Fatalf("%q", head)
	}
	for _, msg := range []string{"hello", "again"} {
		_, _ = io.WriteString(c, msg)
		got := make([]byte, len(msg))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != msg {
			t.Fatalf("%q %v", got, err)
		}
	}
	c.Close()
	c, head = upgrade("h2c")
	if strings.HasPrefix(head, "HTTP/1.1 101") {
		t.Fatalf("h2c was tunnelled: %q", head)
	}
	c.Close()
}
