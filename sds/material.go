package sds

import (
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Material is everything a workload proves itself and judges others with. It is
// immutable once given out. However it is printed or logged, it shows no key.
type Material struct {
	ID spiffeid.ID
	// Chain is DER, leaf first, roots left out.
	Chain [][]byte
	// KeyPKCS8 is the leaf's private key.
	KeyPKCS8    []byte `json:"-"`
	TrustDomain spiffeid.TrustDomain
	// Roots of TrustDomain, DER.
	Roots [][]byte
	// Federated trust domains and their roots.
	Federated map[spiffeid.TrustDomain][][]byte
}

// Format implements fmt.Formatter, for every verb.
func (m Material) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "material of %s (key not shown)", m.ID) }

// LogValue implements slog.LogValuer.
func (m Material) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(m)) }
