package agenttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"testing"
	"time"
)

// now is the real clock, or that of a synctest bubble.
func now() time.Time { return time.Now() } //nolint:forbidigo // a fake of the server beside it

// Authority is a root with one intermediate that signs leaves.
type Authority struct {
	Root, Intermediate       *x509.Certificate
	rootKey, intermediateKey *ecdsa.PrivateKey
}

// NewAuthority makes a root and its intermediate.
func NewAuthority(t testing.TB, name string) *Authority {
	t.Helper()
	a := &Authority{rootKey: newKey(t), intermediateKey: newKey(t)}
	a.Root = certify(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name + " root"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: now().Add(-time.Hour), NotAfter: now().Add(100 * time.Hour),
	}, nil, a.rootKey.Public(), a.rootKey)
	a.Intermediate = certify(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name + " intermediate"}, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: now().Add(-time.Hour), NotAfter: now().Add(50 * time.Hour),
	}, a.Root, a.intermediateKey.Public(), a.rootKey)
	return a
}

// Leaf signs a certificate for pub; change alters the template before.
func (a *Authority) Leaf(t testing.TB, id string, pub crypto.PublicKey, ttl time.Duration, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	at := now()
	template := &x509.Certificate{
		URIs: []*url.URL{uri}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   at.Add(-min(30*time.Second, ttl/10)), NotAfter: at.Add(ttl),
	}
	if change != nil {
		change(template)
	}
	return certify(t, template, a.Intermediate, pub, a.intermediateKey)
}

// Elements returns a chain in the form of a CreateCertificate answer.
func (a *Authority) Elements(leaf *x509.Certificate, roots ...*x509.Certificate) []string {
	if len(roots) == 0 {
		roots = []*x509.Certificate{a.Root}
	}
	all := ""
	for _, r := range roots {
		all += PEM(r)
	}
	return []string{PEM(leaf), PEM(a.Intermediate), all}
}

// serving signs the server's own certificate.
func (a *Authority) serving(t testing.TB, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	return certify(t, &x509.Certificate{
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		NotBefore:   now().Add(-time.Hour), NotAfter: now().Add(40 * time.Hour),
	}, a.Root, key.Public(), a.rootKey)
}

// PEM encodes one certificate.
func PEM(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func certify(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = template
	}
	template.SerialNumber, _ = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
