package ca_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"castellan.dev/ca"
	"castellan.dev/ca/ledger"
	"castellan.dev/identity"
)

func extension(t *testing.T, c *x509.Certificate, last int) (critical bool, value []byte) {
	t.Helper()
	for _, e := range c.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, last}) {
			return e.Critical, e.Value
		}
	}
	t.Fatalf("no extension 2.5.29.%d", last)
	return false, nil
}

func TestSVIDProfile(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	issued, leaf := issue(t, a, request(t))
	issuer := parse(t, issued.Chain[1])
	check := func(name string, ok bool) {
		t.Run(name, func(t *testing.T) {
			if !ok {
				t.Errorf("does not hold for %+v", leaf)
			}
		})
	}
	sanCritical, _ := extension(t, leaf, 17)
	kuCritical, _ := extension(t, leaf, 15)
	bcCritical, _ := extension(t, leaf, 19)
	issuerKU, _ := extension(t, issuer, 15)
	check("spiffe-01 scheme", leaf.URIs[0].Scheme == "spiffe" && leaf.URIs[0].RawQuery == "" && leaf.URIs[0].User == nil && leaf.URIs[0].Port() == "")
	check("spiffe-06 exactly one URI SAN", len(leaf.URIs) == 1 && leaf.URIs[0].String() == ordersID &&
		len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) == 0)
	check("spiffe-07 path, and SAN critical as the subject is empty", leaf.URIs[0].Path == "/ns/shop/sa/orders" && sanCritical && leaf.Subject.String() == "")
	check("spiffe-08 leaf no CA, issuer CA", !leaf.IsCA && leaf.BasicConstraintsValid && bcCritical && issuer.IsCA)
	check("spiffe-09 key usage critical on both", kuCritical && issuerKU)
	check("spiffe-10 digitalSignature only", leaf.KeyUsage == x509.KeyUsageDigitalSignature)
	check("spiffe-11 both extended key usages", slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}))
	check("spiffe-12 issuer keyCertSign with the trust domain's ID", issuer.KeyUsage&x509.KeyUsageCertSign != 0 && len(issuer.URIs) == 1 && issuer.URIs[0].String() == "spiffe://cluster.local")
	_, bad := identity.FromCertificate(issuer)
	check("spiffe-13 the issuer authenticates nobody", bad != nil)
	check("serial: 128 bits, positive", leaf.SerialNumber.Sign() > 0 && leaf.SerialNumber.BitLen() <= 128 && leaf.SerialNumber.BitLen() > 64)
	check("key identifiers", len(leaf.SubjectKeyId) == 20 && slices.Equal(leaf.AuthorityKeyId, issuer.SubjectKeyId))
	check("no roots in the chain", len(issued.Chain) == 2 && len(issued.Roots) == 1)

	t.Run("spiffe-14 go-spiffe verifies the chain", func(t *testing.T) {
		td := spiffeid.RequireTrustDomainFromString("cluster.local")
		id, _, err := x509svid.Verify([]*x509.Certificate{leaf, issuer}, x509bundle.FromX509Authorities(td, a.Bundle().Roots), x509svid.WithTime(e.clock.Now()))
		if err != nil || id.String() != ordersID {
			t.Fatalf("%v, %v", id, err)
		}
	})
	t.Run("both usages verify", func(t *testing.T) {
		for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
			if err := verify(t, issued.Chain, issued.Roots, e.clock.Now(), usage); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("serials differ", func(t *testing.T) {
		if _, other := issue(t, a, request(t)); other.SerialNumber.Cmp(leaf.SerialNumber) == 0 {
			t.Error("twice the same")
		}
	})
}

func TestTTL(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	for name, c := range map[string]struct{ asked, want, backdate time.Duration }{
		"default when zero":     {0, time.Hour, 30 * time.Second},
		"default when negative": {-time.Minute, time.Hour, 30 * time.Second},
		"as asked":              {10 * time.Minute, 10 * time.Minute, 30 * time.Second},
		"capped":                {100 * day, day, 30 * time.Second},
		"short backdate":        {time.Minute, time.Minute, 6 * time.Second},
		"shortest backdate":     {10 * time.Second, 10 * time.Second, time.Second},
		"no room for backdate":  {5 * time.Second, 5 * time.Second, 0},
	} {
		t.Run("trust rule 10 "+name, func(t *testing.T) {
			r := request(t)
			r.TTL = c.asked
			issued, leaf := issue(t, a, r)
			now := e.clock.Now()
			if got := leaf.NotAfter.Sub(now); got != c.want {
				t.Errorf("valid for %v after issue, want %v", got, c.want)
			}
			if got := now.Sub(leaf.NotBefore); got != c.backdate {
				t.Errorf("backdated %v, want %v", got, c.backdate)
			}
			if !issued.NotAfter.Equal(leaf.NotAfter) || !issued.NotBefore.Equal(leaf.NotBefore) {
				t.Errorf("answer says %v to %v", issued.NotBefore, issued.NotAfter)
			}
		})
	}
	r := request(t)
	r.TTL = time.Millisecond
	_, err := a.Issuer().Issue(t.Context(), r)
	contains(t, err, "ca: ttl: 1ms is shorter than 1s")
}

const day = 24 * time.Hour

// A client that renews at half of [notBefore, notAfter] must find itself before
// that point right after issue, wherever in a second it asks.
func TestHalfLifeIsAhead(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	for _, ttl := range []time.Duration{2 * time.Second, 3 * time.Second, 10 * time.Second, time.Minute} {
		for range 10 {
			e.clock.Add(170 * time.Millisecond)
			r := request(t)
			r.TTL = ttl
			_, leaf := issue(t, a, r)
			now := e.clock.Now()
			if half := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2); !now.Before(half) {
				t.Errorf("ttl %v at %v: half-life %v is not ahead", ttl, now, half)
			}
			if leaf.NotBefore.After(now) {
				t.Errorf("ttl %v: not valid yet", ttl)
			}
		}
	}
}

func TestLedgerRowMatchesCertificate(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	issued, leaf := issue(t, a, request(t))
	row, err := e.ledger.BySerial(t.Context(), issued.Serial)
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case row.SPIFFEID.String() != ordersID, row.PodUID != "pod-1", row.Node != "node-1", row.Cluster != "Kubernetes", row.Attestor != "https://issuer.example":
		t.Errorf("attestation: %+v", row)
	case !slices.Equal(row.SubjectKeyID, leaf.SubjectKeyId), !slices.Equal(row.IssuerKeyID, leaf.AuthorityKeyId):
		t.Errorf("keys: %+v", row)
	case row.TBSHash != sha256.Sum256(leaf.RawTBSCertificate):
		t.Error("what was recorded is not what was signed")
	case row.LeafHash != sha256.Sum256(leaf.Raw), row.Outcome != ledger.Issued:
		t.Errorf("result: %+v", row)
	case !row.NotBefore.Equal(leaf.NotBefore), !row.NotAfter.Equal(leaf.NotAfter):
		t.Errorf("times: %+v", row)
	case row.Serial != leaf.SerialNumber.Text(16):
		t.Errorf("serial: %+v", row)
	}
}

// What the authority signs for itself is recorded too.
func TestEverySignatureIsInTheLedger(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	for _, c := range a.Certificates() {
		row, err := e.ledger.BySerial(t.Context(), ca.SerialString(c.Cert.SerialNumber))
		if err != nil || row.Attestor != ledger.AttestorAuthority || row.TBSHash != sha256.Sum256(c.Cert.RawTBSCertificate) {
			t.Errorf("%s: %v, %+v", c.Role, err, row)
		}
	}
}

func TestLedgerUnavailableStopsSigning(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	before, _ := e.ledger.Rows(t.Context())
	e.ledger.Fail(errors.New("disk full"))
	issued, err := a.Issuer().Issue(t.Context(), request(t))
	if !errors.Is(err, ca.ErrLedger) || issued != nil {
		t.Fatalf("trust rule 7: issued %v, error %v", issued, err)
	}
	contains(t, err, "disk full", "nothing was signed")
	e.ledger.Fail(nil)
	if after, _ := e.ledger.Rows(t.Context()); after != before {
		t.Fatalf("rows %d, want %d", after, before)
	}
	issue(t, a, request(t))
	if got := counter(t, e.reg, "castellan_ca_svid_requests_total", "ledger"); got != 1 {
		t.Errorf("metric is %v", got)
	}
	// Nor does an authority start that cannot record its issuers.
	fresh := newEnv(t)
	fresh.ledger.Fail(errors.New("disk full"))
	_, err = fresh.TryOpen()
	contains(t, err, "make the root", "disk full")
}

func TestCancelledRequestSignsNothing(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	before, _ := e.ledger.Rows(t.Context())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Issuer().Issue(ctx, request(t)); !errors.Is(err, context.Canceled) || errors.Is(err, ca.ErrLedger) {
		t.Fatalf("error %v", err)
	}
	if after, _ := e.ledger.Rows(t.Context()); after != before {
		t.Fatal("a row was written")
	}
}

func TestForeignTrustDomainIsNotSigned(t *testing.T) {
	e := newEnv(t)
	r := request(t)
	r.Workload = workload(t, "spiffe://other.example/ns/shop/sa/orders")
	_, err := e.Open().Issuer().Issue(t.Context(), r)
	contains(t, err, "not of this trust domain")
	_, err = e.open.Issuer().Issue(t.Context(), ca.Request{CSR: r.CSR})
	contains(t, err, "not of this trust domain")
}

func TestServingCertificate(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	cert, err := a.ServingCertificate()(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	roots := a.Bundle().RootsDER()
	if err := verify(t, cert.Certificate, roots, e.clock.Now(), x509.ExtKeyUsageServerAuth); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"localhost", "castellan.example", "127.0.0.1"} {
		if err := cert.Leaf.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	if _, err := identity.FromCertificate(cert.Leaf); err == nil {
		t.Error("the serving certificate is an SVID")
	}
	none := newEnv(t, func(c *ca.Config) { c.ServingNames, c.ServingIPs = nil, nil })
	_, err = none.Open().ServingCertificate()(nil)
	contains(t, err, "no serving names are configured")
}

func TestConfigurationIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*ca.Config)
		want   string
	}{
		"leaf longer than max":   {func(c *ca.Config) { c.LeafTTL, c.MaxLeafTTL = 2*time.Hour, time.Hour }, "maxLeafTTL 1h0m0s is shorter than leafTTL 2h0m0s"},
		"no room in issuer":      {func(c *ca.Config) { c.IntermediateTTL = 30 * time.Hour }, "intermediateTTL 30h0m0s must be at least twice maxLeafTTL"},
		"no room in root":        {func(c *ca.Config) { c.RootTTL = 8 * day }, "rootTTL 192h0m0s must be at least twice intermediateTTL"},
		"tiny leaf":              {func(c *ca.Config) { c.LeafTTL = time.Millisecond }, "leafTTL 1ms is shorter than 1s"},
		"negative backdate":      {func(c *ca.Config) { c.Backdate = -1 }, "backdate must not be negative"},
		"long JWT":               {func(c *ca.Config) { c.JWTTTL = 25 * time.Hour }, "jwtTTL 25h0m0s is longer than maxLeafTTL"},
		"no ledger":              {func(c *ca.Config) { c.Ledger = nil }, "no ledger: nothing may be signed without one"},
		"no directory":           {func(c *ca.Config) { c.DataDir = "" }, "no data directory"},
		"no trust domain":        {func(c *ca.Config) { c.TrustDomain = spiffeid.TrustDomain{} }, "trust domain"},
		"spiffe-05 address":      {func(c *ca.Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("10.0.0.1") }, "looks like an IP address"},
		"trust rule 6 label":     {func(c *ca.Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("a..b") }, "empty label"},
		"wildcard serving name":  {func(c *ca.Config) { c.ServingNames = []string{"*.example.com"} }, `serving name "*.example.com" is not a DNS name`},
		"underscore in the name": {func(c *ca.Config) { c.ServingNames = []string{"a_b.example"} }, `no underscore`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newEnv(t, c.change).TryOpen()
			contains(t, err, "ca: configuration: ", c.want)
		})
	}
}

func TestErrorsNameFieldAndReason(t *testing.T) {
	err := &ca.RequestError{Field: "csr.san", Reason: "more than one URI"}
	if err.Error() != "ca: csr.san: more than one URI" || strings.ToLower(ca.ErrLedger.Error()) != ca.ErrLedger.Error() {
		t.Error(err)
	}
}
