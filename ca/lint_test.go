package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca/ledger"
	"castellan.dev/ca/ledger/ledgertest"
)

// This test is inside the package: the linter stands behind the profiles, which
// give it nothing to refuse.

type lintEnv struct {
	issuer *issuing
	key    *ecdsa.PrivateKey
	ledger *ledgertest.Memory
	id     spiffeid.ID
	window window
}

func newLintEnv(t *testing.T) *lintEnv {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	w := window{now, now.Add(24 * time.Hour)}
	template, err := svidIssuerTemplate(spiffeid.RequireTrustDomainFromString("cluster.local"), false, key.Public(), w)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &lintEnv{
		issuer: &issuing{key: key, cert: cert, window: w}, key: leaf, ledger: &ledgertest.Memory{},
		id: spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/orders"), window: window{now.Add(time.Hour), now.Add(2 * time.Hour)},
	}
}

func (e *lintEnv) template(t *testing.T) *x509.Certificate {
	t.Helper()
	id, err := publicKeyID(e.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	template, err := svidTemplate(e.id, id, e.window)
	if err != nil {
		t.Fatal(err)
	}
	return template
}

func (e *lintEnv) order() *order {
	return &order{ctx: context.Background(), ledger: e.ledger, issuer: e.issuer, lint: func(t *tbs) error { return t.lintSVID(e.id.String()) }}
}

func uris(list ...string) []*url.URL {
	var out []*url.URL
	for _, s := range list {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		out = append(out, u)
	}
	return out
}

func TestNothingIsSignedThatFailsLint(t *testing.T) {
	const id = "spiffe://cluster.local/ns/shop/sa/orders"
	extra := func(last int, critical bool, value ...byte) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, last}, Critical: critical, Value: value})
		}
	}
	for name, c := range map[string]struct {
		change func(*x509.Certificate)
		want   string
	}{
		"spiffe-06 two URIs":         {func(c *x509.Certificate) { c.URIs = uris(id, id) }, "spiffe-06"},
		"spiffe-06 no URI":           {func(c *x509.Certificate) { c.URIs = nil }, "spiffe-06"},
		"spiffe-06 a DNS name too":   {func(c *x509.Certificate) { c.DNSNames = []string{"a.example"} }, "spiffe-06"},
		"spiffe-06 another identity": {func(c *x509.Certificate) { c.URIs = uris("spiffe://cluster.local/ns/shop/sa/payments") }, "spiffe-06: URI is not the attested identity"},
		"spiffe-07 not critical":     {func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "x"} }, "spiffe-07: the subject is not empty"},
		"spiffe-08 a CA":             {func(c *x509.Certificate) { c.IsCA = true; c.MaxPathLen = -1 }, "spiffe-08"},
		"spiffe-08 no constraints":   {func(c *x509.Certificate) { c.BasicConstraintsValid = false }, "spiffe-08"},
		"spiffe-09 no key usage":     {func(c *x509.Certificate) { c.KeyUsage = 0 }, "spiffe-09"},
		"spiffe-10 keyCertSign":      {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, "spiffe-10"},
		"spiffe-10 cRLSign":          {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, "spiffe-10"},
		"spiffe-11 one usage":        {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, "spiffe-11"},
		"spiffe-11 another usage":    {func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) }, "spiffe-11"},
		"unknown extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: []byte{5, 0}}}
		}, "is in no profile"},
		"issuer alternative name":       {extra(18, false, 0x30, 0), "is in no profile"},
		"name constraints":              {extra(30, true, 0x30, 0), "a leaf has name constraints"},
		"outlives its issuer":           {func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(48 * time.Hour) }, "validity reaches beyond that of the issuer"},
		"begins before its issuer":      {func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(-48 * time.Hour) }, "validity reaches beyond that of the issuer"},
		"ends before it begins":         {func(c *x509.Certificate) { c.NotBefore, c.NotAfter = c.NotAfter, c.NotBefore }, "validity is empty"},
		"no subject key identifier":     {func(c *x509.Certificate) { c.SubjectKeyId = nil }, "subject key identifier is missing"},
		"another subject key":           {func(c *x509.Certificate) { c.SubjectKeyId = make([]byte, 20) }, "subject key identifier is missing, critical or not the key's"},
		"serial of more than 20 octets": {func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) }, "serial number"},
	} {
		t.Run(name, func(t *testing.T) {
			e := newLintEnv(t)
			template := e.template(t)
			c.change(template)
			der, err := e.order().sign(template, e.key.Public())
			if der != nil || !errors.Is(err, ErrLint) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("signed %v, error %v; want %q", der != nil, err, c.want)
			}
			if n, _ := e.ledger.Rows(t.Context()); n != 0 {
				t.Error("an intent was written for what is not signed")
			}
		})
	}
	t.Run("the profile's own passes", func(t *testing.T) {
		e := newLintEnv(t)
		if _, err := e.order().sign(e.template(t), e.key.Public()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("the issuer's own key is not certified", func(t *testing.T) {
		e := newLintEnv(t)
		e.key = e.issuer.key.(*ecdsa.PrivateKey)
		_, err := e.order().sign(e.template(t), e.key.Public())
		if err == nil || !strings.Contains(err.Error(), "subject has the key of its issuer") {
			t.Fatal(err)
		}
	})
}

func TestOrderSignsOnceAndNoDigest(t *testing.T) {
	e := newLintEnv(t)
	o := e.order()
	if _, err := o.sign(e.template(t), e.key.Public()); err != nil {
		t.Fatal(err)
	}
	if _, err := o.sign(e.template(t), e.key.Public()); !errors.Is(err, ErrLint) {
		t.Fatalf("signed twice: %v", err)
	}
	if _, err := o.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); !errors.Is(err, ErrLint) {
		t.Fatalf("signed a digest: %v", err)
	}
	if n, _ := e.ledger.Rows(t.Context()); n != 1 {
		t.Fatalf("%d rows", n)
	}
}

// failing is a key that breaks after the intent has been written.
type failing struct{ crypto.Signer }

func (failing) Sign(_ io.Reader, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the key is away")
}

func TestFailedSignatureIsRecorded(t *testing.T) {
	e := newLintEnv(t)
	e.issuer.key = failing{e.issuer.key}
	if _, err := e.order().sign(e.template(t), e.key.Public()); err == nil || !strings.Contains(err.Error(), "the key is away") {
		t.Fatal(err)
	}
	for row := range e.ledger.Query(t.Context(), ledger.Filter{}) {
		if row.Outcome != ledger.Failed {
			t.Errorf("outcome %v", row.Outcome)
		}
	}
}

// The bytes are read as they are, so every cut of them is refused, without a panic.
func TestCutBytesAreRefused(t *testing.T) {
	e := newLintEnv(t)
	der, err := e.order().sign(e.template(t), e.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	raw := cert.RawTBSCertificate
	if _, err := readTBS(raw); err != nil {
		t.Fatal(err)
	}
	for n := range raw {
		if _, err := readTBS(raw[:n]); err == nil {
			t.Errorf("cut to %d bytes it is accepted", n)
		}
	}
	if _, err := readTBS(append(raw[:len(raw):len(raw)], 0)); err == nil {
		t.Error("with a byte more it is accepted")
	}
}
