package proxy_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"castellan.dev/internal/config"
	"castellan.dev/internal/tlsconf/tlsconftest"
	"castellan.dev/internal/xds"
	"castellan.dev/proxy"
	"castellan.dev/proxy/accesslog"
	"castellan.dev/proxy/proxytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	td       = "spiffe://cluster.local"
	frontend = td + "/ns/shop/sa/frontend"
	orders   = td + "/ns/shop/sa/orders"
	payments = td + "/ns/shop/sa/payments"
	intruder = td + "/ns/guest/sa/intruder"

	secretType = proxytest.SecretType
	policyType = proxytest.PolicyType
	jwksType   = proxytest.JWKSType

	workloadPort = proxytest.Port
	patience     = 15 * time.Second
)

// eventually polls until ok holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within %s: %s", patience, what)
}

type agent = proxytest.Agent

func newAgent(t testing.TB, root *tlsconftest.CA, id string) *agent {
	t.Helper()
	return proxytest.NewAgent(t, root, id)
}

func resource(t testing.TB, name string, m proto.Message) xds.Resource {
	t.Helper()
	return proxytest.Resource(t, name, m)
}

// buffer is a log that may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// running is a proxy under test.
type running struct {
	*proxy.Proxy
	t        testing.TB
	agent    *agent
	inbound  string
	outbound []string
	log      *buffer
	access   *buffer
	registry *prometheus.Registry
	stop     func() error
}

type option func(*config.Proxy)

func outboundTo(services ...string) option {
	return func(c *config.Proxy) {
		for _, s := range services {
			c.Outbound = append(c.Outbound, config.Outbound{Listen: "127.0.0.1:0", Service: s, Port: 80})
		}
	}
}

// start runs a proxy for the agent's workload in front of app and waits until it has an identity.
func start(t testing.TB, a *agent, app string, options ...option) *running {
	t.Helper()
	cfg := config.Proxy{
		Header:      config.Header{APIVersion: config.APIVersion, Kind: "ProxyConfig"},
		AgentSocket: a.Socket,
		Inbound:     []config.Inbound{{Listen: "127.0.0.1:0", Port: workloadPort, App: app}},
	}
	for _, o := range options {
		o(&cfg)
	}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	r := &running{t: t, agent: a, log: &buffer{}, access: &buffer{}, registry: prometheus.NewRegistry()}
	var err error
	r.Proxy, err = proxy.New(proxy.Config{
		Proxy: cfg, AccessLog: accesslog.New(r.access), Registerer: r.registry,
		Log: slog.New(slog.NewJSONHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Listen(); err != nil {
		t.Fatal(err)
	}
	for i, addr := range r.Addrs() {
		if i < len(cfg.Inbound) {
			r.inbound = addr.String()
		} else {
			r.outbound = append(r.outbound, addr.String())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("proxy: %v", err)
		}
		if t.Failed() {
			t.Logf("log:\n%s\naccess:\n%s", r.log, r.access)
		}
	})
	return r
}

func (r *running) ready() *running {
	r.t.Helper()
	r.agent.Settled()
	if err := errors.Join(r.CheckIdentity(), r.CheckPolicy()); err != nil {
		r.t.Fatal(err)
	}
	return r
}

// logged waits for a line of the access log that holds all parts.
func (r *running) logged(parts ...string) string {
	r.t.Helper()
	return waitLine(r.t, r.access, parts...)
}

func waitLine(t testing.TB, b *buffer, parts ...string) (line string) {
	t.Helper()
	eventually(t, fmt.Sprintf("a line with %q", parts), func() bool {
	lines:
		for line = range strings.SplitSeq(b.String(), "\n") {
			for _, p := range parts {
				if !strings.Contains(line, p) {
					continue lines
				}
			}
			return true
		}
		return false
	})
	return line
}

func (r *running) metric(name string) float64 {
	r.t.Helper()
	families, err := r.registry.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	var sum float64
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

// echo is an application that answers what it was asked, as JSON.
type echo struct {
	Method, Path, Query, Host string
	Header                    http.Header
	Body                      string
}

func newApp(t testing.TB) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_ = json.NewEncoder(w).Encode(echo{r.Method, r.URL.EscapedPath(), r.URL.RawQuery, r.Host, r.Header, string(body)})
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// newTCPApp answers each connection by f.
func newTCPApp(t testing.TB, f func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { defer c.Close(); f(c) })
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	return l.Addr().String()
}

// clientTLS is a client of the mesh that does not look at who answers.
func clientTLS(cert *tls.Certificate, protos ...string) *tls.Config {
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: protos}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	return cfg
}

// httpClient speaks HTTP/1.1 over mutual TLS as cert, or plainly without one.
func httpClient(t testing.TB, cert *tls.Certificate, protos ...string) (*http.Client, string) {
	t.Helper()
	transport := &http.Transport{TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}}
	scheme := "http"
	if cert != nil {
		scheme = "https"
		if protos == nil {
			protos = []string{"http/1.1"}
		}
		transport.TLSClientConfig = clientTLS(cert, protos...)
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}, scheme
}

type answer struct {
	status int
	body   string
	header http.Header
	echo   echo
}

func ask(t testing.TB, c *http.Client, req *http.Request) answer {
	t.Helper()
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := answer{status: resp.StatusCode, body: string(body), header: resp.Header}
	_ = json.Unmarshal(body, &a.echo)
	return a
}

// get asks for a path as the given certificate; header fields follow as name, value.
func get(t testing.TB, addr string, cert *tls.Certificate, path string, header ...string) answer {
	t.Helper()
	c, scheme := httpClient(t, cert)
	req, err := http.NewRequest("GET", scheme+"://"+addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	return ask(t, c, req)
}

const strict = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: castellan-system}
spec: {mtls: {mode: STRICT}}
---
`

func mode(m string) string { return strings.Replace(strict, "STRICT", m, 1) }

const frontendMayGet = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: orders, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: ALLOW
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/frontend"]}}]
    to: [{operation: {methods: ["GET"]}}]
---
`

func newRegistry() *prometheus.Registry { return prometheus.NewRegistry() }

// newStreamApp serves HTTP/1.1 and, by prior knowledge, HTTP/2.
func newStreamApp(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return s.Listener.Addr().String()
}
