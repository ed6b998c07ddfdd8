// Package svid keeps the certificates of a node's workloads: it makes their
// keys, has them certified, renews them at half of their life, and shows each
// workload's current state to whoever serves it.
//
// It refuses to lose what is valid: a server that is away, slow or refusing
// changes nothing before the certificate expires; then the identity is
// withdrawn. It assumes that what its issuer returns has been checked.
package svid

import (
	"crypto/tls"
	"crypto/x509"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/agent/caclient"
	"castellan.dev/identity"
)

// SVID is one certificate with its key. It is never changed after it was made.
type SVID struct {
	ID spiffeid.ID
	// Chain is DER, leaf first, without roots.
	Chain [][]byte
	Key   *Key
	// Serial is lower-case hex without leading zeros.
	Serial              string
	NotBefore, NotAfter time.Time
	// Received is when the signed certificate arrived here.
	Received time.Time

	leaf *x509.Certificate
}

// TLSCertificate returns the form crypto/tls takes.
func (s *SVID) TLSCertificate() *tls.Certificate {
	return &tls.Certificate{Certificate: s.Chain, PrivateKey: s.Key.Signer(), Leaf: s.leaf}
}

// lifetime is what was left of the certificate when it was issued (trust rule
// 10): the backdate does not count.
func (s *SVID) lifetime() time.Duration {
	return min(s.NotAfter.Sub(s.Received), s.NotAfter.Sub(s.NotBefore))
}

// Bundle is what one trust domain is trusted by.
type Bundle struct {
	// X509 is root certificates, DER.
	X509 [][]byte
	// JWT is a JWKS of nothing but keys for JWT-SVIDs (use "jwt-svid", with a
	// kid); empty while unknown.
	JWT []byte
	// JWTKeys is JWT parsed, by kid.
	JWTKeys     map[string]jose.JSONWebKey
	Sequence    uint64
	RefreshHint time.Duration
}

// Trust is every bundle this node knows: its own trust domain's first, and those
// of others. Bundles are never merged. It is never changed after it was made.
type Trust struct {
	Domain    spiffeid.TrustDomain
	Own       Bundle
	Federated map[spiffeid.TrustDomain]Bundle
}

// Bundle returns the bundle of td.
func (t *Trust) Bundle(td spiffeid.TrustDomain) (Bundle, bool) {
	if t == nil {
		return Bundle{}, false
	}
	if td == t.Domain {
		return t.Own, true
	}
	b, ok := t.Federated[td]
	return b, ok
}

// Status says where a workload stands.
type Status int

const (
	// Starting: nothing has been issued yet, and nobody has refused.
	Starting Status = iota
	// Valid: there is a certificate that has not expired.
	Valid
	// Refused: nothing is valid, and the server will not issue.
	Refused
	// Expired: the last certificate ran out before it could be renewed.
	Expired
)

// String returns the status in a word.
func (s Status) String() string { return [...]string{"starting", "valid", "refused", "expired"}[s] }

// Snapshot is one workload's whole state at a moment. It is never changed after
// it was published.
type Snapshot struct {
	Status Status
	// SVID is set while Status is Valid.
	SVID *SVID
	// Trust is set once any roots are known.
	Trust *Trust
	// Workload and PodUID are of the token as last read; zero before that.
	Workload identity.Workload
	PodUID   string
	// Published is when this state came to be.
	Published time.Time
	// Problem is why the last attempt failed; nil after a success.
	Problem error
}

// Source is where a workload's state is read and watched.
type Source struct{ now atomic.Pointer[published] }

type published struct {
	snapshot *Snapshot
	changed  chan struct{}
}

// NewSource returns a source that shows s; a Rotator makes its own.
func NewSource(s *Snapshot) *Source {
	src := &Source{}
	src.now.Store(&published{snapshot: s, changed: make(chan struct{})})
	return src
}

// Current returns the state, and a channel that is closed at the next change.
func (s *Source) Current() (*Snapshot, <-chan struct{}) {
	p := s.now.Load()
	return p.snapshot, p.changed
}

// Publish replaces the state and wakes everyone who waits for it.
func (s *Source) Publish(next *Snapshot) {
	old := s.now.Swap(&published{snapshot: next, changed: make(chan struct{})})
	close(old.changed)
}

// newSVID joins an answer with the key it certifies.
func newSVID(a *caclient.Answer, key *Key) *SVID {
	return &SVID{
		ID: a.ID, Chain: a.Chain, Key: key, Serial: caclient.SerialText(a.Leaf.SerialNumber),
		NotBefore: a.Leaf.NotBefore, NotAfter: a.Leaf.NotAfter, Received: a.Received, leaf: a.Leaf,
	}
}
