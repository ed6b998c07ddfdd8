// Package tlsconf is the one place where a TLS peer of the mesh is judged.
//
// A peer is accepted when it has proved possession of its leaf's key (which
// crypto/tls sees to), the chain it sent leads to a root of the current bundle
// for both clientAuth and serverAuth, the leaf carries exactly one SPIFFE ID of
// a workload, the ID's trust domain is the mesh's own or an alias of it, and
// neither ID, serial nor key is denied. The two usages are both asked for
// because serving certificates come from an intermediate with serverAuth alone,
// and that one must not be able to make an SVID (trust rule 6).
//
// It refuses: TLS below 1.3, resumption, an absent or empty bundle, an expired
// root, two URI SANs, CA leaves, chains longer than it cares to verify. Every
// check is in tls.Config.VerifyConnection, never in VerifyPeerCertificate, which
// a resumed session skips. It assumes that a Trust is not changed after it was
// handed out, and that two with one Version are equal in everything but Denied.
package tlsconf

import (
	"bytes"
	"crypto/x509"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Trust is what peers are judged by at one moment. It is immutable once handed out.
type Trust struct {
	// TrustDomain is the mesh's own; the zero value refuses every peer.
	TrustDomain spiffeid.TrustDomain
	// Aliases are other names of the same mesh, vouched for by the same roots.
	Aliases []spiffeid.TrustDomain
	// Roots of the bundle; an empty list refuses every peer.
	Roots []*x509.Certificate
	// Version names this content but for Denied; chains verified under it are
	// remembered by it. Empty: nothing is remembered.
	Version string
	// Denied is the deny list, asked at every check and never remembered; nil
	// denies nobody. Serial and keyID are lower-case hex, the serial without
	// leading zeros; of issuing certificates in the chain the id is zero.
	Denied func(id spiffeid.ID, serial, keyID string) bool
}

// Member reports whether td is the mesh's own trust domain or an alias of it.
func (t *Trust) Member(td spiffeid.TrustDomain) bool {
	if td.IsZero() || t.TrustDomain.IsZero() {
		return false
	}
	return td == t.TrustDomain || slices.Contains(t.Aliases, td)
}

// same reports whether chains verified under one may be remembered under the other.
func (t *Trust) same(o *Trust) bool {
	return t == o || t.Version == o.Version &&
		t.TrustDomain == o.TrustDomain &&
		slices.Equal(t.Aliases, o.Aliases) &&
		slices.EqualFunc(t.Roots, o.Roots, func(a, b *x509.Certificate) bool {
			return a == b || bytes.Equal(a.Raw, b.Raw)
		})
}
