package tlsconf_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"castellan.dev/internal/tlsconf"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const frontend = "spiffe://cluster.local/ns/shop/sa/frontend"

var home = spiffeid.RequireTrustDomainFromString("cluster.local")

func trustOf(roots ...*x509.Certificate) *tlsconf.Trust {
	return &tlsconf.Trust{TrustDomain: home, Roots: roots, Version: "1"}
}

func verifier(trust *tlsconf.Trust) *tlsconf.Verifier {
	return tlsconf.NewVerifier(func() *tlsconf.Trust { return trust }, nil)
}

func TestCheck(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	issuer := root.SVIDIssuer(t)
	good := func(changes ...tlsconftest.Change) *tls.Certificate { return issuer.Leaf(t, frontend, changes...) }
	uri := func(s string) tlsconftest.Change {
		return func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Opaque: strings.TrimPrefix(s, "spiffe:")}}
		}
	}
	tests := map[string]struct {
		cert  *tls.Certificate
		roots []*x509.Certificate
		want  string
	}{
		"good": {cert: good()},
		"spiffe-06 two URI SANs": {
			cert: good(func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }),
			want: "tlsconf: identity: certificate has 2 URI SANs, one is allowed",
		},
		"spiffe-06 no URI SAN": {
			cert: good(func(c *x509.Certificate) { c.URIs = nil }),
			want: "tlsconf: identity: certificate has no URI SAN",
		},
		"spiffe-07 trust domain only": {
			cert: good(uri("spiffe://cluster.local")),
			want: `tlsconf: identity: "spiffe://cluster.local" names a trust domain, not a workload`,
		},
		"spiffe-08 CA leaf": {
			cert: good(func(c *x509.Certificate) { c.IsCA = true }),
			want: "tlsconf: identity: certificate is a CA and authenticates nobody",
		},
		"spiffe-10 leaf may sign": {
			cert: good(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }),
			want: "tlsconf: identity: leaf may sign certificates or CRLs",
		},
		"spiffe-10 no digitalSignature": {
			cert: good(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }),
			want: "tlsconf: identity: leaf lacks the key usage digitalSignature",
		},
		"spiffe-11 leaf for servers only": {
			cert: good(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }),
			want: `tlsconf: chain of "spiffe://cluster.local/ns/shop/sa/frontend" for clientAuth: x509: certificate specifies an incompatible key usage`,
		},
		"spiffe-11 leaf for clients only": {
			cert: good(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }),
			want: `tlsconf: chain of "spiffe://cluster.local/ns/shop/sa/frontend" for serverAuth: x509: certificate specifies an incompatible key usage`,
		},
		"spiffe-11 leaf without EKU": {cert: good(func(c *x509.Certificate) { c.ExtKeyUsage = nil })},
		"trust-06 leaf of the serving intermediate": {
			cert: root.ServingIssuer(t).Leaf(t, frontend),
			want: `tlsconf: chain of "spiffe://cluster.local/ns/shop/sa/frontend" for clientAuth: x509: certificate specifies an incompatible key usage`,
		},
		"trust-06 server's name from the SVID intermediate": {
			cert: good(func(c *x509.Certificate) { c.DNSNames = []string{"castellan.example"} }),
			want: "is excluded by constraint",
		},
		"trust-06 address from the SVID intermediate": {
			cert: good(func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} }),
			want: "is excluded by constraint",
		},
		"foreign chain without constraints": {
			cert: tlsconftest.NewRoot(t).SVIDIssuer(t, func(c *x509.Certificate) { c.ExcludedDNSDomains, c.ExcludedIPRanges = nil, nil }).Leaf(t, frontend),
			want: "x509: certificate signed by unknown authority",
		},
		"unconstrained intermediate of our root": {
			cert: root.SVIDIssuer(t, func(c *x509.Certificate) { c.ExcludedDNSDomains, c.ExcludedIPRanges = nil, nil }).Leaf(t, frontend),
		},
		"signed by a leaf": {
			cert: func() *tls.Certificate {
				c := good()
				leafCA := &tlsconftest.CA{Cert: c.Leaf, Key: c.PrivateKey.(*ecdsa.PrivateKey), Chain: append(tlsconftest.Chain(t, c)[:1], issuer.Chain...)}
				return leafCA.Leaf(t, frontend)
			}(),
			want: "tlsconf: chain of",
		},
		"expired": {
			cert: good(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }),
			want: "x509: certificate has expired or is not yet valid",
		},
		"not yet valid": {
			cert: good(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
			want: "x509: certificate has expired or is not yet valid",
		},
		"intermediate expired": {
			cert: root.SVIDIssuer(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }).Leaf(t, frontend),
			want: "x509: certificate has expired or is not yet valid",
		},
		"intermediate left out": {
			cert: func() *tls.Certificate { c := good(); c.Certificate = c.Certificate[:1]; return c }(),
			want: "x509: certificate signed by unknown authority",
		},
		"other trust domain": {
			cert: issuer.Leaf(t, "spiffe://evil.example/ns/shop/sa/frontend"),
			want: `tlsconf: "spiffe://evil.example/ns/shop/sa/frontend" is not of trust domain "cluster.local" nor of an alias of it`,
		},
		"trust domain in capitals is another": {
			cert: good(uri("spiffe://Cluster.local/ns/shop/sa/frontend")),
			want: "tlsconf: identity: URI SAN",
		},
		"other scheme": {
			cert: issuer.Leaf(t, "https://cluster.local/ns/shop/sa/frontend"),
			want: "tlsconf: identity: URI SAN",
		},
		"empty bundle": {
			cert: good(), roots: []*x509.Certificate{},
			want: `tlsconf: the trust bundle of "cluster.local" is empty; nobody is trusted`,
		},
		"expired root": {
			cert: tlsconftest.NewRoot(t).Leaf(t, frontend), roots: nil,
			want: "unknown authority",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			roots := tt.roots
			if roots == nil {
				roots = []*x509.Certificate{root.Cert}
			}
			peer, err := verifier(trustOf(roots...)).Check(tlsconftest.Chain(t, tt.cert))
			if tt.want == "" {
				if err != nil || peer.ID.String() != frontend || peer.Serial == "" || len(peer.LeafSHA256) != 64 {
					t.Fatalf("peer %+v, err %v", peer, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("err %v, want %q", err, tt.want)
			}
		})
	}
}

func TestCheckRefusesWithoutTrust(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	chain := tlsconftest.Chain(t, root.Leaf(t, frontend))
	for name, trust := range map[string]*tlsconf.Trust{"nil": nil, "no trust domain": {Roots: []*x509.Certificate{root.Cert}}} {
		if _, err := verifier(trust).Check(chain); err == nil || err.Error() != "tlsconf: no trust bundle yet; nobody is trusted" {
			t.Errorf("%s: err %v", name, err)
		}
	}
	if _, err := verifier(trustOf(root.Cert)).Check(nil); err == nil || err.Error() != "tlsconf: the peer sent no certificate" {
		t.Errorf("no chain: err %v", err)
	}
	long := make([]*x509.Certificate, 9)
	for i := range long {
		long[i] = chain[0]
	}
	if _, err := verifier(trustOf(root.Cert)).Check(long); err == nil || err.Error() != "tlsconf: the peer sent 9 certificates, at most 8 are taken" {
		t.Errorf("long chain: err %v", err)
	}
}

func TestCheckExpiredRoot(t *testing.T) {
	root := tlsconftest.NewRoot(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	_, err := verifier(trustOf(root.Cert)).Check(tlsconftest.Chain(t, root.Leaf(t, frontend)))
	if err == nil || !strings.Contains(err.Error(), "expired") {
		t.Fatalf("err %v", err)
	}
}

func TestCheckAlias(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	trust := trustOf(root.Cert)
	trust.Aliases = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("old.example")}
	peer, err := verifier(trust).Check(tlsconftest.Chain(t, root.Leaf(t, "spiffe://old.example/ns/shop/sa/frontend")))
	if err != nil || peer.ID.TrustDomain().Name() != "old.example" {
		t.Fatalf("peer %v, err %v", peer, err)
	}
}

// A remembered chain is forgotten with its bundle and its time, and denied at once.
func TestRememberedChain(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	cert := root.SVIDIssuer(t).Leaf(t, frontend)
	chain := tlsconftest.Chain(t, cert)
	now := time.Now()
	trust := trustOf(root.Cert)
	v := tlsconf.NewVerifier(func() *tlsconf.Trust { return trust }, func() time.Time { return now })
	accept := func(when string) {
		t.Helper()
		if _, err := v.Check(chain); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	refuse := func(when, want string) {
		t.Helper()
		if _, err := v.Check(chain); err == nil || !strings.Contains(err.Error(), want) {
			t.Fatalf("%s: err %v, want %q", when, err, want)
		}
	}
	accept("first")
	accept("remembered")
	peer, _ := v.Check(chain)

	now = cert.Leaf.NotAfter.Add(time.Second)
	refuse("after its time", "expired")
	if err := v.Again(chain, peer); err != nil {
		t.Fatalf("live connection after its time: %v", err)
	}
	now = cert.Leaf.NotBefore.Add(-time.Second)
	refuse("clock stepped back", "not yet valid")
	now = time.Now()
	accept("in its time again")

	denied := map[string]bool{}
	next := *trust
	next.Denied = func(id spiffeid.ID, serial, keyID string) bool {
		return denied[id.String()] || denied[serial] || denied[keyID]
	}
	trust = &next
	accept("nobody denied")
	for _, name := range []string{
		frontend, cert.Leaf.SerialNumber.Text(16), "74656e64" /* "tend", the builder's key id */, chain[1].SerialNumber.Text(16),
	} {
		denied = map[string]bool{name: true}
		refuse("denied "+name, "has been revoked")
		if err := v.Again(chain, peer); err == nil {
			t.Fatalf("live connection of denied %s goes on", name)
		}
	}
	denied = nil
	accept("pardoned")

	other := trustOf(tlsconftest.NewRoot(t).Cert)
	other.Version = "2"
	trust = other
	refuse("other roots", "unknown authority")
	now = cert.Leaf.NotAfter.Add(time.Second)
	if err := v.Again(chain, peer); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Fatalf("live connection under other roots: err %v", err)
	}
	now = time.Now()
	// The same version with other roots is a mistake of the caller's; it must not admit anyone either.
	other.Version = "1"
	refuse("other roots under the same version", "unknown authority")
}

func TestRememberedChainIsCheap(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	v := verifier(trustOf(root.Cert))
	chain := tlsconftest.Chain(t, root.Leaf(t, frontend))
	for range 3 {
		if _, err := v.Check(chain); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = v.Check(chain) }); n > 2 {
		t.Fatalf("a remembered chain costs %v allocations", n)
	}
}
