package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	grpchealth "google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

// Applications of two pods talk as they would without us; what goes over the wire
// is mutual TLS, and each knows the other.
func TestPodsTalkHTTP(t *testing.T) {
	m := newMesh(t)
	m.declare(strictPolicy, map[uint32]string{8080: "http"})
	for port := range 3 {
		listen(m.orders.NS, ordersHost, 8080+3*port, serveHTTP(web("orders"))) // 8080, 8083, 8086
	}
	listen(m.outsider, outsiderHost, 8080, serveHTTP(web("outsider")))
	both(t, func(t *testing.T, f family) {
		for name, addr := range map[string]string{
			"service": at(f.service(ordersVIP), 80), "service, port undeclared": at(f.service(ordersVIP), 83),
			"pod": at(f.pod(ordersHost), 8080), "pod, port undeclared": at(f.pod(ordersHost), 8083),
		} {
			a := get(t, m.frontend.NS, "http://"+addr+"/a/b")
			if a.status != 200 || a.app != "orders" || a.told.Path != "/a/b" || a.told.Host != addr {
				t.Fatalf("%s: %d %q", name, a.status, a.body)
			}
			if got := a.told.Header.Get("X-Forwarded-Client-Cert"); !strings.HasSuffix(got, "URI="+frontendID) {
				t.Errorf("%s: xfcc %q", name, got)
			}
			if host, _, _ := net.SplitHostPort(a.told.Peer); host != f.appSource {
				t.Errorf("%s: the application met %s, want %s", name, a.told.Peer, f.appSource)
			}
		}
		logged(t, m.frontend.access, `"direction":"outbound"`, `"destination":"shop/orders"`, `"peer":"`+ordersID+`"`, `"source":"`, `"status":200`)
		logged(t, m.orders.access, `"direction":"inbound"`, `"destination":"`+at(f.pod(ordersHost), 8083)+`"`, `"peer":"`+frontendID+`"`, `"status":200`)

		// Where it goes is said by the address alone.
		a, err := ask(t, client(t, m.frontend.NS), "http://"+at(f.service(ordersVIP), 80), func(r *http.Request) { r.Host = "legacy.shop.svc.cluster.local" })
		if err != nil || a.app != "orders" || a.told.Host != "legacy.shop.svc.cluster.local" {
			t.Errorf("by another's name: %+v %v", a, err)
		}
		// Who is not expected at an address is not spoken to.
		if a := get(t, m.frontend.NS, "http://"+at(f.service(wrongVIP), 80)); a.status != 502 || a.body != "Bad Gateway\n" {
			t.Errorf("wrong identity: %d %q", a.status, a.body)
		}
		logged(t, m.frontend.access, `"destination":"shop/wrong"`, `"reason":"identity_not_expected"`)
	})
}

func TestPodsTalkGRPCAndHTTP2(t *testing.T) {
	m := newMesh(t)
	m.declare(strictPolicy, map[uint32]string{8081: "grpc"})
	health := grpchealth.NewServer()
	server := grpc.NewServer()
	healthv1.RegisterHealthServer(server, health)
	t.Cleanup(server.Stop)
	for _, port := range []int{8081, 8083} {
		listen(m.orders.NS, ordersHost, port, func(l net.Listener) { _ = server.Serve(l) })
	}
	both(t, func(t *testing.T, f family) {
		for name, addr := range map[string]string{
			"declared": at(f.service(ordersVIP), 81), "undeclared": at(f.service(ordersVIP), 83), "pod": at(f.pod(ordersHost), 8081),
		} {
			conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(_ context.Context, addr string) (net.Conn, error) {
					return m.frontend.DialAs(1000, net.Dialer{Timeout: patience}, addr)
				}))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			watch, err := healthv1.NewHealthClient(conn).Watch(ctx, &healthv1.HealthCheckRequest{})
			if err != nil {
				t.Fatal(err)
			}
			for _, status := range []healthv1.HealthCheckResponse_ServingStatus{healthv1.HealthCheckResponse_SERVING, healthv1.HealthCheckResponse_NOT_SERVING} {
				health.SetServingStatus("", status)
				for {
					resp, err := watch.Recv()
					if err != nil {
						t.Fatalf("%s: %v", name, err)
					}
					if resp.GetStatus() == status {
						break
					}
				}
			}
			cancel()
			conn.Close()
		}
		logged(t, m.orders.access, `"protocol":"HTTP/2"`, `"peer":"`+frontendID+`"`)
	})
}

func TestPodsTalkWebSocket(t *testing.T) {
	m := newMesh(t)
	m.declare(strictPolicy, map[uint32]string{8080: "http"})
	listen(m.orders.NS, ordersHost, 8080, serveHTTP(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(conn, rw)
	})))
	both(t, func(t *testing.T, f family) {
		c := talk(t, m.frontend.NS, at(f.service(ordersVIP), 80))
		c.say("GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
		resp, err := http.ReadResponse(c.r, nil)
		if err != nil || resp.StatusCode != 101 {
			t.Fatalf("%v %v", resp, err)
		}
		c.say("hello")
		c.hear("hello")
	})
}

// Policy is that of the port a connection was going to.
func TestModesByPort(t *testing.T) {
	m := newMesh(t)
	for _, port := range []int{8080, 8083, 8084} {
		listen(m.orders.NS, ordersHost, port, serveHTTP(web("orders")))
	}
	const ports = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: ports, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  mtls: {mode: STRICT}
  portLevelMtls: {8083: {mode: PERMISSIVE}, 8084: {mode: DISABLE}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: paths, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules: [{to: [{operation: {paths: ["/admin*"], ports: ["8080", "8083"]}}]}]
---
`
	m.declare(strictPolicy+ports, map[uint32]string{8080: "http", 8083: "http", 8084: "http"})
	both(t, func(t *testing.T, f family) {
		plain := func(port int, path string) (answer, error) {
			return ask(t, client(t, m.outsider), "http://"+at(f.pod(ordersHost), port)+path, nil)
		}
		if a, err := plain(8080, "/"); err == nil {
			t.Errorf("STRICT, in the clear: %+v", a)
		}
		for _, port := range []int{8083, 8084} {
			a, err := plain(port, "/")
			if err != nil || a.app != "orders" || a.told.Header.Get("X-Forwarded-Client-Cert") != "" {
				t.Errorf("%d, in the clear: %+v %v", port, a, err)
			}
		}
		if a, err := plain(8083, "/admin"); err != nil || a.status != 403 || a.body != "access denied\n" {
			t.Errorf("denied path: %+v %v", a, err)
		}
		if a, err := plain(8084, "/admin"); err != nil || a.status != 200 {
			t.Errorf("a path denied on another port: %+v %v", a, err)
		}
		if a := get(t, m.frontend.NS, "http://"+at(f.service(ordersVIP), 83)+"/"); a.app != "orders" || a.told.Header.Get("X-Forwarded-Client-Cert") == "" {
			t.Errorf("PERMISSIVE, by mutual TLS: %+v", a)
		}
		if a := get(t, m.frontend.NS, "http://"+at(f.service(ordersVIP), 80)+"/admin/x"); a.status != 403 {
			t.Errorf("denied path, by mutual TLS: %+v", a)
		}
		// Ports nobody listens on, however many, are the application's to refuse.
		for port := 20000; port < 20020; port++ {
			if a, err := plain(port, "/"); err == nil {
				t.Errorf("%d: %+v", port, a)
			}
		}
	})
	logged(t, m.orders.log, "connection refused", "plaintext")
}

// What is not in the mesh is spoken to only where the mesh allows that.
func TestOutsideTheMesh(t *testing.T) {
	m := newMesh(t)
	listen(m.outsider, outsiderHost, 8080, serveHTTP(web("outsider")))
	listen(m.outsider, outsiderHost, 9090, serveHTTP(web("unknown")))
	listen(m.outsider, outsiderHost, 3306, answerEach(func(c net.Conn) {
		fmt.Fprint(c, "greetings\n")
		line, _ := bufio.NewReader(c).ReadString('\n')
		fmt.Fprint(c, "you said ", line)
	}))
	both(t, func(t *testing.T, f family) {
		m.outbound(m.registry)
		for name, addr := range map[string]string{
			"known": at(f.pod(outsiderHost), 8080), "unknown": at(f.pod(outsiderHost), 9090), "nobody": "203.0.113.7:80",
		} {
			if a := get(t, m.frontend.NS, "http://"+addr); a.status != 502 || a.body != "destination not available\n" {
				t.Errorf("%s: %d %q", name, a.status, a.body)
			}
		}
		talk(t, m.frontend.NS, at(f.pod(outsiderHost), 3306)).over()
		logged(t, m.frontend.access, `"destination":"`+at(f.pod(outsiderHost), 3306)+`"`, `"protocol":"TCP"`, `"reason":"destination_unknown"`)
		logged(t, m.frontend.access, `"destination":"shop/legacy"`, `"status":502`, `"reason":"outside_mesh"`)

		m.outbound(m.allowAny)
		for name, want := range map[string]string{at(f.pod(outsiderHost), 8080): "outsider", at(f.pod(outsiderHost), 9090): "unknown"} {
			a := get(t, m.frontend.NS, "http://"+name)
			if host, _, _ := net.SplitHostPort(a.told.Peer); a.app != want || host != f.pod(frontendHost) {
				t.Errorf("%s: %+v", name, a)
			}
		}
		c := talk(t, m.frontend.NS, at(f.pod(outsiderHost), 3306))
		c.hear("greetings\n")
		// Members of the mesh are never spoken to in the clear.
		if a, err := ask(t, client(t, m.frontend.NS), "http://"+at(f.service(wrongVIP), 80), nil); err != nil || a.status != 502 {
			t.Errorf("%+v %v", a, err)
		}
		// Once it is forbidden again, what is open is closed.
		m.outbound(m.registry)
		c.over()
		logged(t, m.frontend.access, `"protocol":"TCP"`, `"reason":"outbound_policy"`)
	})
}

// A pod that calls its own service meets its own policy.
func TestOwnService(t *testing.T) {
	m := newMesh(t)
	listen(m.orders.NS, ordersHost, 8080, serveHTTP(web("orders")))
	const notItself = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: itself, namespace: shop}
spec:
  action: DENY
  rules: [{from: [{source: {principals: ["cluster.local/ns/shop/sa/orders"]}}], to: [{operation: {paths: ["/not/*"]}}]}]
---
`
	m.declare(strictPolicy+notItself, map[uint32]string{8080: "http"})
	both(t, func(t *testing.T, f family) {
		a := get(t, m.orders.NS, "http://"+at(f.service(ordersVIP), 80)+"/x")
		if a.app != "orders" || !strings.HasSuffix(a.told.Header.Get("X-Forwarded-Client-Cert"), "URI="+ordersID) {
			t.Errorf("%+v", a)
		}
		if a := get(t, m.orders.NS, "http://"+at(f.service(ordersVIP), 80)+"/not/x"); a.status != 403 {
			t.Errorf("%+v", a)
		}
		// By its own address it talks to itself, and to nobody else.
		if a := get(t, m.orders.NS, "http://"+at(f.pod(ordersHost), 8080)+"/not/x"); a.app != "orders" || a.told.Header.Get("X-Forwarded-Client-Cert") != "" {
			t.Errorf("%+v", a)
		}
	})
}

// A client that hangs up while its response is silent is missed by both proxies,
// and so by the application.
func TestClientHangsUp(t *testing.T) {
	m := newMesh(t)
	m.declare(strictPolicy, map[uint32]string{8080: "http"})
	ended := make(chan struct{})
	listen(m.orders.NS, ordersHost, 8080, serveHTTP(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		close(ended)
	})))
	c := talk(t, m.frontend.NS, at(v4.service(ordersVIP), 80))
	c.say("GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
	c.hear("HTTP/1.1 200 OK")
	c.Close()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the application still serves nobody")
	}
	logged(t, m.frontend.access, `"path":"/events"`, `"reason":"client_gone"`)
	logged(t, m.orders.access, `"path":"/events"`, `"reason":"client_gone"`)
}
