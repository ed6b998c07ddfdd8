package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/config"
	"castellan.dev/internal/tlsconf/tlsconftest"
	"castellan.dev/proxy/capture/netnstest"
	"castellan.dev/proxy/proxytest"
)

const (
	patience = 20 * time.Second

	trustDomain = "spiffe://cluster.local"
	frontendID  = trustDomain + "/ns/shop/sa/frontend"
	ordersID    = trustDomain + "/ns/shop/sa/orders"

	// Addresses end in the same number for both families.
	hub, frontendHost, ordersHost, outsiderHost = 1, 2, 3, 4
	ordersVIP, legacyVIP, wrongVIP              = 10, 11, 12
)

// family makes the addresses of IPv4 or IPv6.
type family struct{ pods, services, loopback, appSource string }

var (
	v4 = family{"10.9.0.%d", "10.96.0.%d", "127.0.0.1", "127.0.0.6"}
	v6 = family{"fd09::%d", "fd96::%d", "::1", "::6"}
)

func (f family) pod(n int) string     { return fmt.Sprintf(f.pods, n) }
func (f family) service(n int) string { return fmt.Sprintf(f.services, n) }

func at(host string, port int) string { return net.JoinHostPort(host, fmt.Sprint(port)) }

// both runs f once for each family.
func both(t *testing.T, f func(t *testing.T, f family)) {
	t.Helper()
	t.Run("IPv4", func(t *testing.T) { f(t, v4) })
	t.Run("IPv6", func(t *testing.T) { f(t, v6) })
}

// mesh is a network of pods: frontend and orders with a proxy each, and an
// outsider without.
type mesh struct {
	t                  *testing.T
	hub                *netnstest.NS
	root               *tlsconftest.CA
	frontend, orders   *pod
	outsider           *netnstest.NS
	program            string
	allowAny, registry []byte
}

// pod is one with a proxy, as the init step and the sidecar make it.
type pod struct {
	*netnstest.NS
	t       *testing.T
	agent   *proxytest.Agent
	config  string
	program string
	proxy   *exec.Cmd
	ended   chan error
	access  *lines
	log     *lines
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	m := &mesh{t: t, hub: netnstest.New(t), root: tlsconftest.NewRoot(t), program: executable(t)}
	m.allowAny = []byte(`{"trustDomain":"cluster.local","rootNamespace":"castellan-system","outboundPolicy":"ALLOW_ANY"}`)
	m.registry = []byte(`{"trustDomain":"cluster.local","rootNamespace":"castellan-system"}`)
	m.hub.Bridge(v4.pod(hub)+"/24", v6.pod(hub)+"/64")
	// What nobody serves is refused, not lost.
	m.hub.IP("route", "add", "local", "default", "dev", "lo", "table", "main")
	m.hub.IP("-6", "route", "add", "local", "default", "dev", "lo", "table", "main")
	m.outsider = m.host(outsiderHost)
	m.frontend = m.pod(frontendID, frontendHost)
	m.orders = m.pod(ordersID, ordersHost)
	return m
}

func (m *mesh) host(n int) *netnstest.NS {
	ns := netnstest.New(m.t)
	ns.Plug(m.hub, v4.pod(n)+"/24", v6.pod(n)+"/64")
	ns.IP("route", "add", "default", "via", v4.pod(hub))
	ns.IP("-6", "route", "add", "default", "via", v6.pod(hub))
	return ns
}

const strictPolicy = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: castellan-system}
spec: {mtls: {mode: STRICT}}
---
`

// pod captures and starts a proxy for a new pod.
func (m *mesh) pod(id string, n int) *pod {
	m.t.Helper()
	p := &pod{NS: m.host(n), t: m.t, agent: proxytest.NewAgent(m.t, m.root, id), program: m.program, access: &lines{}, log: &lines{}}
	p.agent.Policy.Ports = nil
	p.agent.Policy.Mesh = m.registry
	p.agent.Secrets(p.agent.Issuer.Leaf(m.t, id), m.root)
	p.agent.Publish(strictPolicy)
	p.agent.SetServices(m.services()...)
	p.configure(nil)
	p.capture()
	p.run()
	p.agent.Settled()
	return p
}

// configure writes the configuration as the injector does; change may alter it.
func (p *pod) configure(change func(*config.Proxy)) {
	p.t.Helper()
	cfg := config.Proxy{
		Header:      config.Header{APIVersion: config.APIVersion, Kind: "ProxyConfig"},
		AgentSocket: p.agent.Socket, Admin: ":15020", Ready: ":15021",
		Capture: &config.Capture{Inbound: 15006, Outbound: 15001},
		Probes: map[string]config.Probe{
			"/app-health/app/readyz": {HTTPGet: &config.HTTPProbe{Path: "/healthz", Port: 8080}, TimeoutSeconds: 10},
			"/app-health/app/livez":  {TCPSocket: &config.TCPProbe{Port: 8082}, TimeoutSeconds: 10},
			"/app-health/app/no":     {TCPSocket: &config.TCPProbe{Port: 9999}, TimeoutSeconds: 10},
		},
	}
	if change != nil {
		change(&cfg)
	}
	b, err := json.Marshal(cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	p.config = string(b)
}

func (p *pod) command(args ...string) *exec.Cmd {
	cmd := exec.Command(p.program, append(args, "-config-env", "CASTELLAN_PROXY_CONFIG")...)
	cmd.Env = append(os.Environ(), "CASTELLAN_PROXY_CHILD=1", "GORACE=atexit_sleep_ms=0", "CASTELLAN_PROXY_CONFIG="+p.config)
	return cmd
}

// capture is the init step.
func (p *pod) capture(args ...string) {
	p.t.Helper()
	cmd := p.command(append([]string{"capture"}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := p.Start(cmd); err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		p.t.Fatalf("%v\n%s", err, &said)
	}
}

// run starts the sidecar, with no rights at all.
func (p *pod) run() {
	p.t.Helper()
	p.proxy = p.command()
	p.proxy.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: config.ProxyUID, Gid: config.ProxyUID}}
	p.proxy.Stdout, p.proxy.Stderr = p.access, p.log
	if err := p.Start(p.proxy); err != nil {
		p.t.Fatal(err)
	}
	p.ended = make(chan error, 1)
	go func(cmd *exec.Cmd, ended chan<- error) { ended <- cmd.Wait() }(p.proxy, p.ended)
	p.t.Cleanup(func() {
		p.end()
		if p.t.Failed() {
			p.t.Logf("log:\n%s\naccess:\n%s", p.log, p.access)
		}
	})
}

// end ends the sidecar as the kubelet does.
func (p *pod) end() {
	p.t.Helper()
	if p.ended == nil {
		return
	}
	_ = p.proxy.Process.Signal(syscall.SIGTERM)
	p.wait()
}

// wait expects it to end without fault; a second signal would end it at once.
func (p *pod) wait() {
	p.t.Helper()
	select {
	case err := <-p.ended:
		if err != nil {
			p.t.Errorf("the proxy ended with %v", err)
		}
	case <-time.After(patience):
		_ = p.proxy.Process.Kill()
		p.t.Errorf("the proxy did not end: %v", <-p.ended)
	}
	p.ended = nil
}

// executable is a copy of this program that another uid may run.
func executable(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "castellan-proxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "castellan-proxy")
	in, err := os.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(program, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close(), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	return program
}

// services are what the mesh knows: orders with a port for each kind of
// declaration, legacy outside the mesh, and one at which somebody else answers.
func (m *mesh) services() []*castellanv1.ServiceIdentity {
	endpoint := func(f family, n int, id string, outside bool, ports map[uint32]uint32) *castellanv1.Endpoint {
		return &castellanv1.Endpoint{Address: f.pod(n), Ports: ports, SpiffeId: id, OutsideMesh: outside}
	}
	ports := map[uint32]uint32{80: 8080, 81: 8081, 82: 8082, 83: 8083, 84: 8084}
	web := map[uint32]uint32{80: 8080}
	return []*castellanv1.ServiceIdentity{
		{
			Namespace: "shop", Name: "orders", ExpectedIds: []string{ordersID},
			Hosts: []string{"orders.shop.svc.cluster.local"}, Addresses: []string{v4.service(ordersVIP), v6.service(ordersVIP)},
			Ports: []*castellanv1.ServicePort{
				{Number: 80, Protocol: "http"}, {Number: 81, Protocol: "grpc"}, {Number: 82, Protocol: "tcp"}, {Number: 83}, {Number: 84},
			},
			Endpoints: []*castellanv1.Endpoint{endpoint(v4, ordersHost, ordersID, false, ports), endpoint(v6, ordersHost, ordersID, false, ports)},
		}, {
			Namespace: "shop", Name: "legacy", Addresses: []string{v4.service(legacyVIP), v6.service(legacyVIP)},
			Ports:     []*castellanv1.ServicePort{{Number: 80, Protocol: "http"}},
			Endpoints: []*castellanv1.Endpoint{endpoint(v4, outsiderHost, "", true, web), endpoint(v6, outsiderHost, "", true, web)},
		}, {
			Namespace: "shop", Name: "wrong", ExpectedIds: []string{trustDomain + "/ns/shop/sa/payments"}, Addresses: []string{v4.service(wrongVIP), v6.service(wrongVIP)},
			Ports:     []*castellanv1.ServicePort{{Number: 80, Protocol: "http"}},
			Endpoints: []*castellanv1.Endpoint{endpoint(v4, ordersHost, trustDomain+"/ns/shop/sa/payments", false, web), endpoint(v6, ordersHost, trustDomain+"/ns/shop/sa/payments", false, web)},
		},
	}
}

// declare says what orders' ports carry.
func (m *mesh) declare(policies string, ports map[uint32]string) {
	m.orders.agent.Policy.Ports = nil
	for number, protocol := range ports {
		m.orders.agent.Policy.Ports = append(m.orders.agent.Policy.Ports, &castellanv1.WorkloadPort{Number: number, Protocol: protocol})
	}
	m.orders.agent.Publish(policies)
	m.orders.agent.Settled()
}

// outbound sets what the frontend may do with what is not in the mesh.
func (m *mesh) outbound(settings []byte) {
	m.frontend.agent.Policy.Mesh = settings
	m.frontend.agent.Publish(strictPolicy)
	m.frontend.agent.Settled()
}

// listen serves connections at both families' addresses of a pod.
func listen(n *netnstest.NS, host, port int, serve func(net.Listener)) {
	for _, f := range []family{v4, v6} {
		go serve(n.Listen(at(f.pod(host), port)))
	}
}

// answerEach answers each connection by f.
func answerEach(f func(net.Conn)) func(net.Listener) {
	return func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); f(c) }()
		}
	}
}

// told is what an HTTP application tells of a request.
type told struct {
	Path, Host, Peer, Proto string
	Header                  http.Header
}

func web(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App", name)
		_ = json.NewEncoder(w).Encode(told{r.URL.Path, r.Host, r.RemoteAddr, r.Proto, r.Header})
	})
}

func serveHTTP(h http.Handler) func(net.Listener) {
	return func(l net.Listener) {
		s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, Protocols: new(http.Protocols)}
		s.Protocols.SetHTTP1(true)
		s.Protocols.SetUnencryptedHTTP2(true)
		_ = s.Serve(l)
	}
}

// client sends requests from a pod as one of its applications.
func client(t *testing.T, n *netnstest.NS) *http.Client {
	transport := &http.Transport{DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
		return n.DialAs(1000, net.Dialer{Timeout: patience}, addr)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

type answer struct {
	status int
	body   string
	app    string
	told   told
}

func ask(t *testing.T, c *http.Client, url string, change func(*http.Request)) (answer, error) {
	t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(req)
	}
	resp, err := c.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	a := answer{status: resp.StatusCode, body: string(body), app: resp.Header.Get("X-App")}
	_ = json.Unmarshal(body, &a.told)
	return a, err
}

// get expects an answer.
func get(t *testing.T, n *netnstest.NS, url string) answer {
	t.Helper()
	a, err := ask(t, client(t, n), url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// conversation is a raw connection with deadlines.
type conversation struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

func talk(t *testing.T, n *netnstest.NS, addr string) *conversation {
	t.Helper()
	c, err := n.DialAs(1000, net.Dialer{Timeout: patience}, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &conversation{c, t, bufio.NewReader(c)}
}

func (c *conversation) say(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		c.t.Fatal(err)
	}
}

func (c *conversation) hear(want string) {
	c.t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c.r, got); err != nil || string(got) != want {
		c.t.Fatalf("heard %q, want %q: %v", got[:n], want, err)
	}
}

// over expects the other side to have ended it, one way or the other.
func (c *conversation) over() {
	c.t.Helper()
	if b, err := io.ReadAll(c.r); len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Fatalf("heard %q: %v", b, err)
	}
}

// logged waits for a line of a log that holds all parts.
func logged(t *testing.T, l *lines, parts ...string) string {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
	lines:
		for line := range strings.SplitSeq(l.String(), "\n") {
			for _, p := range parts {
				if !strings.Contains(line, p) {
					continue lines
				}
			}
			return line
		}
	}
	t.Fatalf("no line with %q", parts)
	return ""
}
