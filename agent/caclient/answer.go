package caclient

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
)

// Bounds of an answer; a chain has a leaf and a few intermediates, and a trust
// domain few roots.
const (
	maxElements = 16
	maxRoots    = 64
)

// Answer is one certificate with what is needed to use it. Nothing in it is
// changed after it was made.
type Answer struct {
	ID spiffeid.ID
	// Leaf is Chain's first element, parsed.
	Leaf *x509.Certificate
	// Chain is DER, leaf first, without roots.
	Chain [][]byte
	// Roots is DER: every root the server trusts now.
	Roots [][]byte
	// Received is when the answer arrived.
	Received time.Time
}

// SerialText returns a serial number as the ledger writes it: lower-case hex
// without leading zeros.
func SerialText(serial *big.Int) string { return fmt.Sprintf("%x", serial) }

// expectation is what an answer must hold.
type expectation struct {
	workload identity.Workload
	key      crypto.PublicKey
	now      time.Time
}

// checkChain reads the chain of a CreateCertificate answer: leaf, intermediates,
// and all roots in the last element. Whatever is wrong with it makes the whole
// answer worthless; nothing of it is used.
func checkChain(elements []string, want expectation) (*Answer, error) {
	if len(elements) < 2 || len(elements) > maxElements {
		return nil, badAnswer("chain of %d elements, want 2 to %d", len(elements), maxElements)
	}
	var chain []*x509.Certificate
	for i, e := range elements[:len(elements)-1] {
		certs, err := parsePEM([]byte(e))
		if err != nil {
			return nil, badAnswer("element %d of the chain: %w", i, err)
		}
		chain = append(chain, certs...)
	}
	if len(chain) > maxElements {
		return nil, badAnswer("chain of %d certificates", len(chain))
	}
	rootCerts, err := parsePEM([]byte(elements[len(elements)-1]))
	if err != nil {
		return nil, badAnswer("roots: %w", err)
	}
	if len(rootCerts) > maxRoots {
		return nil, badAnswer("%d roots, at most %d are taken", len(rootCerts), maxRoots)
	}
	for _, r := range rootCerts {
		if !r.IsCA || !r.BasicConstraintsValid {
			return nil, badAnswer("root %q is no CA", r.Subject)
		}
	}
	id, err := checkLeaf(chain[0], want)
	if err != nil {
		return nil, err
	}
	if err := verify(chain, rootCerts, want.now); err != nil {
		return nil, badAnswer("%w", err)
	}
	return &Answer{ID: id, Leaf: chain[0], Chain: raw(chain), Roots: raw(rootCerts), Received: want.now}, nil
}

func checkLeaf(leaf *x509.Certificate, want expectation) (spiffeid.ID, error) {
	type equaler interface{ Equal(crypto.PublicKey) bool }
	if k, ok := leaf.PublicKey.(equaler); !ok || !k.Equal(want.key) {
		return spiffeid.ID{}, badAnswer("certificate is for another key than the one sent")
	}
	id, err := identity.FromCertificate(leaf)
	if err != nil {
		return spiffeid.ID{}, badAnswer("%w", err)
	}
	if id != want.workload.ID() {
		return spiffeid.ID{}, badAnswer("certificate names %q, the workload is %q", id, want.workload)
	}
	if !want.now.Before(leaf.NotAfter) {
		return spiffeid.ID{}, badAnswer("certificate expired at %s, it is %s here; are the clocks right?",
			leaf.NotAfter.UTC().Format(time.RFC3339), want.now.UTC().Format(time.RFC3339))
	}
	return id, nil
}

// verify checks the chain as peers will: for both sides of a handshake.
func verify(chain, roots []*x509.Certificate, now time.Time) error {
	// A certificate that is not valid yet means that our clock is behind the
	// server's. Peers with a right clock accept it, and refusing it would leave
	// this node without any: so the chain is judged at its first valid second.
	if now.Before(chain[0].NotBefore) {
		now = chain[0].NotBefore
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		opts.KeyUsages = []x509.ExtKeyUsage{usage}
		if _, err := chain[0].Verify(opts); err != nil {
			return fmt.Errorf("chain does not verify: %w", err)
		}
	}
	return nil
}

// VerifiesUnder reports whether the answer's chain leads to one of roots.
func (a *Answer) VerifiesUnder(roots [][]byte) bool {
	chain, err := parseAll(a.Chain)
	if err != nil {
		return false
	}
	trusted, err := parseAll(roots)
	if err != nil {
		return false
	}
	return verify(chain, trusted, a.Received) == nil
}

func parseAll(ders [][]byte) ([]*x509.Certificate, error) {
	certs := make([]*x509.Certificate, 0, len(ders))
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	return certs, nil
}

func raw(certs []*x509.Certificate) [][]byte {
	out := make([][]byte, len(certs))
	for i, c := range certs {
		out[i] = c.Raw
	}
	return out
}
