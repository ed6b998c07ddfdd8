// Package identity holds the one form an identity has in Castellan,
//
//	spiffe://<trust domain>/ns/<namespace>/sa/<service account>
//
// and the ways in and out of it: SPIFFE IDs, principals of policy, accounts and
// certificates. It parses strictly and refuses what it cannot name; it does no
// I/O and assumes nothing about who vouched for an identity.
package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	maxNamespace   = 63  // RFC 1123 label
	maxAccount     = 253 // RFC 1123 subdomain
	maxTrustDomain = 255 // SPIFFE-ID 2.1, which go-spiffe leaves to its callers
)

// Workload is a namespace and service account within a trust domain. It is a
// comparable value; the zero value names nobody.
type Workload struct {
	trustDomain spiffeid.TrustDomain
	account     Account
}

// New returns the workload of the given parts, each checked.
func New(td spiffeid.TrustDomain, account Account) (Workload, error) {
	if td.IsZero() {
		return Workload{}, errors.New("identity: no trust domain")
	}
	if account.IsZero() {
		return Workload{}, errors.New("identity: no account")
	}
	return Workload{trustDomain: td, account: account}, nil
}

// FromID returns the workload an ID names. An ID of any other shape than
// /ns/NAMESPACE/sa/ACCOUNT is an error: such a peer has no namespace and no
// account.
func FromID(id spiffeid.ID) (Workload, error) {
	ns, sa, ok := segments(id.Path())
	if id.IsZero() || !ok {
		return Workload{}, fmt.Errorf("identity: %q is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT", id)
	}
	if len(id.TrustDomain().Name()) > maxTrustDomain {
		return Workload{}, fmt.Errorf("identity: trust domain of %d bytes, at most %d are allowed", len(id.TrustDomain().Name()), maxTrustDomain)
	}
	account, err := NewAccount(ns, sa)
	if err != nil {
		return Workload{}, err
	}
	return Workload{trustDomain: id.TrustDomain(), account: account}, nil
}

// segments splits /ns/NS/sa/SA without allocating.
func segments(path string) (ns, sa string, ok bool) {
	rest, ok := strings.CutPrefix(path, "/ns/")
	if !ok {
		return "", "", false
	}
	ns, rest, ok = strings.Cut(rest, "/")
	if !ok {
		return "", "", false
	}
	sa, ok = strings.CutPrefix(rest, "sa/")
	if !ok || ns == "" || sa == "" || strings.Contains(sa, "/") {
		return "", "", false
	}
	return ns, sa, true
}

// ID returns the workload's SPIFFE ID; the zero ID for the zero value.
func (w Workload) ID() spiffeid.ID {
	if w.IsZero() {
		return spiffeid.ID{}
	}
	// The parts were checked when the value was made, and every character an
	// account may have is one a path segment may have.
	id, err := spiffeid.FromSegments(w.trustDomain, "ns", w.account.namespace, "sa", w.account.name)
	if err != nil {
		return spiffeid.ID{}
	}
	return id
}

// Principal returns the form policies use: the ID without its scheme.
func (w Workload) Principal() string { return strings.TrimPrefix(w.ID().String(), "spiffe://") }

// TrustDomain returns the trust domain the workload belongs to.
func (w Workload) TrustDomain() spiffeid.TrustDomain { return w.trustDomain }

// Account returns the namespace and service account.
func (w Workload) Account() Account { return w.account }

// IsZero reports whether w names nobody.
func (w Workload) IsZero() bool { return w == Workload{} }

// String returns the SPIFFE ID.
func (w Workload) String() string { return w.ID().String() }

// Account is a namespace and the name of a service account in it: what a
// Kubernetes token attests. It is a comparable value.
type Account struct {
	namespace, name string
}

// NewAccount checks both names as Kubernetes does: an RFC 1123 label and an RFC
// 1123 subdomain.
func NewAccount(namespace, name string) (Account, error) {
	if !validName(namespace, maxNamespace, false) {
		return Account{}, fmt.Errorf("identity: %q is not a namespace (an RFC 1123 label is wanted)", namespace)
	}
	if !validName(name, maxAccount, true) {
		return Account{}, fmt.Errorf("identity: %q is not a service account (an RFC 1123 subdomain is wanted)", name)
	}
	return Account{namespace: namespace, name: name}, nil
}

// ParseAccount reads "NAMESPACE/NAME".
func ParseAccount(s string) (Account, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok {
		return Account{}, fmt.Errorf("identity: %q is not of the form NAMESPACE/ACCOUNT", s)
	}
	return NewAccount(ns, name)
}

// Namespace returns the namespace.
func (a Account) Namespace() string { return a.namespace }

// Name returns the service account's name.
func (a Account) Name() string { return a.name }

// IsZero reports whether a names no account.
func (a Account) IsZero() bool { return a == Account{} }

// String returns "NAMESPACE/NAME".
func (a Account) String() string {
	if a.IsZero() {
		return ""
	}
	return a.namespace + "/" + a.name
}

// validName checks an RFC 1123 label, or labels joined by dots.
func validName(s string, limit int, dots bool) bool {
	if s == "" || len(s) > limit {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !validLabel(label) {
			return false
		}
	}
	return dots || !strings.Contains(s, ".")
}

func validLabel(s string) bool {
	if s == "" || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// ParseTrustDomain reads a trust domain of our own. Beyond the specification
// (SPIFFE-ID 2.1) it refuses names that look like an IP address or have an
// empty label: URI name constraints cannot express either.
func ParseTrustDomain(s string) (spiffeid.TrustDomain, error) {
	if strings.Contains(s, "/") {
		return spiffeid.TrustDomain{}, fmt.Errorf("identity: trust domain %q: give the bare name, without scheme or path", s)
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("identity: trust domain %q: %w", s, err)
	}
	if len(td.Name()) > maxTrustDomain {
		return spiffeid.TrustDomain{}, fmt.Errorf("identity: trust domain of %d bytes, at most %d are allowed", len(td.Name()), maxTrustDomain)
	}
	if _, err := netip.ParseAddr(td.Name()); err == nil || allNumeric(td.Name()) {
		return spiffeid.TrustDomain{}, fmt.Errorf("identity: trust domain %q looks like an IP address; choose a name such as \"cluster.local\"", s)
	}
	for label := range strings.SplitSeq(td.Name(), ".") {
		if label == "" {
			return spiffeid.TrustDomain{}, fmt.Errorf("identity: trust domain %q has an empty label; remove the extra dot", s)
		}
	}
	return td, nil
}

// allNumeric holds for dotted digits, which some verifiers read as an address
// even where ParseAddr does not ("127.1").
func allNumeric(s string) bool {
	return strings.Trim(s, "0123456789.") == ""
}

// FromCertificate returns the SPIFFE ID of a leaf (X509-SVID 2 and 5.2): exactly
// one URI SAN, a path that is not the root, and not a CA that may sign. It does
// not verify the chain.
func FromCertificate(cert *x509.Certificate) (spiffeid.ID, error) {
	switch {
	case cert == nil:
		return spiffeid.ID{}, errors.New("identity: no certificate")
	case len(cert.URIs) == 0:
		return spiffeid.ID{}, errors.New("identity: certificate has no URI SAN")
	case len(cert.URIs) > 1:
		return spiffeid.ID{}, fmt.Errorf("identity: certificate has %d URI SANs, one is allowed", len(cert.URIs))
	case cert.IsCA:
		return spiffeid.ID{}, errors.New("identity: certificate is a CA and authenticates nobody")
	case cert.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return spiffeid.ID{}, errors.New("identity: leaf may sign certificates or CRLs")
	case cert.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return spiffeid.ID{}, errors.New("identity: leaf lacks the key usage digitalSignature")
	}
	id, err := spiffeid.FromURI(cert.URIs[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("identity: URI SAN %q: %w", cert.URIs[0], err)
	}
	if len(id.TrustDomain().Name()) > maxTrustDomain {
		return spiffeid.ID{}, fmt.Errorf("identity: trust domain of %d bytes, at most %d are allowed", len(id.TrustDomain().Name()), maxTrustDomain)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("identity: %q names a trust domain, not a workload", id)
	}
	return id, nil
}
