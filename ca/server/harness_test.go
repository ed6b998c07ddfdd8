package server_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	istiov1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca"
	"castellan.dev/ca/attest"
	"castellan.dev/ca/attest/attesttest"
	"castellan.dev/ca/ledger"
	"castellan.dev/ca/server"
	"castellan.dev/identity"
	"castellan.dev/internal/crowd"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
	"castellan.dev/internal/tlsconf"
	"castellan.dev/internal/workloads"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const issuerName = "https://workloads.test"

func orders() jwstest.Pod {
	return jwstest.Pod{Namespace: "shop", Account: "orders", AccountUID: "sa-orders", Name: "orders-1", UID: "pod-orders", Node: "node-a", NodeUID: "uid-a"}
}

func agentPod(node string) jwstest.Pod {
	return jwstest.Pod{Namespace: "castellan-system", Account: "castellan-agent", AccountUID: "sa-agent", Name: "agent-" + node, UID: "pod-agent-" + node, Node: node, NodeUID: "uid-" + strings.TrimPrefix(node, "node-")}
}

func account(t testing.TB, s string) identity.Account {
	t.Helper()
	a, err := identity.ParseAccount(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// logBuffer keeps JSON log records.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
	all bytes.Buffer // never emptied
	to  io.Writer    // in place of both, when set
}

func (b *logBuffer) divert(to io.Writer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.to = to
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.to != nil {
		return b.to.Write(p)
	}
	b.all.Write(p)
	return b.buf.Write(p)
}

// holds reports whether text was ever written.
func (b *logBuffer) holds(text string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Contains(b.all.Bytes(), []byte(text))
}

// take returns the records so far and forgets them.
func (b *logBuffer) take(t testing.TB) []map[string]any {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var records []map[string]any
	for line := range strings.Lines(b.buf.String()) {
		var r map[string]any
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("log line %q: %v", line, err)
		}
		records = append(records, r)
	}
	b.buf.Reset()
	return records
}

// world is a whole authority behind real TLS and gRPC.
type world struct {
	t         testing.TB
	ledger    ledger.Ledger
	authority *ca.Authority
	issuer    *jwstest.Issuer
	keys      *jws.File
	pods      atomic.Pointer[workloads.File]
	log       *logBuffer
	registry  *prometheus.Registry
	address   string
	conn      *grpc.ClientConn
	gate      *server.Gate

	agentToken string
}

// options override what the world is made of.
type options struct {
	limits  server.Limits
	direct  []identity.Account
	trusted []identity.Account
	issuer  func(server.Issuer) server.Issuer
	pods    func(attest.Pods) attest.Pods
	discard bool // no log at all
	timeout time.Duration
	now     func() time.Time
	review  bool // tokens are verified by review
	callers int  // connections without an agent's certificate; 0: any number
}

func newWorld(t testing.TB, o options) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, log: &logBuffer{}, registry: prometheus.NewRegistry(), issuer: jwstest.RSA(t, issuerName, "k1")}
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	log := slog.New(slog.NewJSONHandler(w.log, nil))
	ctx := t.Context()

	sqlite, err := ledger.Open(ctx, ledger.Config{Path: filepath.Join(dir, "ledger.db")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sqlite.Close() })
	w.ledger = sqlite
	w.authority, err = ca.Open(ctx, ca.Config{
		TrustDomain: td, DataDir: dir, Ledger: w.ledger,
		ServingNames: []string{"localhost"}, ServingIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.authority.Close() })

	keyFile := filepath.Join(dir, "keys.json")
	if err := os.WriteFile(keyFile, jwstest.JWKS(t, w.issuer), 0o600); err != nil {
		t.Fatal(err)
	}
	if w.keys, err = jws.NewFile(keyFile, log, nil); err != nil {
		t.Fatal(err)
	}
	w.setPods(orders())
	pods := attest.Pods(attest.NewFilePods(w.pods.Load))
	if o.pods != nil {
		pods = o.pods(pods)
	}
	agents := []identity.Account{account(t, "castellan-system/castellan-agent")}
	attestation := attest.Config{
		TrustDomain: td, Pods: pods, AgentAccounts: agents, DirectCallers: o.direct, TrustedNodeAccounts: o.trusted,
	}
	if audiences := []string{"castellan.dev", "istio-ca"}; o.review {
		attestation.Reviewer = &attesttest.Reviewer{Issuer: issuerName, Keys: w.keys.Keys, Pods: w.pods.Load}
		attestation.ReviewAudiences, attestation.ReviewCluster = audiences, "Kubernetes"
	} else {
		attestation.Issuers = []attest.Issuer{{Name: issuerName, Audiences: audiences, Cluster: "Kubernetes", Keys: w.keys}}
	}
	attestor, err := attest.New(attestation)
	if err != nil {
		t.Fatal(err)
	}
	issuer := server.Issuer(w.authority.Issuer())
	if o.issuer != nil {
		issuer = o.issuer(issuer)
	}
	if o.discard {
		log = nil
	}
	s, err := server.New(server.Config{
		Attestor: attestor, Issuer: issuer, JWTIssuer: w.authority.JWTIssuer(),
		Limits: o.limits, Log: log, Registerer: w.registry, Now: o.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	verifier := tlsconf.NewVerifier(func() *tlsconf.Trust {
		return &tlsconf.Trust{TrustDomain: td, Roots: w.authority.Bundle().Roots, Version: "1"}
	}, nil)
	w.gate, err = server.NewGate(server.GateConfig{
		Verifier: verifier, TrustDomain: td, AgentAccounts: agents, Open: server.OpenMethods(), Log: log, Registerer: w.registry,
		UnaryTimeout: o.timeout, Now: o.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	tlsConfig := tlsconf.ServerConfig(nil, verifier, tlsconf.ServerOptions{NextProtos: []string{"h2"}, InsecureOptionalClient: true})
	tlsConfig.GetCertificate = w.authority.ServingCertificate()
	g := server.NewFront(tlsConfig, w.gate)
	s.Register(g)
	healthv1.RegisterHealthServer(g, health.NewServer()) // stands for every gated method
	castellanv1.RegisterNodeServer(g, castellanv1.UnimplementedNodeServer{})
	w.serve(g, o.callers)
	w.conn = w.dial(nil)
	w.agentToken = w.issuer.PodToken(t, time.Now(), agentPod("node-a"), "castellan.dev")
	return w
}

func (w *world) serve(g *server.Front, callers int) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.address = l.Addr().String()
	if callers > 0 {
		l = crowd.Limit(l, crowd.Bounds{Total: callers, PerSource: callers}, crowd.Bounds{Total: 1, PerSource: 1})
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	w.t.Cleanup(func() { g.Stop(); <-done })
}

// dial connects as any caller does: by the bundle and the server's name.
func (w *world) dial(cert *tls.Certificate, opts ...grpc.DialOption) *grpc.ClientConn {
	w.t.Helper()
	roots := x509.NewCertPool()
	for _, c := range w.authority.Bundle().Roots {
		roots.AddCert(c)
	}
	cfg := &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS13}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(w.address, append(opts, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

// setPods replaces the workloads file.
func (w *world) setPods(pods ...jwstest.Pod) {
	file := &workloads.File{}
	for _, p := range pods {
		file.Workloads = append(file.Workloads, workloads.Workload{
			Namespace: p.Namespace, ServiceAccount: p.Account, ServiceAccountUID: p.AccountUID,
			PodName: p.Name, PodUID: p.UID, Node: p.Node,
		})
	}
	w.pods.Store(file)
}

// token returns a fresh token of a pod.
func (w *world) token(p jwstest.Pod) string {
	w.t.Helper()
	return w.issuer.PodToken(w.t, time.Now(), p, "castellan.dev")
}

// as returns a context with the two credentials; an empty one is left out.
func as(ctx context.Context, workload, agent string, more ...string) context.Context {
	if workload != "" {
		more = append(more, "authorization", "Bearer "+workload)
	}
	if agent != "" {
		more = append(more, "castellan-agent-token", agent)
	}
	return metadata.AppendToOutgoingContext(ctx, more...)
}

// csr returns a request signed by a new P-256 key.
func csr(t testing.TB, change ...func(*x509.CertificateRequest)) (string, crypto.Signer) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return csrOf(t, key, change...), key
}

func csrOf(t testing.TB, key crypto.Signer, change ...func(*x509.CertificateRequest)) string {
	t.Helper()
	template := &x509.CertificateRequest{}
	for _, c := range change {
		c(template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func (w *world) create(ctx context.Context, req *istiov1.IstioCertificateRequest) (*istiov1.IstioCertificateResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return istiov1.NewIstioCertificateServiceClient(w.conn).CreateCertificate(ctx, req)
}

func (w *world) mint(ctx context.Context, req *castellanv1.MintJWTRequest) (*castellanv1.MintJWTResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return castellanv1.NewIdentityClient(w.conn).MintJWT(ctx, req)
}

func newEC(t testing.TB, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
