package tlsconf

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
)

const (
	// maxChain bounds the certificates a peer may send; ours send two.
	maxChain = 8
	// maxChainBytes bounds their size; path building costs at most that much.
	maxChainBytes = 64 << 10
	// maxRemembered bounds verified chains per generation; there are two.
	maxRemembered = 2048
)

// Peer is a peer that was judged and accepted.
type Peer struct {
	ID spiffeid.ID
	// NotAfter is the earliest end of the verified chain, root included.
	NotAfter time.Time
	// Serial of the leaf, lower-case hex without leading zeros.
	Serial string
	// LeafSHA256 is the hash of the leaf, lower-case hex.
	LeafSHA256 string
}

// Verifier judges peers by the current Trust. It is safe for concurrent use.
type Verifier struct {
	trust func() *Trust
	now   func() time.Time
	state atomic.Pointer[verifierState]
}

// verifierState belongs to one content of Trust; a new content starts it afresh,
// so nothing verified under other roots can be remembered.
type verifierState struct {
	trust *Trust
	roots *x509.CertPool

	mu        sync.Mutex
	cur, prev map[[sha256.Size]byte]*remembered
}

// remembered is a chain that was verified once: what it said and from when until
// when. Who holds its key is proved anew by every handshake.
type remembered struct {
	peer      Peer
	notBefore time.Time
	issuers   []names
	keyID     string
}

type names struct{ serial, keyID string }

// NewVerifier returns a Verifier that asks trust at every check; a nil Trust
// refuses every peer. A nil now means time.Now.
func NewVerifier(trust func() *Trust, now func() time.Time) *Verifier {
	if now == nil {
		now = time.Now
	}
	return &Verifier{trust: trust, now: now}
}

// Peer judges the peer of a TLS connection and returns its SPIFFE ID.
func (v *Verifier) Peer(cs tls.ConnectionState) (spiffeid.ID, error) {
	if cs.Version < tls.VersionTLS13 {
		return spiffeid.ID{}, errors.New("tlsconf: TLS below 1.3")
	}
	peer, err := v.Check(cs.PeerCertificates)
	return peer.ID, err
}

// Check judges a chain, leaf first, whose leaf's key the peer has been proved to
// hold. Live connections are judged again by it when bundle or deny list change.
func (v *Verifier) Check(chain []*x509.Certificate) (Peer, error) {
	return v.check(chain, v.now())
}

func (v *Verifier) check(chain []*x509.Certificate, now time.Time) (Peer, error) {
	trust := v.trust()
	// Fails closed: without a bundle nobody is trusted.
	if trust == nil || trust.TrustDomain.IsZero() {
		return Peer{}, errors.New("tlsconf: no trust bundle yet; nobody is trusted")
	}
	if len(trust.Roots) == 0 {
		return Peer{}, fmt.Errorf("tlsconf: the trust bundle of %q is empty; nobody is trusted", trust.TrustDomain.Name())
	}
	key, err := chainKey(chain)
	if err != nil {
		return Peer{}, err
	}
	st := v.current(trust)
	entry := st.recall(key, now)
	if entry == nil {
		if entry, err = st.verify(chain, now); err != nil {
			return Peer{}, err
		}
		if trust.Version != "" {
			st.remember(key, entry)
		}
	}
	return entry.peer, denied(trust, entry)
}

// Again judges the peer of a live connection after bundle or deny list changed.
// That its certificate has expired meanwhile is no reason by itself (what then
// happens is the connection's owner's to say), so the chain is judged as of the
// last moment it was valid.
func (v *Verifier) Again(chain []*x509.Certificate, peer Peer) error {
	now := v.now()
	if now.After(peer.NotAfter) {
		now = peer.NotAfter
	}
	again, err := v.check(chain, now)
	if err == nil && again.ID != peer.ID {
		// The same bytes name the same peer; anything else is not to be trusted.
		return &UnexpectedPeerError{Got: again.ID, Want: []spiffeid.ID{peer.ID}}
	}
	return err
}

// denied asks the deny list of the Trust at hand, not of the remembered one.
func denied(trust *Trust, entry *remembered) error {
	if trust.Denied == nil {
		return nil
	}
	if trust.Denied(entry.peer.ID, entry.peer.Serial, entry.keyID) {
		return &DeniedError{ID: entry.peer.ID, Serial: entry.peer.Serial}
	}
	for _, n := range entry.issuers {
		if trust.Denied(spiffeid.ID{}, n.serial, n.keyID) {
			return &DeniedError{ID: entry.peer.ID, Serial: n.serial}
		}
	}
	return nil
}

// DeniedError says that a peer's ID, certificate or key is on the deny list.
type DeniedError struct {
	ID     spiffeid.ID
	Serial string
}

func (e *DeniedError) Error() string {
	return fmt.Sprintf("tlsconf: %q with certificate %s has been revoked", e.ID, e.Serial)
}

// current returns the state for trust, a fresh one when its content changed.
func (v *Verifier) current(trust *Trust) *verifierState {
	old := v.state.Load()
	if old != nil && old.trust.same(trust) {
		return old
	}
	st := &verifierState{trust: trust, roots: x509.NewCertPool(), cur: map[[sha256.Size]byte]*remembered{}}
	for _, root := range trust.Roots {
		st.roots.AddCert(root)
	}
	// A lost race only costs the other's remembered chains.
	v.state.Store(st)
	return st
}

// chainKey hashes the chain's bytes, lengths included.
func chainKey(chain []*x509.Certificate) (key [sha256.Size]byte, err error) {
	if len(chain) == 0 {
		return key, errors.New("tlsconf: the peer sent no certificate")
	}
	if len(chain) > maxChain {
		return key, fmt.Errorf("tlsconf: the peer sent %d certificates, at most %d are taken", len(chain), maxChain)
	}
	total := 0
	h := sha256.New()
	var size [8]byte
	for _, cert := range chain {
		total += len(cert.Raw)
		if total > maxChainBytes {
			return key, fmt.Errorf("tlsconf: the peer's chain has over %d bytes", maxChainBytes)
		}
		binary.BigEndian.PutUint64(size[:], uint64(len(cert.Raw)))
		h.Write(size[:])
		h.Write(cert.Raw)
	}
	h.Sum(key[:0])
	return key, nil
}

func (st *verifierState) recall(key [sha256.Size]byte, now time.Time) *remembered {
	st.mu.Lock()
	defer st.mu.Unlock()
	entry := st.cur[key]
	if entry == nil {
		if entry = st.prev[key]; entry == nil {
			return nil
		}
		st.store(key, entry)
	}
	// Out of its time it is verified again, for the error that says which way.
	if now.Before(entry.notBefore) || now.After(entry.peer.NotAfter) {
		delete(st.cur, key)
		delete(st.prev, key)
		return nil
	}
	return entry
}

func (st *verifierState) remember(key [sha256.Size]byte, entry *remembered) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.store(key, entry)
}

// store keeps two generations: what was not asked for during one is dropped.
func (st *verifierState) store(key [sha256.Size]byte, entry *remembered) {
	if len(st.cur) >= maxRemembered {
		st.prev, st.cur = st.cur, make(map[[sha256.Size]byte]*remembered)
	}
	st.cur[key] = entry
}

// verify does what is remembered afterwards: path validation for both usages
// (X509-SVID 5.1), the leaf's rules (5.2), and the trust domain.
func (st *verifierState) verify(chain []*x509.Certificate, now time.Time) (*remembered, error) {
	leaf := chain[0]
	id, err := identity.FromCertificate(leaf)
	if err != nil {
		return nil, fmt.Errorf("tlsconf: %w", err)
	}
	if !st.trust.Member(id.TrustDomain()) {
		return nil, fmt.Errorf("tlsconf: %q is not of trust domain %q nor of an alias of it", id, st.trust.TrustDomain.Name())
	}
	opts := x509.VerifyOptions{Roots: st.roots, Intermediates: x509.NewCertPool(), CurrentTime: now}
	for _, cert := range chain[1:] {
		opts.Intermediates.AddCert(cert)
	}
	entry := &remembered{notBefore: leaf.NotBefore, keyID: hex.EncodeToString(leaf.SubjectKeyId)}
	hash := sha256.Sum256(leaf.Raw)
	entry.peer = Peer{
		ID: id, NotAfter: leaf.NotAfter, Serial: leaf.SerialNumber.Text(16), LeafSHA256: hex.EncodeToString(hash[:]),
	}
	// One usage at a time: VerifyOptions.KeyUsages accepts any of those listed.
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		opts.KeyUsages = []x509.ExtKeyUsage{usage}
		chains, err := leaf.Verify(opts)
		if err != nil {
			return nil, fmt.Errorf("tlsconf: chain of %q for %s: %w", id, usageName(usage), err)
		}
		entry.bound(chains[0])
	}
	for _, cert := range chain[1:] {
		entry.issuers = append(entry.issuers, names{serial: cert.SerialNumber.Text(16), keyID: hex.EncodeToString(cert.SubjectKeyId)})
	}
	return entry, nil
}

// bound shortens what is remembered to the times that all of the path shares.
func (r *remembered) bound(path []*x509.Certificate) {
	for _, cert := range path {
		if cert.NotAfter.Before(r.peer.NotAfter) {
			r.peer.NotAfter = cert.NotAfter
		}
		if cert.NotBefore.After(r.notBefore) {
			r.notBefore = cert.NotBefore
		}
	}
}

func usageName(usage x509.ExtKeyUsage) string {
	if usage == x509.ExtKeyUsageClientAuth {
		return "clientAuth"
	}
	return "serverAuth"
}
