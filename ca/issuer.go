package ca

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca/ledger"
	"castellan.dev/identity"
)

// Issuer signs X509-SVIDs.
type Issuer struct {
	authority *Authority
	lifetimes lifetimes
}

// Request asks for one X509-SVID for an identity that has been attested.
type Request struct {
	// CSR is PEM or DER. It gives a public key and proof of possession, no more.
	CSR []byte
	// Workload is the attested identity.
	Workload identity.Workload
	// TTL counts from now; zero or negative means the default, more than
	// allowed is capped.
	TTL time.Duration
	// What the ledger keeps of the attestation.
	PodUID, Node, Cluster, Attestor string
}

// Issued is a signed X509-SVID.
type Issued struct {
	// Chain is DER, leaf first, without roots.
	Chain [][]byte
	// Roots is DER: the trust domain's, as of this signature.
	Roots [][]byte
	// Serial is lower-case hex without leading zeros.
	Serial              string
	NotBefore, NotAfter time.Time
}

// Issue checks, records and signs. Errors: *RequestError, ErrLedger,
// ErrNoIssuer, ErrLint, or the context's.
func (i *Issuer) Issue(ctx context.Context, r Request) (*Issued, error) {
	issued, err := i.issue(ctx, r)
	m := i.authority.metrics
	if err != nil {
		m.issued.WithLabelValues(reason(err)).Inc()
		return nil, err
	}
	m.issuedOK.Inc()
	return issued, nil
}

func (i *Issuer) issue(ctx context.Context, r Request) (*Issued, error) {
	if r.Workload.IsZero() || r.Workload.TrustDomain() != i.authority.cfg.TrustDomain {
		// Attestation never yields this; signing it would be signing for others.
		return nil, fmt.Errorf("%w: identity %q is not of this trust domain", ErrLint, r.Workload)
	}
	id := r.Workload.ID()
	ttl, err := i.lifetimes.leafTTL(r.TTL)
	if err != nil {
		return nil, err
	}
	key, err := checkCSR(r.CSR, id)
	if err != nil {
		return nil, err
	}
	s := i.authority.state.Load()
	w, err := validity(i.authority.cfg.Now(), ttl, i.lifetimes.backdate, s.svid.window)
	if err != nil {
		return nil, err
	}
	template, err := svidTemplate(id, key.keyID, w)
	if err != nil {
		return nil, err
	}
	text := id.String()
	o := &order{
		ctx: ctx, ledger: i.authority.cfg.Ledger, issuer: s.svid,
		entry: ledger.Entry{SPIFFEID: id, PodUID: r.PodUID, Node: r.Node, Cluster: r.Cluster, Attestor: r.Attestor},
		lint:  func(t *tbs) error { return t.lintSVID(text) },
	}
	leaf, err := o.sign(template, key.public)
	if err != nil {
		return nil, err
	}
	if i.authority.unnamed {
		i.authority.metrics.byUnnamed.Inc()
	}
	chain := make([][]byte, 0, 1+len(s.svid.chain))
	return &Issued{
		Chain: append(append(chain, leaf), s.svid.chain...), Roots: s.bundle.RootsDER(),
		Serial: SerialString(template.SerialNumber), NotBefore: w.notBefore, NotAfter: w.notAfter,
	}, nil
}

// reason is the metric's label: of a fixed set.
func reason(err error) string {
	var refused *RequestError
	switch {
	case errors.As(err, &refused):
		return "refused"
	case errors.Is(err, ErrLedger):
		return "ledger"
	case errors.Is(err, ErrNoIssuer):
		return "no_issuer"
	case errors.Is(err, ErrLint):
		return "lint"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "cancelled"
	}
	return "failed"
}

func idFromURL(u *url.URL) spiffeid.ID {
	id, err := spiffeid.FromURI(u)
	if err != nil {
		return spiffeid.ID{} // no SPIFFE ID: the row has none
	}
	return id
}
