package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

const minTTL = time.Second

// unusableName is what DNS is constrained to where no name may be signed: a
// permitted name that cannot exist excludes all others, and breaks no verifier
// (an excluded empty name does).
const unusableName = "invalid"

// lifetimes are trust rule 10: leaf < intermediate < root, with room to rotate.
type lifetimes struct {
	leaf, maxLeaf, intermediate, root, backdate time.Duration
}

func (l lifetimes) validate() error {
	switch {
	case l.leaf < minTTL:
		return fmt.Errorf("leafTTL %v is shorter than %v", l.leaf, minTTL)
	case l.maxLeaf < l.leaf:
		return fmt.Errorf("maxLeafTTL %v is shorter than leafTTL %v", l.maxLeaf, l.leaf)
	case l.intermediate < 2*l.maxLeaf:
		return fmt.Errorf("intermediateTTL %v must be at least twice maxLeafTTL (%v), so that it can be rotated", l.intermediate, l.maxLeaf)
	case l.root < 2*l.intermediate:
		return fmt.Errorf("rootTTL %v must be at least twice intermediateTTL (%v), so that it can be rotated", l.root, l.intermediate)
	case l.backdate < 0:
		return errors.New("backdate must not be negative")
	}
	return nil
}

// leafTTL applies default and bound to what was asked for. A positive TTL that a
// certificate's seconds cannot express is refused: rounding it up would give
// more than was asked.
func (l lifetimes) leafTTL(asked time.Duration) (time.Duration, error) {
	switch {
	case asked <= 0:
		return l.leaf, nil
	case asked < minTTL:
		return 0, refuse("ttl", "%v is shorter than %v", asked, minTTL)
	}
	return min(asked, l.maxLeaf), nil
}

// window is when something may be used.
type window struct{ notBefore, notAfter time.Time }

func (w window) holds(t time.Time) bool { return !t.Before(w.notBefore) && t.Before(w.notAfter) }

func (w window) halfLife() time.Time { return w.notBefore.Add(w.notAfter.Sub(w.notBefore) / 2) }

// intersect is when all of certs may be used.
func intersect(certs ...*x509.Certificate) window {
	w := window{certs[0].NotBefore, certs[0].NotAfter}
	for _, c := range certs[1:] {
		if c.NotBefore.After(w.notBefore) {
			w.notBefore = c.NotBefore
		}
		if c.NotAfter.Before(w.notAfter) {
			w.notAfter = c.NotAfter
		}
	}
	return w
}

// validity places a certificate that lives ttl from now inside its issuer's
// window. The backdate, at most a tenth of the TTL, comes on top, so that a
// client renewing at half-life does not loop. Certificates hold whole seconds:
// the start is rounded so that the backdate is not exceeded, where it can be.
func validity(now time.Time, ttl, backdate time.Duration, issuer window) (window, error) {
	if !issuer.holds(now) {
		return window{}, ErrNoIssuer
	}
	from := now.Add(-min(backdate, ttl/10))
	start := from.Truncate(time.Second)
	if start.Before(from) {
		start = start.Add(time.Second)
	}
	if start.After(now) {
		start = now.Truncate(time.Second)
	}
	w := window{notBefore: start.UTC(), notAfter: now.Add(ttl).Truncate(time.Second).UTC()}
	if w.notBefore.Before(issuer.notBefore) {
		w.notBefore = issuer.notBefore
	}
	if w.notAfter.After(issuer.notAfter) {
		w.notAfter = issuer.notAfter
	}
	if !w.notAfter.After(w.notBefore) {
		return window{}, ErrNoIssuer
	}
	return w, nil
}

// newSerial returns 128 random bits, never zero.
func newSerial() (*big.Int, error) {
	var b [16]byte
	for {
		if _, err := rand.Read(b[:]); err != nil {
			return nil, err
		}
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n, nil
		}
	}
}

// keyIdentifier hashes the key's bits (RFC 7093 2(1)).
func keyIdentifier(spki []byte) ([]byte, error) {
	input := cryptobyte.String(spki)
	var info, bits cryptobyte.String
	if !input.ReadASN1(&info, cbasn1.SEQUENCE) || !info.SkipASN1(cbasn1.SEQUENCE) || !info.ReadASN1(&bits, cbasn1.BIT_STRING) {
		return nil, errors.New("public key info cannot be parsed")
	}
	if len(bits) < 2 || bits[0] != 0 { // the number of unused bits comes first
		return nil, errors.New("public key info cannot be parsed")
	}
	sum := sha256.Sum256(bits[1:])
	return sum[:20], nil
}

func publicKeyID(public crypto.PublicKey) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	return keyIdentifier(spki)
}

// svidTemplate is an X509-SVID: one URI SAN, critical because the subject is
// empty; a signing key for both ends of TLS and nothing else.
func svidTemplate(id spiffeid.ID, keyID []byte, w window) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             w.notBefore,
		NotAfter:              w.notAfter,
		URIs:                  []*url.URL{id.URL()},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          keyID,
	}, nil
}

// caTemplate is what root and issuers share.
func caTemplate(name string, public crypto.PublicKey, w window) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	keyID, err := publicKeyID(public)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial,
		// The serial number attribute tells apart issuers that follow each
		// other: some verifiers look authorities up by name alone.
		Subject:               pkix.Name{CommonName: name, SerialNumber: hex.EncodeToString(keyID[:8])},
		NotBefore:             w.notBefore,
		NotAfter:              w.notAfter,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          keyID,
	}, nil
}

func rootTemplate(td spiffeid.TrustDomain, public crypto.PublicKey, w window) (*x509.Certificate, error) {
	t, err := caTemplate("Castellan root", public, w)
	if err != nil {
		return nil, err
	}
	t.URIs = []*url.URL{td.ID().URL()}
	t.MaxPathLen = 1
	return t, nil
}

// svidIssuerTemplate may sign SVIDs and, stolen, no server's name (trust rule 6).
func svidIssuerTemplate(td spiffeid.TrustDomain, permittedURI bool, public crypto.PublicKey, w window) (*x509.Certificate, error) {
	t, err := caTemplate("Castellan SVID issuer", public, w)
	if err != nil {
		return nil, err
	}
	t.URIs = []*url.URL{td.ID().URL()}
	t.MaxPathLenZero = true
	t.PermittedDNSDomainsCritical = true // the whole extension
	t.PermittedDNSDomains = []string{unusableName}
	t.ExcludedIPRanges = allAddresses()
	if permittedURI {
		t.PermittedURIDomains = []string{td.Name()}
	}
	return t, nil
}

// servingIssuerTemplate may sign the server's own names and, stolen, no SVID: it
// is for serverAuth only, and peers of the mesh ask for clientAuth as well.
func servingIssuerTemplate(names []string, ips []netip.Addr, public crypto.PublicKey, w window) (*x509.Certificate, error) {
	t, err := caTemplate("Castellan serving issuer", public, w)
	if err != nil {
		return nil, err
	}
	t.KeyUsage = x509.KeyUsageCertSign
	t.MaxPathLenZero = true
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	t.PermittedDNSDomainsCritical = true
	t.PermittedDNSDomains = names
	if len(names) == 0 {
		t.PermittedDNSDomains = []string{unusableName}
	}
	for _, ip := range ips {
		bits := ip.BitLen()
		t.PermittedIPRanges = append(t.PermittedIPRanges, &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(bits, bits)})
	}
	if len(ips) == 0 {
		t.ExcludedIPRanges = allAddresses()
	}
	return t, nil
}

func servingTemplate(names []string, ips []netip.Addr, public crypto.PublicKey, w window) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	keyID, err := publicKeyID(public)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             w.notBefore,
		NotAfter:              w.notAfter,
		DNSNames:              names,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          keyID,
	}
	for _, ip := range ips {
		t.IPAddresses = append(t.IPAddresses, ip.AsSlice())
	}
	return t, nil
}

func allAddresses() []*net.IPNet {
	return []*net.IPNet{
		{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
		{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
	}
}
