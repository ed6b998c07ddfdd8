package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// banner speaks first and then sends back what it reads.
func banner(c net.Conn) {
	fmt.Fprint(c, "220 ready\r\n")
	_, _ = io.Copy(c, c)
}

func echo(c net.Conn) { _, _ = io.Copy(c, c) }

// Whoever speaks first is heard, whether or not the port is declared, and without
// the wait that telling HTTP from bytes would take otherwise.
func TestPodsTalkTCP(t *testing.T) {
	m := newMesh(t)
	m.declare(strictPolicy, map[uint32]string{8082: "tcp"})
	listen(m.orders.NS, ordersHost, 8082, answerEach(banner))
	listen(m.orders.NS, ordersHost, 8083, answerEach(banner))
	listen(m.orders.NS, ordersHost, 8084, answerEach(echo))
	both(t, func(t *testing.T, f family) {
		for name, addr := range map[string]string{
			"declared": at(f.service(ordersVIP), 82), "undeclared": at(f.service(ordersVIP), 83), "undeclared, pod": at(f.pod(ordersHost), 8083),
		} {
			began := time.Now()
			c := talk(t, m.frontend.NS, addr)
			c.hear("220 ready\r\n")
			if took := time.Since(began); took > 3*time.Second {
				t.Errorf("%s: the server's first words took %s", name, took)
			}
			c.say("EHLO host.example\r\n")
			c.hear("EHLO host.example\r\n")
			// The end of one direction is passed on and leaves the other open.
			if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			c.over()
		}
		for _, first := range []string{"\x00\x01bytes", "EHLO host.example\r\n"} {
			c := talk(t, m.frontend.NS, at(f.service(ordersVIP), 84))
			c.say(first)
			c.hear(first)
		}
		logged(t, m.orders.access, `"protocol":"TCP"`, `"destination":"`+at(f.pod(ordersHost), 8083)+`"`, `"peer":"`+frontendID+`"`)
		logged(t, m.frontend.access, `"protocol":"TCP"`, `"destination":"shop/orders"`, `"peer":"`+ordersID+`"`)
	})
}

// Who opens a connection and has nothing to ask yet is served when it has: as HTTP,
// judged as such.
func TestLateHTTP(t *testing.T) {
	m := newMesh(t)
	reached := make(chan struct{}, 16)
	listen(m.orders.NS, ordersHost, 8083, func(l net.Listener) { serveHTTP(web("orders"))(announcer{l, reached}) })
	listen(m.orders.NS, ordersHost, 8084, answerEach(banner))
	both(t, func(t *testing.T, f family) {
		c := talk(t, m.frontend.NS, at(f.service(ordersVIP), 83))
		// Both proxies have taken it for something on which the server may speak, or
		// nothing would reach the server that was not asked anything.
		select {
		case <-reached:
		case <-time.After(patience):
			t.Fatal("the server is not let speak")
		}
		for range 2 {
			c.say("GET /late HTTP/1.1\r\nHost: x\r\nX-Forwarded-Client-Cert: forged\r\n\r\n")
			resp, err := http.ReadResponse(c.r, nil)
			if err != nil || resp.StatusCode != 200 {
				t.Fatalf("%v %v", resp, err)
			}
			body, _ := io.ReadAll(resp.Body)
			if !strings.Contains(string(body), "URI="+frontendID) || strings.Contains(string(body), "forged") {
				t.Errorf("%s", body)
			}
		}
		logged(t, m.orders.access, `"path":"/late"`, `"peer":"`+frontendID+`"`, `"status":200`)
		// After the server has spoken it is no HTTP any more.
		c = talk(t, m.frontend.NS, at(f.service(ordersVIP), 84))
		c.hear("220 ready\r\n")
		c.say("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		c.over()
		logged(t, m.orders.access, `"protocol":"TCP"`, `"reason":"http_late"`)
	})
}

// announcer tells of each connection that it accepts.
type announcer struct {
	net.Listener
	reached chan<- struct{}
}

func (a announcer) Accept() (net.Conn, error) {
	c, err := a.Listener.Accept()
	if err == nil {
		a.reached <- struct{}{}
	}
	return c, err
}

// In the clear, where that is permitted, servers speak first too.
func TestServerFirstInTheClear(t *testing.T) {
	m := newMesh(t)
	listen(m.orders.NS, ordersHost, 8082, answerEach(banner))
	listen(m.orders.NS, ordersHost, 8083, answerEach(banner))
	m.declare(strings.Replace(strictPolicy, "STRICT", "PERMISSIVE", 1), map[uint32]string{8082: "tcp"})
	both(t, func(t *testing.T, f family) {
		for _, port := range []int{8082, 8083} {
			began := time.Now()
			c := talk(t, m.outsider, at(f.pod(ordersHost), port))
			c.hear("220 ready\r\n")
			if took := time.Since(began); took > 3*time.Second {
				t.Errorf("%d: the server's first words took %s", port, took)
			}
			c = talk(t, m.frontend.NS, at(f.pod(ordersHost), port))
			c.hear("220 ready\r\n")
		}
	})
}

// The proxy's own ports lead nowhere, and destinations that are not the pod's are
// not carried to.
func TestOwnPorts(t *testing.T) {
	m := newMesh(t)
	m.outbound(m.allowAny)
	both(t, func(t *testing.T, f family) {
		for _, c := range map[string]*conversation{
			"inbound from outside":   talk(t, m.outsider, at(f.pod(frontendHost), 15006)),
			"outbound from outside":  talk(t, m.outsider, at(f.pod(frontendHost), 15001)),
			"inbound by loopback":    talk(t, m.frontend.NS, at(f.loopback, 15006)),
			"outbound by loopback":   talk(t, m.frontend.NS, at(f.loopback, 15001)),
			"inbound by own address": talk(t, m.frontend.NS, at(f.pod(frontendHost), 15006)),
			"another's inbound":      talk(t, m.frontend.NS, at(f.pod(ordersHost), 15006)),
			"another's outbound":     talk(t, m.frontend.NS, at(f.pod(ordersHost), 15001)),
		} {
			c.say("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			c.over()
		}
	})
	logged(t, m.frontend.log, `"direction":"inbound"`, "own_listener")
	logged(t, m.frontend.log, `"direction":"outbound"`, "own_listener")
	// A redirection that is not ours brings others' addresses: we are no relay.
	m.orders.IP("addr", "add", "10.9.0.99/32", "dev", "lo")
	m.orders.Output("nft", "add", "table", "ip", "other")
	m.orders.Output("nft", "add", "chain", "ip", "other", "pre", "{ type nat hook prerouting priority -101; }")
	m.orders.Output("nft", "add", "rule", "ip", "other", "pre", "ip", "daddr", "10.9.1.0/24", "tcp", "dport", "80", "dnat", "to", v4.pod(ordersHost)+":15006")
	m.outsider.IP("route", "add", "10.9.1.0/24", "via", v4.pod(ordersHost))
	m.orders.Sysctl("ipv4/ip_forward", 1)
	c := talk(t, m.outsider, "10.9.1.5:80")
	c.say("x")
	c.over()
	logged(t, m.orders.log, "destination_not_own", "10.9.1.5:80")
}

// Readiness and probes are for a kubelet, which comes in the clear from outside.
func TestReadinessAndProbes(t *testing.T) {
	m := newMesh(t)
	both(t, func(t *testing.T, f family) {
		check := func(port int, path string, want int) {
			t.Helper()
			if a := get(t, m.outsider, "http://"+at(f.pod(ordersHost), port)+path); a.status != want {
				t.Errorf("%s: %d %q, want %d", path, a.status, a.body, want)
			}
		}
		check(15021, "/healthz/ready", 200)
		check(15020, "/livez", 200)
		check(15020, "/readyz", 200)
		check(15020, "/app-health/app/readyz", 503)
		check(15020, "/app-health/app/livez", 503)
		check(15020, "/app-health/app/other", 404)
		app := m.orders.Listen(at(f.pod(ordersHost), 8080))
		go serveHTTP(web("orders"))(app)
		tcp := m.orders.Listen(at(f.pod(ordersHost), 8082))
		check(15020, "/app-health/app/readyz", 200)
		check(15020, "/app-health/app/livez", 200)
		check(15020, "/app-health/app/no", 503)
		app.Close()
		tcp.Close()
		if a, err := ask(t, client(t, m.outsider), "http://"+at(f.pod(ordersHost), 8080)+"/healthz", nil); err == nil {
			t.Errorf("the application's own port answers in the clear: %+v", a)
		}
	})
}

// A signal ends the proxy once what is under way has ended; it says meanwhile that
// it is not ready.
func TestEndsGracefully(t *testing.T) {
	m := newMesh(t)
	hold := make(chan struct{})
	listen(m.orders.NS, ordersHost, 8080, serveHTTP(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		<-hold
		fmt.Fprint(w, "late but whole")
	})))
	m.declare(strictPolicy, map[uint32]string{8080: "http"})
	c := talk(t, m.frontend.NS, at(v4.service(ordersVIP), 80))
	c.say("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	logged(t, m.orders.log, "serving")
	waitFor(t, "the request", func() bool {
		return strings.Contains(get(t, m.outsider, "http://"+at(v4.pod(ordersHost), 15020)+"/metrics").body, `castellan_proxy_upstream_connects_total{direction="inbound",result="ok"} 1`)
	})
	if err := m.orders.proxy.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "not ready", func() bool {
		a, err := ask(t, client(t, m.outsider), "http://"+at(v4.pod(ordersHost), 15021)+"/healthz/ready", nil)
		return err == nil && a.status == 503
	})
	close(hold)
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "late but whole" {
		t.Errorf("%q %v", body, err)
	}
	m.orders.wait()
	// Without its proxy a pod is reached by nobody.
	if a, err := ask(t, client(t, m.outsider), "http://"+at(v4.pod(ordersHost), 8080)+"/", nil); err == nil {
		t.Errorf("%+v", a)
	}
	m.orders.capture("-undo")
	if a := get(t, m.outsider, "http://"+at(v4.pod(ordersHost), 8080)+"/"); a.body != "late but whole" {
		t.Errorf("%+v", a)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

// The agent may come after the proxy, go, and come back at a new socket in the same
// place; what it said last stays in force.
func TestAgentComesAndGoes(t *testing.T) {
	m := newMesh(t)
	m.declare(strictPolicy, map[uint32]string{8080: "http"})
	listen(m.orders.NS, ordersHost, 8080, serveHTTP(web("orders")))
	m.orders.end()
	m.orders.agent.Stop()
	if err := os.Remove(m.orders.agent.Socket); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	m.orders.run()
	ready := func() int {
		a, err := ask(t, client(t, m.outsider), "http://"+at(v4.pod(ordersHost), 15021)+"/healthz/ready", nil)
		if err != nil {
			return 0
		}
		return a.status
	}
	waitFor(t, "an answer without an agent", func() bool { return ready() == 503 })
	began := time.Now()
	m.orders.agent.Serve()
	waitFor(t, "readiness", func() bool { return ready() == 200 })
	t.Logf("ready %s after the agent", time.Since(began))
	for range 3 {
		m.orders.agent.Stop()
		if a := get(t, m.frontend.NS, "http://"+at(v4.service(ordersVIP), 80)); a.status != 200 || ready() != 200 {
			t.Fatalf("without an agent: %+v, ready %d", a, ready())
		}
		before := version(m)
		m.orders.agent.Serve()
		began := time.Now()
		m.orders.agent.Policy.Labels["round"] = fmt.Sprint(before)
		m.orders.agent.Publish(strictPolicy)
		m.orders.agent.Settled()
		t.Logf("followed again %s after the agent came back", time.Since(began))
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("an agent that came back was found after %s", took)
		}
	}
}

// version counts what the proxy has been told.
func version(m *mesh) int { return strings.Count(m.orders.log.String(), `"resource":"policy"`) }

// A pod without IPv6 is served without it.
func TestPodWithoutIPv6(t *testing.T) {
	m := newMesh(t)
	m.orders.end()
	m.orders.capture("-undo")
	m.orders.Sysctl("ipv6/conf/all/disable_ipv6", 1)
	m.orders.capture()
	m.orders.run()
	listen4 := m.orders.Listen(at(v4.pod(ordersHost), 8083))
	go serveHTTP(web("orders"))(listen4)
	waitFor(t, "an answer", func() bool {
		a, err := ask(t, client(t, m.frontend.NS), "http://"+at(v4.service(ordersVIP), 83), nil)
		return err == nil && a.status == 200 && a.app == "orders"
	})
}
