// Package tlsconftest makes certificates for tests: a root, intermediates of the
// shape that Castellan's authority makes, and leaves good or bad. It is for
// tests only and keeps every key in memory.
package tlsconftest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"testing"
	"time"
)

// CA is a certificate that signs, with its key and the chain above it.
type CA struct {
	Cert *x509.Certificate
	Key  *ecdsa.PrivateKey
	// Chain is what leaves must carry besides themselves: this CA and those
	// above it, the root left out.
	Chain []*x509.Certificate
}

// Change alters a template before it is signed.
type Change func(*x509.Certificate)

// NewRoot returns a self-signed root.
func NewRoot(t testing.TB, changes ...Change) *CA {
	t.Helper()
	template := caTemplate("root")
	apply(template, changes)
	key := newKey(t)
	return &CA{Cert: sign(t, template, template, &key.PublicKey, key), Key: key}
}

// SVIDIssuer returns an intermediate that may sign SVIDs and no server's name.
func (ca *CA) SVIDIssuer(t testing.TB, changes ...Change) *CA {
	t.Helper()
	_, all4, _ := net.ParseCIDR("0.0.0.0/0")
	_, all6, _ := net.ParseCIDR("::/0")
	template := caTemplate("svid issuer")
	template.MaxPathLenZero = true
	template.PermittedDNSDomainsCritical = true
	template.ExcludedDNSDomains = []string{""}
	template.ExcludedIPRanges = []*net.IPNet{all4, all6}
	apply(template, changes)
	return ca.issuer(t, template)
}

// ServingIssuer returns an intermediate for servers' names: serverAuth only.
func (ca *CA) ServingIssuer(t testing.TB, changes ...Change) *CA {
	t.Helper()
	template := caTemplate("serving issuer")
	template.MaxPathLenZero = true
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	apply(template, changes)
	return ca.issuer(t, template)
}

func (ca *CA) issuer(t testing.TB, template *x509.Certificate) *CA {
	t.Helper()
	key := newKey(t)
	cert := sign(t, template, ca.Cert, &key.PublicKey, ca.Key)
	return &CA{Cert: cert, Key: key, Chain: append([]*x509.Certificate{cert}, ca.Chain...)}
}

// Leaf returns an SVID for id, valid from a minute ago for an hour.
func (ca *CA) Leaf(t testing.TB, id string, changes ...Change) *tls.Certificate {
	t.Helper()
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(t),
		NotBefore:    now().Add(-time.Minute),
		NotAfter:     now().Add(time.Hour),
		URIs:         []*url.URL{u},
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		SubjectKeyId: []byte(id)[len(id)-4:], BasicConstraintsValid: true,
	}
	apply(template, changes)
	key := newKey(t)
	leaf := sign(t, template, ca.Cert, &key.PublicKey, ca.Key)
	out := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	for _, c := range ca.Chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out
}

// Chain returns the parsed certificates of c, leaf first.
func Chain(t testing.TB, c *tls.Certificate) []*x509.Certificate {
	t.Helper()
	var chain []*x509.Certificate
	for _, der := range c.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	return chain
}

// now is the real clock: whoever wants other times gives a Change.
func now() time.Time {
	now := time.Now
	return now()
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: name},
		NotBefore: now().Add(-time.Hour), NotAfter: now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

func apply(template *x509.Certificate, changes []Change) {
	for _, change := range changes {
		change(template)
	}
}

func sign(t testing.TB, template, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	if template.SerialNumber == nil {
		template.SerialNumber = serial(t)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
