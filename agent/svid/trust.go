package svid

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/agent/caclient"
)

// Bounds of a bundle, below those of clients.
const (
	maxRoots = 64
	maxJWKS  = 1 << 20
)

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

// SetBundle takes the Bundle resource of a trust domain: roots as DER, and a
// JWKS. One without usable roots, or with a JWKS that is none, is refused and
// changes nothing.
func (r *Rotator) SetBundle(td spiffeid.TrustDomain, roots [][]byte, jwks []byte, sequence uint64, refreshHint time.Duration) error {
	b, err := newBundle(td, roots, jwks)
	if err != nil {
		return err
	}
	b.Sequence, b.RefreshHint = sequence, refreshHint
	r.mu.Lock()
	defer r.mu.Unlock()
	if td == r.trust.domain {
		old := r.trust.resource
		r.trust.resource, r.trust.extra = &b, nil
		if old == nil || !sameRoots(old.X509, roots) {
			r.renewUntrusted(roots)
		}
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

// renewUntrusted brings on the renewal of what no peer will accept any more,
// because the root it chains to was dropped. Caller holds r.mu.
func (r *Rotator) renewUntrusted(roots [][]byte) {
	for _, e := range r.entries {
		if e.answer != nil && !e.answer.VerifiesUnder(roots) {
			e.due = r.moment()
			r.cfg.Log.Warn("root dropped from the bundle, renewing what chains to it", "id", e.answer.ID.String())
		}
	}
	r.nudge()
}

func newBundle(td spiffeid.TrustDomain, roots [][]byte, jwks []byte) (Bundle, error) {
	if td.IsZero() {
		return Bundle{}, errors.New("bundle without a trust domain")
	}
	if len(roots) == 0 || len(roots) > maxRoots {
		return Bundle{}, fmt.Errorf("bundle of %q has %d roots, want 1 to %d", td.Name(), len(roots), maxRoots)
	}
	for i, der := range roots {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return Bundle{}, fmt.Errorf("bundle of %q: root %d: %w", td.Name(), i, err)
		}
		if !cert.IsCA {
			return Bundle{}, fmt.Errorf("bundle of %q: root %d is no CA", td.Name(), i)
		}
	}
	keys, err := jwtKeys(jwks)
	if err != nil {
		return Bundle{}, fmt.Errorf("bundle of %q: %w", td.Name(), err)
	}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, kid := range slices.Sorted(maps.Keys(keys)) {
		set.Keys = append(set.Keys, keys[kid])
	}
	encoded, err := json.Marshal(set)
	if err != nil {
		return Bundle{}, fmt.Errorf("bundle of %q: %w", td.Name(), err)
	}
	return Bundle{X509: roots, JWT: encoded, JWTKeys: keys}, nil
}

// jwtKeys reads the keys of a JWKS that JWT-SVIDs may be signed with. Others in
// it, unknown or for another use, are passed over (bundle format 4). No JWKS at
// all means no such keys.
func jwtKeys(jwks []byte) (map[string]jose.JSONWebKey, error) {
	keys := map[string]jose.JSONWebKey{}
	if len(jwks) == 0 {
		return keys, nil
	}
	if len(jwks) > maxJWKS {
		return nil, fmt.Errorf("JWKS has more than %d bytes", maxJWKS)
	}
	var set struct {
		Keys *[]json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(jwks, &set); err != nil {
		return nil, fmt.Errorf("JWKS: %w", err)
	}
	if set.Keys == nil {
		return nil, errors.New("JWKS without keys")
	}
	for _, raw := range *set.Keys {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(raw) != nil || k.Use != "jwt-svid" || k.KeyID == "" || !k.Valid() || !k.IsPublic() {
			continue
		}
		keys[k.KeyID] = k
	}
	return keys, nil
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
