package svid

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/agent/caclient"
)

// maxRoots bounds a bundle, as clients do.
const maxRoots = 64

// trustState is where roots come from. The Bundle resource, which travels on a
// stream where both sides have proved themselves, wins over the roots that came
// with a certificate; those serve until the first Bundle has arrived.
type trustState struct {
	domain    spiffeid.TrustDomain
	resource  *Bundle
	answered  [][]byte
	extra     [][]byte // roots of an answer that the resource does not cover yet
	federated map[spiffeid.TrustDomain]Bundle
	shown     *Trust
}

// current returns nil while no root is known.
func (t *trustState) current() *Trust { return t.shown }

// rebuild makes the next immutable Trust.
func (t *trustState) rebuild() {
	own := Bundle{X509: t.answered}
	if t.resource != nil {
		own = *t.resource
		own.X509 = append(slices.Clone(own.X509), t.extra...)
	}
	if len(own.X509) == 0 {
		t.shown = nil
		return
	}
	t.shown = &Trust{Domain: t.domain, Own: own, Federated: maps.Clone(t.federated)}
}

// trustAnswer takes note of the roots that came with a certificate. Caller holds r.mu.
func (r *Rotator) trustAnswer(a *caclient.Answer) {
	t := &r.trust
	switch {
	case t.resource == nil:
		if sameRoots(t.answered, a.Roots) {
			return
		}
		t.answered = a.Roots
	case a.VerifiesUnder(t.shown.Own.X509):
		t.answered = a.Roots
		return
	default:
		// Signed under a root that the Bundle does not hold yet: without it the
		// workload's own chain would not verify. Both stand until the next Bundle.
		r.cfg.Log.Warn("certificate chains to a root the bundle does not hold yet; trusting both until the next bundle", "id", a.ID.String())
		t.answered, t.extra = a.Roots, missing(t.resource.X509, a.Roots)
	}
	r.retrust()
}

// SetBundle takes the Bundle resource of a trust domain. One without usable
// roots is refused and changes nothing.
func (r *Rotator) SetBundle(td spiffeid.TrustDomain, b Bundle) error {
	if len(b.X509) == 0 || len(b.X509) > maxRoots {
		return fmt.Errorf("bundle of %q has %d roots, want 1 to %d", td, len(b.X509), maxRoots)
	}
	for i, der := range b.X509 {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("bundle of %q: root %d: %w", td, i, err)
		}
		if !cert.IsCA {
			return fmt.Errorf("bundle of %q: root %d is no CA", td, i)
		}
	}
	if td.IsZero() {
		return errors.New("bundle without a trust domain")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if td == r.trust.domain {
		r.trust.resource, r.trust.extra = &b, nil
	} else {
		next := maps.Clone(r.trust.federated)
		if next == nil {
			next = map[spiffeid.TrustDomain]Bundle{}
		}
		next[td] = b
		r.trust.federated = next
	}
	r.retrust()
	return nil
}

// RemoveBundle ends the trust in a foreign trust domain. Our own stays: without
// it nothing could be verified, and no server means that.
func (r *Rotator) RemoveBundle(td spiffeid.TrustDomain) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.trust.federated[td]; !ok {
		return
	}
	next := maps.Clone(r.trust.federated)
	delete(next, td)
	r.trust.federated = next
	r.retrust()
}

// Trust returns every bundle known, nil while there is none.
func (r *Rotator) Trust() *Trust {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.trust.current()
}

// retrust shows new trust to every workload. Caller holds r.mu.
func (r *Rotator) retrust() {
	r.trust.rebuild()
	for _, e := range r.entries {
		r.publish(e)
	}
}

func sameRoots(a, b [][]byte) bool {
	return len(a) == len(b) && len(missing(a, b)) == 0
}

// missing returns those of want that have lacks.
func missing(have, want [][]byte) [][]byte {
	var out [][]byte
	for _, w := range want {
		if !slices.ContainsFunc(have, func(h []byte) bool { return bytes.Equal(h, w) }) {
			out = append(out, w)
		}
	}
	return out
}
