package proxy_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/config"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

// session is one HTTP/1.1 connection over which requests are asked by hand.
type session struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
}

func dialTLS(t testing.TB, addr string, cert *tls.Certificate, protos ...string) *session {
	t.Helper()
	var c net.Conn
	var err error
	if cert == nil {
		c, err = net.Dial("tcp", addr)
	} else {
		c, err = tls.Dial("tcp", addr, clientTLS(cert, protos...))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return &session{t: t, conn: c, r: bufio.NewReader(c)}
}

func (s *session) get() (*http.Response, error) {
	if _, err := io.WriteString(s.conn, "GET / HTTP/1.1\r\nHost: orders\r\n\r\n"); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(s.r, nil)
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp, err
}

func (s *session) mustGet(status int) *http.Response {
	s.t.Helper()
	resp, err := s.get()
	if err != nil || resp.StatusCode != status {
		s.t.Fatalf("%v, %v; want %d", resp, err, status)
	}
	return resp
}

// closed waits until the other side has ended the connection.
func (s *session) closed() {
	s.t.Helper()
	_ = s.conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := s.r.ReadByte(); err == nil || strings.Contains(err.Error(), "i/o timeout") {
		s.t.Fatalf("the connection is still open: %v", err)
	}
}

// A new certificate and a new root touch no live connection; both ends of a
// rotation are served meanwhile.
func TestRotationKeepsLiveConnections(t *testing.T) {
	r, ca := mesh(t, strict)
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1")
	live.mustGet(200)

	next := tlsconftest.NewRoot(t)
	nextIssuer := next.SVIDIssuer(t)
	renewed := nextIssuer.Leaf(t, orders)
	r.agent.Secrets(renewed, r.agent.Root, next)
	r.agent.Settled()
	live.mustGet(200)
	fresh := dialTLS(t, r.inbound, nextIssuer.Leaf(t, frontend), "http/1.1")
	fresh.mustGet(200)
	if got := fresh.conn.(*tls.Conn).ConnectionState().PeerCertificates[0]; !got.Equal(renewed.Leaf) {
		t.Fatal("a new connection was served with the old certificate")
	}
	if got := live.conn.(*tls.Conn).ConnectionState().PeerCertificates[0]; got.Equal(renewed.Leaf) {
		t.Fatal("the live connection changed certificates")
	}

	// The old root goes: who was trusted by it alone goes with it (trust rule 9).
	r.agent.Secrets(renewed, next)
	live.closed()
	fresh.mustGet(200)
	waitLine(t, r.log, "live connection closed", "peer_not_trusted", frontend)
}

func TestRevocationClosesLiveConnections(t *testing.T) {
	for name, list := range map[string]func(*x509.Certificate) *castellanv1.Denylist{
		"by SPIFFE ID": func(*x509.Certificate) *castellanv1.Denylist {
			return &castellanv1.Denylist{SpiffeIds: []string{frontend}}
		},
		"by serial": func(c *x509.Certificate) *castellanv1.Denylist {
			return &castellanv1.Denylist{Serials: []string{c.SerialNumber.Text(16)}}
		},
		"by key": func(c *x509.Certificate) *castellanv1.Denylist {
			return &castellanv1.Denylist{KeyIds: []string{fmt.Sprintf("%x", c.SubjectKeyId)}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, ca := mesh(t, strict)
			cert := ca.Leaf(t, frontend)
			revoked := dialTLS(t, r.inbound, cert, "http/1.1")
			other := dialTLS(t, r.inbound, ca.Leaf(t, intruder), "http/1.1")
			revoked.mustGet(200)
			other.mustGet(200)
			r.agent.Deny(list(cert.Leaf))
			revoked.closed()
			other.mustGet(200)
			waitLine(t, r.log, "live connection closed", "peer_revoked", frontend)
			c, _ := httpClient(t, cert)
			if resp, err := c.Get("https://" + r.inbound + "/"); err == nil {
				resp.Body.Close()
				t.Fatalf("a new connection of the revoked was served: %d", resp.StatusCode)
			}
		})
	}
}

func TestPolicyChangeJudgesTheNextRequest(t *testing.T) {
	r, ca := mesh(t, strict+frontendMayGet)
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1")
	live.mustGet(200)
	r.logged(`"status":200`) // it has ended, and is no request in flight to be judged again
	r.agent.Publish(strict + strings.Replace(frontendMayGet, "sa/frontend", "sa/payments", 1))
	r.agent.Settled()
	live.mustGet(403)
	r.agent.Publish(strict + frontendMayGet)
	r.agent.Settled()
	live.mustGet(200)
}

func TestStrictClosesLivePlaintext(t *testing.T) {
	r, _ := mesh(t, mode("PERMISSIVE"))
	live := dialTLS(t, r.inbound, nil)
	live.mustGet(200)
	r.agent.Publish(strict)
	live.closed()
}

// A peer whose certificate expires: HTTP/1 is closed after a response or when idle.
func TestPeerExpiryClosesHTTP1(t *testing.T) {
	r, ca := mesh(t, strict)
	short := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(2 * time.Second).Truncate(time.Second) }
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend, short), "http/1.1")
	other := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1")
	live.mustGet(200)
	live.closed()
	other.mustGet(200)
}

// An expired peer does not lose its TCP connection because something unrelated changed.
func TestPeerExpiryLeavesTCP(t *testing.T) {
	r, ca := tcpMesh(t, strict)
	expires := time.Now().Add(2 * time.Second).Truncate(time.Second)
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend, func(c *x509.Certificate) { c.NotAfter = expires }), "istio")
	live.echo("before")
	eventually(t, "expiry", func() bool { return time.Now().After(expires.Add(1200 * time.Millisecond)) })
	r.agent.Policy.Labels["changed"] = "yes"
	r.agent.Publish(strict)
	r.agent.Settled()
	live.echo("after")
}

func (s *session) echo(text string) {
	s.t.Helper()
	if _, err := io.WriteString(s.conn, text); err != nil {
		s.t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(s.r, got); err != nil || string(got) != text {
		s.t.Fatalf("%q, %v", got, err)
	}
}

// tcpMesh is mesh in front of an application that sends bytes back.
func tcpMesh(t testing.TB, policies string, options ...option) (*running, *tlsconftest.CA) {
	t.Helper()
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Policy.Ports[0].Protocol = "tcp"
	a.Publish(policies)
	app := newTCPApp(t, func(c net.Conn) { _, _ = io.Copy(c, c); _ = c.(*net.TCPConn).CloseWrite() })
	return start(t, a, app, options...).ready(), a.Issuer
}

const tcpFrontend = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: tcp, namespace: shop}
spec:
  rules: [{from: [{source: {principals: ["cluster.local/ns/shop/sa/frontend"]}}]}]
---
`

func TestTCP(t *testing.T) {
	r, ca := tcpMesh(t, strict+tcpFrontend)
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio-peer-exchange", "istio")
	live.echo("one")
	// Our end of the stream; the other direction lives on until it has been read.
	if _, err := io.WriteString(live.conn, "last"); err != nil {
		t.Fatal(err)
	}
	if err := live.conn.(*tls.Conn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(live.r)
	if err != nil || string(rest) != "last" {
		t.Fatalf("%q, %v", rest, err)
	}
	r.logged(`"protocol":"TCP"`, `"peer":"`+frontend+`"`, `"bytesReceived":7`, `"bytesSent":7`, `"policy":"shop/tcp"`)

	denied := dialTLS(t, r.inbound, ca.Leaf(t, intruder), "istio")
	denied.closed()
	r.logged(`"protocol":"TCP"`, `"peer":"`+intruder+`"`, `"reason":"no ALLOW rule matches"`)
}

func TestPolicyChangeClosesTCP(t *testing.T) {
	r, ca := tcpMesh(t, strict+tcpFrontend)
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio")
	live.echo("one")
	r.agent.Publish(strict + tcpFrontend + "\n")
	live.echo("two")
	r.agent.Publish(strict + strings.Replace(tcpFrontend, "sa/frontend", "sa/payments", 1))
	live.closed()
	r.logged(`"protocol":"TCP"`, `"reason":"policy"`)
}

// authz-19: on TCP a rule with HTTP fields never allows.
func TestHTTPRuleOnTCPFailsClosed(t *testing.T) {
	r, ca := tcpMesh(t, strict+frontendMayGet)
	dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio").closed()
}

func TestTCPThroughBothProxies(t *testing.T) {
	p := newPair(t, "tcp", newTCPApp(t, func(c net.Conn) { _, _ = io.Copy(c, c) }))
	s := dialTLS(t, p.frontend.outbound[0], nil)
	s.echo("through two proxies")
	big := strings.Repeat("x", 1<<20)
	go func() { _, _ = io.WriteString(s.conn, big) }()
	got := make([]byte, len(big))
	if _, err := io.ReadFull(s.r, got); err != nil || string(got) != big {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	// Whoever is no longer expected there loses the connection.
	p.frontend.agent.Service("orders", "tcp", []string{payments}, [2]string{p.orders.inbound, payments})
	s.closed()
	waitLine(t, p.frontend.log, "live connection closed", "identity_not_expected")
}

// The server speaks first on a port declared TCP.
func TestServerSpeaksFirst(t *testing.T) {
	p := newPair(t, "tcp", newTCPApp(t, func(c net.Conn) {
		_, _ = io.WriteString(c, "220 ready\r\n")
		_, _ = io.Copy(io.Discard, c)
	}))
	s := dialTLS(t, p.frontend.outbound[0], nil)
	if line, err := s.r.ReadString('\n'); err != nil || line != "220 ready\r\n" {
		t.Fatalf("%q, %v", line, err)
	}
}

// Undeclared ports are told apart by their first bytes.
func TestUndeclaredPort(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Policy.Ports = nil
	a.Publish(strict)
	r := start(t, a, newTCPApp(t, func(c net.Conn) {
		b := make([]byte, 1024)
		n, _ := c.Read(b)
		if strings.HasPrefix(string(b[:n]), "GET ") {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			return
		}
		_, _ = c.Write(b[:n])
	})).ready()
	cert := a.Issuer.Leaf(t, frontend)
	dialTLS(t, r.inbound, cert).mustGet(200)
	r.logged(`"protocol":"HTTP/1.1"`, `"status":200`)
	binary := dialTLS(t, r.inbound, cert)
	binary.echo("\x00binary")
	binary.conn.Close()
	r.logged(`"protocol":"TCP"`)
	// HTTP in odd clothes meets the strict parser.
	for _, odd := range []string{"Get / HTTP/1.1\r\n", "\r\nGET / HTTP/1.1\r\n", "get\t/ HTTP/1.1\r\n"} {
		s := dialTLS(t, r.inbound, cert)
		if _, err := io.WriteString(s.conn, odd+"Host: x\r\nX-Forwarded-Client-Cert: forged\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(s.r, nil)
		if err != nil || resp.StatusCode != 400 {
			t.Fatalf("%q: %v, %v", odd, resp, err)
		}
	}
}

// undeclaredMesh is a mesh in front of an application that speaks first and
// sends back what it reads, on a port that nobody has declared.
func undeclaredMesh(t *testing.T, policies string) (*running, *tlsconftest.CA, *buffer) {
	t.Helper()
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Policy.Ports = nil
	a.Publish(policies)
	seen := &buffer{}
	app := newTCPApp(t, func(c net.Conn) {
		_, _ = io.WriteString(c, "220 ready\r\n")
		_, _ = io.Copy(io.MultiWriter(c, seen), c)
	})
	quick := limit(func(l *config.ProxyLimits) { l.HandshakeTimeout = config.Duration(300 * time.Millisecond) })
	return start(t, a, app, quick).ready(), a.Issuer, seen
}

// On an undeclared port a client that waits until it counts as TCP gets the
// server's greeting, and is cut off when it speaks HTTP then: nobody would have
// judged the request, nor removed the headers that only the proxy may set.
func TestLateHTTPIsCutOff(t *testing.T) {
	r, ca, seen := undeclaredMesh(t, strict+tcpFrontend)
	cert := ca.Leaf(t, frontend)
	greeted := func(first string) *session {
		s := dialTLS(t, r.inbound, cert, "istio")
		if _, err := io.WriteString(s.conn, first); err != nil {
			t.Fatal(err)
		}
		if line, err := s.r.ReadString('\n'); err != nil || line != "220 ready\r\n" {
			t.Fatalf("%q, %v", line, err)
		}
		return s
	}
	greeted("").echo("EHLO host.example\r\n")
	const request = "GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-Client-Cert: URI=forged\r\n\r\n"
	for _, parts := range [][2]string{{"", request}, {"GE", request[2:]}, {"\r\n", request}, {"", "get / HTTP/1.0\r\nX: forged\r\n\r\n"}} {
		s := greeted(parts[0])
		if _, err := io.WriteString(s.conn, parts[1]); err != nil {
			t.Fatal(err)
		}
		s.closed()
	}
	r.logged(`"protocol":"TCP"`, `"reason":"http_late"`)
	if got := seen.String(); strings.Contains(got, "forged") || strings.Contains(got, "/") {
		t.Fatalf("the application was sent %q", got)
	}
}

const frontendMayGetOn = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: http, namespace: shop}
spec:
  action: DENY
  rules: [{to: [{operation: {methods: ["DELETE"], ports: ["PORT"]}}]}]
---
`

// Where rules are about HTTP, or tokens are judged, an undeclared port is for
// HTTP only, also for connections that were there before.
func TestUndeclaredPortWithHTTPRules(t *testing.T) {
	httpRules := strict + tcpFrontend + strings.Replace(frontendMayGetOn, "PORT", "8080", 1)
	elsewhere := strict + tcpFrontend + strings.Replace(frontendMayGetOn, "PORT", "9090", 1)
	tokens := strict + tcpFrontend + `
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: shop}
spec: {jwtRules: [{issuer: "https://issuer.example", jwks: '{"keys":[]}'}]}
`
	for name, policies := range map[string]string{"a rule": httpRules, "tokens": tokens} {
		t.Run(name, func(t *testing.T) {
			r, ca, seen := undeclaredMesh(t, elsewhere)
			live := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio")
			if _, err := io.WriteString(live.conn, "\x00bytes"); err != nil {
				t.Fatal(err)
			}
			if line, err := live.r.ReadString('\n'); err != nil || line != "220 ready\r\n" {
				t.Fatalf("%q, %v", line, err)
			}
			if _, err := io.ReadFull(live.r, make([]byte, len("\x00bytes"))); err != nil {
				t.Fatal(err)
			}
			r.agent.Publish(policies)
			live.closed()
			r.agent.Settled()
			s := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio")
			if _, err := io.WriteString(s.conn, "\x01more"); err != nil {
				t.Fatal(err)
			}
			s.closed()
			waitLine(t, r.log, "connection refused", "not_http")
			if strings.Contains(seen.String(), "more") {
				t.Fatalf("the application saw %q", seen)
			}
		})
	}
}

func TestIdleTCPIsClosed(t *testing.T) {
	r, ca := tcpMesh(t, strict, limit(func(l *config.ProxyLimits) { l.StreamIdleTimeout = config.Duration(time.Second) }))
	live := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio")
	live.echo("x")
	live.closed()
	r.logged(`"protocol":"TCP"`, `"reason":"idle"`)
}
