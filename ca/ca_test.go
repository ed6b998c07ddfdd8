package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"castellan.dev/ca"
	"castellan.dev/ca/ledger/ledgertest"
	"castellan.dev/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is the time of the authority under test.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// env is one authority's surroundings; Open may be called again for a restart.
type env struct {
	t      *testing.T
	clock  *clock
	ledger *ledgertest.Memory
	log    *strings.Builder
	reg    *prometheus.Registry
	cfg    ca.Config
	open   *ca.Authority
}

func newEnv(t *testing.T, change ...func(*ca.Config)) *env {
	t.Helper()
	e := &env{t: t, clock: newClock(), log: &strings.Builder{}}
	e.ledger = &ledgertest.Memory{Now: e.clock.Now}
	e.cfg = ca.Config{
		TrustDomain:  spiffeid.RequireTrustDomainFromString("cluster.local"),
		DataDir:      t.TempDir(),
		ServingNames: []string{"localhost", "castellan.example"},
		ServingIPs:   []netip.Addr{netip.MustParseAddr("127.0.0.1")},
		Ledger:       e.ledger,
		Log:          slog.New(slog.NewTextHandler(e.log, nil)),
		Now:          e.clock.Now,
	}
	for _, c := range change {
		c(&e.cfg)
	}
	t.Cleanup(e.Close)
	return e
}

func (e *env) Close() {
	if e.open != nil {
		e.open.Close()
		e.open = nil
	}
}

// TryOpen opens or restarts the authority.
func (e *env) TryOpen() (*ca.Authority, error) {
	e.t.Helper()
	e.Close()
	e.reg = prometheus.NewRegistry()
	e.cfg.Registerer = e.reg
	a, err := ca.Open(e.t.Context(), e.cfg)
	if err == nil {
		e.open = a
	}
	return a, err
}

func (e *env) Open() *ca.Authority {
	e.t.Helper()
	a, err := e.TryOpen()
	if err != nil {
		e.t.Fatalf("open: %v", err)
	}
	return a
}

func workload(t testing.TB, id string) identity.Workload {
	t.Helper()
	w, err := identity.FromID(spiffeid.RequireFromString(id))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

const ordersID = "spiffe://cluster.local/ns/shop/sa/orders"

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, template *x509.CertificateRequest, key crypto.Signer) []byte {
	t.Helper()
	if template == nil {
		template = &x509.CertificateRequest{}
	}
	if key == nil {
		key = newKey(t)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// request is a good one for orders.
func request(t testing.TB) ca.Request {
	return ca.Request{
		CSR: newCSR(t, nil, nil), Workload: workload(t, ordersID),
		PodUID: "pod-1", Node: "node-1", Cluster: "Kubernetes", Attestor: "https://issuer.example",
	}
}

func issue(t testing.TB, a *ca.Authority, r ca.Request) (*ca.Issued, *x509.Certificate) {
	t.Helper()
	issued, err := a.Issuer().Issue(t.Context(), r)
	if err != nil {
		t.Fatalf("issue: %v", err)
	}
	return issued, parse(t, issued.Chain[0])
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func pool(t testing.TB, ders ...[]byte) *x509.CertPool {
	p := x509.NewCertPool()
	for _, d := range ders {
		p.AddCert(parse(t, d))
	}
	return p
}

func verify(t testing.TB, chain, roots [][]byte, now time.Time, usages ...x509.ExtKeyUsage) error {
	t.Helper()
	_, err := parse(t, chain[0]).Verify(x509.VerifyOptions{
		Roots: pool(t, roots...), Intermediates: pool(t, chain[1:]...), CurrentTime: now, KeyUsages: usages,
	})
	return err
}

func byRole(t testing.TB, a *ca.Authority, role ca.Role) *x509.Certificate {
	t.Helper()
	for _, c := range a.Certificates() {
		if c.Role == role {
			return c.Cert
		}
	}
	t.Fatalf("no certificate of role %s", role)
	return nil
}

// contains fails unless err says what it should.
func contains(t *testing.T, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", want)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q lacks %q", err, w)
		}
	}
}

// plainAuthority is one with real time and defaults.
func plainAuthority(t testing.TB) *ca.Authority {
	t.Helper()
	a, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), DataDir: t.TempDir(), Ledger: &ledgertest.Memory{},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}
