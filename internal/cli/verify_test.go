package cli_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// verdict is the JSON of verify.
type verdict struct {
	Valid    bool   `json:"valid"`
	SPIFFEID string `json:"spiffeId"`
	Problem  string `json:"problem"`
	Reason   string `json:"reason"`
	Hint     string `json:"hint"`
}

func parseURL(t testing.TB, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func during(from, to time.Duration) tlsconftest.Change {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to) }
}

func keyID(c *x509.Certificate) string { return hex.EncodeToString(c.SubjectKeyId) }

func TestVerify(t *testing.T) {
	root := tlsconftest.NewRoot(t, inDomain("cluster.local"))
	issuer := root.SVIDIssuer(t)
	other := tlsconftest.NewRoot(t, inDomain("other.example"))
	plainRoot := tlsconftest.NewRoot(t)
	svid := func(changes ...tlsconftest.Change) *tls.Certificate { return issuer.Leaf(t, ordersID, changes...) }
	chainOf := func(c *tls.Certificate) []*x509.Certificate { return tlsconftest.Chain(t, c) }
	changed := func() []*x509.Certificate {
		c := chainOf(svid())
		raw := append([]byte{}, c[0].Raw...)
		raw[len(raw)-1] ^= 1
		mutated, err := x509.ParseCertificate(raw)
		if err != nil {
			t.Fatal(err)
		}
		return append([]*x509.Certificate{mutated}, c[1:]...)
	}
	expiredRoot := tlsconftest.NewRoot(t, during(-2*time.Hour, -time.Hour))
	deep := root.SVIDIssuer(t)
	deeper := deep.SVIDIssuer(t) // below a path length of 0
	notCA := svid(func(c *x509.Certificate) { c.SubjectKeyId = []byte("leaf") })
	signedByLeaf := (&tlsconftest.CA{Cert: notCA.Leaf, Key: notCA.PrivateKey.(*ecdsa.PrivateKey), Chain: chainOf(notCA)}).Leaf(t, frontendID,
		func(c *x509.Certificate) { c.AuthorityKeyId = []byte("leaf") })

	tests := map[string]struct {
		chain   []*x509.Certificate
		roots   []*x509.Certificate // default root
		id      string
		problem string // "" is valid
		reason  []string
		hint    string
	}{
		"valid":                       {chain: chainOf(svid())},
		"valid, asked by id":          {chain: chainOf(svid()), id: ordersID},
		"valid, root in the file":     {chain: append(chainOf(svid()), root.Cert)},
		"valid, chain out of order":   {chain: []*x509.Certificate{svid().Leaf, root.Cert, issuer.Cert}},
		"valid, one of several roots": {chain: chainOf(svid()), roots: []*x509.Certificate{other.Cert, expiredRoot.Cert, root.Cert}},
		"valid, signed by the root":   {chain: chainOf(root.Leaf(t, ordersID))},
		"valid, intermediate trusted": {chain: chainOf(svid())[:1], roots: []*x509.Certificate{issuer.Cert}},
		"authority missing": {
			chain: chainOf(svid())[:1], problem: "unknown authority",
			reason: []string{ordersID + " was signed by the authority with key id " + keyID(issuer.Cert) + " (CN=svid issuer)", "neither in the file nor in the bundle (which has " + keyID(root.Cert) + ")"},
			hint:   "add the missing intermediate after the leaf",
		},
		"root missing": {
			chain: chainOf(svid()), roots: []*x509.Certificate{plainRoot.Cert}, problem: "unknown authority",
			reason: []string{"svid issuer was signed by the authority with key id " + keyID(root.Cert)}, hint: "use the bundle of the mesh that issued it",
		},
		"root in the file is not trusted for that": {
			chain: append(chainOf(svid()), root.Cert), roots: []*x509.Certificate{plainRoot.Cert}, problem: "unknown authority",
			reason: []string{"the chain ends in the root", "key id " + keyID(root.Cert) + "), which is not in the bundle (which has " + keyID(plainRoot.Cert) + ")"},
		},
		"self-signed leaf": {
			chain: []*x509.Certificate{selfSigned(t)}, problem: "unknown authority", reason: []string{ordersID + " signed itself; no authority vouches for it"},
		},
		"expired": {
			chain: chainOf(svid(during(-2*time.Hour, -time.Hour))), problem: "expired",
			reason: []string{"the certificate expired at ", ", 1h0m", " ago (clock: "}, hint: "check this machine's clock",
		},
		"not yet valid": {
			chain: chainOf(svid(during(90*time.Minute, 2*time.Hour))), problem: "not yet valid",
			reason: []string{"the certificate is valid from ", ", in 1h", "(clock: "}, hint: "it is meant for later",
		},
		"clock": {
			chain: chainOf(svid(during(359*time.Second, time.Hour))), problem: "not yet valid",
			reason: []string{"the certificate is valid from "}, hint: "this machine's clock is probably behind by 5m",
		},
		"authority expired": {
			chain: chainOf(root.SVIDIssuer(t, during(-2*time.Hour, -time.Hour)).Leaf(t, ordersID)), problem: "expired",
			reason: []string{"the authority svid issuer expired at "}, hint: "renew it",
		},
		"authority not yet valid": {
			chain: chainOf(root.SVIDIssuer(t, during(time.Hour, 2*time.Hour)).Leaf(t, ordersID)), problem: "not yet valid",
			reason: []string{"the authority svid issuer is valid from "},
		},
		"root expired": {
			chain: chainOf(expiredRoot.SVIDIssuer(t).Leaf(t, ordersID)), roots: []*x509.Certificate{expiredRoot.Cert}, problem: "expired",
			reason: []string{"the root root expired at "},
		},
		"wrong trust domain, by the roots' own": {
			chain: chainOf(svid()), roots: []*x509.Certificate{other.Cert}, problem: "wrong trust domain",
			reason: []string{`the certificate is of trust domain "cluster.local", what is trusted is "other.example"`}, hint: "use the bundle of the certificate's own trust domain",
		},
		"wrong trust domain, by --id": {
			chain: chainOf(svid()), id: "spiffe://other.example/ns/shop/sa/orders", problem: "wrong trust domain", reason: []string{`what is trusted is "other.example"`},
		},
		"wrong SPIFFE ID": {
			chain: chainOf(svid()), id: frontendID, problem: "wrong SPIFFE ID",
			reason: []string{`the certificate is of "` + ordersID + `", asked for was "` + frontendID + `"`}, hint: "is this the right workload's certificate?",
		},
		"name constraint, DNS": {
			chain: chainOf(svid(func(c *x509.Certificate) { c.DNSNames = []string{"bank.example"} })), problem: "name constraint",
			reason: []string{"bank.example"}, hint: "see its constraints with",
		},
		"name constraint, URI": {
			chain:   chainOf(root.SVIDIssuer(t, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.example"} }).Leaf(t, ordersID)),
			problem: "name constraint", reason: []string{"cluster.local"},
		},
		"no URI SAN": {
			chain: chainOf(svid(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"orders.shop"} })), problem: "no URI SAN",
			reason: []string{"the certificate has no URI SAN, so it names no workload"}, hint: "an X509-SVID names its workload in a URI SAN",
		},
		"two URI SANs": {
			chain:   chainOf(svid(func(c *x509.Certificate) { c.URIs = append(c.URIs, parseURL(t, frontendID)) })),
			problem: "two URI SANs", reason: []string{ordersID + ", " + frontendID, "an SVID has exactly one"},
		},
		"three URI SANs": {
			chain: chainOf(svid(func(c *x509.Certificate) {
				c.URIs = append(c.URIs, parseURL(t, frontendID), parseURL(t, "https://x.example"))
			})), problem: "too many URI SANs", reason: []string{"3 URI SANs"},
		},
		"URI SAN is no SPIFFE ID": {
			chain:   chainOf(svid(func(c *x509.Certificate) { c.URIs = []*url.URL{parseURL(t, "https://orders.example/x")} })),
			problem: "not an SVID", reason: []string{`URI SAN "https://orders.example/x": scheme is missing or invalid`},
		},
		"URI SAN is a trust domain": {
			chain:   chainOf(svid(func(c *x509.Certificate) { c.URIs = []*url.URL{parseURL(t, "spiffe://cluster.local")} })),
			problem: "not an SVID", reason: []string{"names a trust domain, not a workload"},
		},
		"authority first": {
			chain: []*x509.Certificate{issuer.Cert, svid().Leaf}, problem: "not an SVID",
			reason: []string{"the first certificate, svid issuer, is an authority's"}, hint: "the leaf must stand first",
		},
		"root first": {
			chain: []*x509.Certificate{root.Cert, issuer.Cert, svid().Leaf}, problem: "not an SVID",
			reason: []string{"is a CA and authenticates nobody"}, hint: "the leaf must stand first",
		},
		"leaf may sign": {
			chain:   chainOf(svid(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })),
			problem: "not an SVID", reason: []string{"leaf may sign certificates or CRLs"},
		},
		"bad signature": {
			chain: changed(), problem: "bad signature",
			reason: []string{"names the authority key id " + keyID(issuer.Cert) + ", but that authority's key did not sign it"}, hint: "the certificate was changed",
		},
		"signed by a leaf": {
			chain: chainOf(signedByLeaf), problem: "not an authority",
			reason: []string{frontendID + " names the authority " + ordersID, "which may not sign certificates"},
		},
		"authority for servers' certificates": {
			chain:   chainOf(root.ServingIssuer(t).Leaf(t, ordersID)),
			problem: "key usage", reason: []string{"the chain does not allow clientAuth"}, hint: "an authority for serving certificates cannot sign SVIDs",
		},
		"leaf for clients only": {
			chain:   chainOf(svid(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })),
			problem: "key usage", reason: []string{"the chain does not allow serverAuth"},
		},
		"path length": {
			chain: chainOf(deeper.Leaf(t, ordersID)), problem: "path length",
			reason: []string{"too many intermediates"}, hint: "fewer authorities below it",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.roots == nil {
				tt.roots = []*x509.Certificate{root.Cert}
			}
			bundle, file := writeFile(t, "bundle.pem", pemOf(tt.roots...)), writeFile(t, "svid.pem", pemOf(tt.chain...))
			args := []string{"cert", "verify", "--bundle", bundle, file}
			if tt.id != "" {
				args = append(args, "--id", tt.id)
			}
			code := 0
			if tt.problem != "" {
				code = 2
			}
			var v verdict
			castellanRun(t, append(args, "-o", "json")...).want(t, code).decode(t, &v)
			if v.Valid != (tt.problem == "") || v.Problem != tt.problem || !strings.Contains(v.Hint, tt.hint) {
				t.Fatalf("%+v", v)
			}
			for _, text := range tt.reason {
				if !strings.Contains(v.Reason, text) {
					t.Errorf("no %q in %q", text, v.Reason)
				}
			}
			plain := castellanRun(t, args...).want(t, code)
			if tt.problem == "" {
				if !strings.HasPrefix(plain.out, v.SPIFFEID+": valid until ") || v.SPIFFEID == "" {
					t.Errorf("%q", plain.out)
				}
				return
			}
			// Every refusal comes with what to do.
			if v.Hint == "" || !strings.HasPrefix(plain.out, "not valid: "+tt.problem+": ") || !strings.HasPrefix(plain.err, "hint: ") {
				t.Errorf("stdout %q, stderr %q", plain.out, plain.err)
			}
		})
	}
}

func selfSigned(t testing.TB) *x509.Certificate {
	t.Helper()
	return tlsconftest.NewRoot(t, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature
		c.URIs = []*url.URL{parseURL(t, ordersID)}
	}).Cert
}

func TestVerifyBundles(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	file := chainFile(t, root.SVIDIssuer(t).Leaf(t, ordersID))
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	bundle := spiffebundle.New(td)
	empty, err := bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := bundle.AddJWTAuthority("kid", root.Key.Public()); err != nil {
		t.Fatal(err)
	}
	onlyJWT, err := bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	bundle.AddX509Authority(root.Cert)
	jwks, err := bundle.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("PEM, DER and SPIFFE bundle", func(t *testing.T) {
		for name, data := range map[string][]byte{"b.pem": pemOf(root.Cert), "b.der": root.Cert.Raw, "b.json": jwks} {
			castellanRun(t, "cert", "verify", "--bundle", writeFile(t, name, data), file).want(t, 0, "valid until")
		}
	})
	tests := map[string]struct {
		args []string
		want string
	}{
		"no bundle":             {[]string{file}, "--bundle is required: the roots to trust"},
		"bundle is missing":     {[]string{"--bundle", "/nothing", file}, `--bundle: there is no file "/nothing"`},
		"bundle is empty":       {[]string{"--bundle", writeFile(t, "e.pem", nil), file}, "is empty"},
		"bundle of nobody":      {[]string{"--bundle", writeFile(t, "e.json", empty), file}, "no authorities found"},
		"bundle for JWTs":       {[]string{"--bundle", writeFile(t, "j.json", onlyJWT), file}, "holds no X.509 authority, so nothing can be trusted by it"},
		"bundle is no JWKS":     {[]string{"--bundle", writeFile(t, "x.json", []byte("{")), file}, "--bundle "},
		"bundle is a directory": {[]string{"--bundle", t.TempDir(), file}, "is a directory"},
		"id":                    {[]string{"--bundle", writeFile(t, "b.pem", pemOf(root.Cert)), "--id", "shop/orders", file}, `--id "shop/orders": `},
		"file is missing":       {[]string{"--bundle", writeFile(t, "b.pem", pemOf(root.Cert)), "/nothing.pem"}, "there is no file"},
		"format":                {[]string{"--bundle", writeFile(t, "b.pem", pemOf(root.Cert)), file, "-o", "pem"}, `-o "pem": want one of table, json, yaml`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			castellanRun(t, append([]string{"cert", "verify"}, tt.args...)...).want(t, 3, tt.want)
		})
	}
	t.Run("from stdin and from a server", func(t *testing.T) {
		b := writeFile(t, "b.pem", pemOf(root.Cert))
		leaf := root.SVIDIssuer(t).Leaf(t, ordersID)
		castellanWith(t, string(pemOf(tlsconftest.Chain(t, leaf)...)), "cert", "verify", "--bundle", b, "-").want(t, 0)
		addr := tlsServer(t, "tcp4", &tls.Config{Certificates: []tls.Certificate{*leaf}})
		castellanRun(t, "cert", "verify", "--bundle", b, addr, "--id", ordersID).want(t, 0)
	})
}
