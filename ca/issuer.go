package ca

import (
	"context"
	"time"

	"castellan.dev/identity"
)

// Issuer signs X509-SVIDs.
type Issuer struct{}

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
func (i *Issuer) Issue(ctx context.Context, r Request) (*Issued, error) { return nil, ErrNoIssuer }
