package proxy_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/config"
	"castellan.dev/internal/tlsconf/tlsconftest"
	"castellan.dev/internal/xds"
	"castellan.dev/proxy"
	"castellan.dev/proxy/accesslog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	td       = "spiffe://cluster.local"
	frontend = td + "/ns/shop/sa/frontend"
	orders   = td + "/ns/shop/sa/orders"
	payments = td + "/ns/shop/sa/payments"
	intruder = td + "/ns/guest/sa/intruder"

	secretType  = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	policyType  = "type.googleapis.com/castellan.v1.WorkloadPolicy"
	serviceType = "type.googleapis.com/castellan.v1.ServiceIdentity"
	jwksType    = "type.googleapis.com/castellan.v1.Jwks"
	bundleType  = "type.googleapis.com/castellan.v1.Bundle"
	deniedType  = "type.googleapis.com/castellan.v1.Denylist"

	workloadPort = 8080
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

// agent serves one workload's resources on a socket, as castellan-agent does.
type agent struct {
	t        testing.TB
	socket   string
	table    *xds.Table
	recorder xds.Recorder
	root     *tlsconftest.CA
	issuer   *tlsconftest.CA
	policy   *castellanv1.WorkloadPolicy
	services map[string]*castellanv1.ServiceIdentity
	stop     func()
}

type deltaStream = grpc.GenericServerStream[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]

func newAgent(t testing.TB, root *tlsconftest.CA, id string) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "cp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := &agent{
		t: t, socket: filepath.Join(dir, "s"), root: root, issuer: root.SVIDIssuer(t),
		table:    xds.NewTable(secretType, policyType, serviceType, jwksType, bundleType, deniedType),
		services: map[string]*castellanv1.ServiceIdentity{},
	}
	for _, typeURL := range []string{serviceType, jwksType, bundleType, deniedType} {
		a.table.Set(typeURL, xds.Snapshot{})
	}
	account := strings.Split(strings.TrimPrefix(id, td+"/ns/"), "/sa/")
	a.policy = &castellanv1.WorkloadPolicy{
		Namespace: account[0], ServiceAccount: account[1], TrustDomain: "cluster.local",
		Labels: map[string]string{"app": account[1]},
		Mesh:   []byte(`{"trustDomain":"cluster.local","rootNamespace":"castellan-system"}`),
		Ports:  []*castellanv1.WorkloadPort{{Number: workloadPort, Protocol: "http"}},
	}
	a.serve()
	t.Cleanup(func() { a.stop() })
	return a
}

// serve opens the socket and serves every stream from the table.
func (a *agent) serve() {
	a.t.Helper()
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	server := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		cfg := xds.Config{Source: a.table, Observer: &a.recorder, Types: []string{secretType}}
		if strings.HasSuffix(method, "/DeltaAggregatedResources") {
			cfg.Types = []string{policyType, serviceType, jwksType, bundleType, deniedType}
		}
		return xds.ServeDelta(&deltaStream{ServerStream: stream}, cfg)
	}))
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	a.stop = sync.OnceFunc(func() { server.Stop(); <-done })
}

func pemOf(kind string, blocks ...[]byte) []byte {
	var out []byte
	for _, b := range blocks {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b})...)
	}
	return out
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func resource(t testing.TB, name string, m proto.Message) xds.Resource {
	t.Helper()
	r, err := xds.NewResource(name, m)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// secrets publishes a certificate and the roots that are trusted.
func (a *agent) secrets(cert *tls.Certificate, roots ...*tlsconftest.CA) {
	a.t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		a.t.Fatal(err)
	}
	var ders [][]byte
	for _, r := range roots {
		ders = append(ders, r.Cert.Raw)
	}
	a.table.Set(secretType, xds.NewSnapshot(
		resource(a.t, "default", &tlsv3.Secret{Name: "default", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(pemOf("CERTIFICATE", cert.Certificate...)), PrivateKey: inline(pemOf("PRIVATE KEY", key)),
		}}}),
		resource(a.t, "ROOTCA", &tlsv3.Secret{Name: "ROOTCA", Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: inline(pemOf("CERTIFICATE", ders...)),
		}}}),
	))
}

// publish sends policies, YAML documents separated by "---".
func (a *agent) publish(documents string) {
	a.t.Helper()
	a.policy.Documents = nil
	for _, doc := range strings.Split(documents, "---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		j, err := yaml.YAMLToJSON([]byte(doc))
		if err != nil {
			a.t.Fatal(err)
		}
		a.policy.Documents = append(a.policy.Documents, j)
	}
	a.table.Set(policyType, xds.NewSnapshot(resource(a.t, "uid-1", a.policy)))
}

// service publishes a destination with one port 80 and the endpoints' addresses by identity.
func (a *agent) service(name, protocol string, expected []string, endpoints ...[2]string) {
	a.t.Helper()
	s := &castellanv1.ServiceIdentity{
		Namespace: "shop", Name: name, ExpectedIds: expected,
		Hosts: []string{name, name + ".shop", name + ".shop.svc.cluster.local"},
		Ports: []*castellanv1.ServicePort{{Name: "p", Number: 80, Protocol: protocol}},
	}
	for _, e := range endpoints {
		host, port, err := net.SplitHostPort(e[0])
		if err != nil {
			a.t.Fatal(err)
		}
		n, _ := strconv.Atoi(port)
		s.Endpoints = append(s.Endpoints, &castellanv1.Endpoint{Address: host, Ports: map[uint32]uint32{80: uint32(n)}, SpiffeId: e[1]})
	}
	a.services[name] = s
	var all []xds.Resource
	for name, s := range a.services {
		all = append(all, resource(a.t, "shop/"+name, s))
	}
	a.table.Set(serviceType, xds.NewSnapshot(all...))
}

func (a *agent) deny(d *castellanv1.Denylist) {
	a.t.Helper()
	a.table.Set(deniedType, xds.NewSnapshot(resource(a.t, "default", d)))
}

// settled waits until the proxy has acknowledged everything published.
func (a *agent) settled() {
	a.t.Helper()
	eventually(a.t, "everything acknowledged", func() bool {
		acked := map[string]string{}
		for _, r := range a.recorder.Records() {
			acked[r.TypeURL+r.Name] = r.Acked
		}
		for _, typeURL := range []string{secretType, policyType, serviceType, jwksType, deniedType} {
			snapshot, _ := a.table.Resources(typeURL)
			for name, r := range snapshot {
				if acked[typeURL+name] != r.Version {
					return false
				}
			}
		}
		return true
	})
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
		AgentSocket: a.socket,
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
	r.agent.settled()
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
