package ca

import (
	"crypto"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bundle is what one trust domain is trusted by. It is immutable.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	// Roots verify X509-SVIDs.
	Roots []*x509.Certificate
	// JWTAuthorities verify JWT-SVIDs, by key id.
	JWTAuthorities map[string]crypto.PublicKey
	// Sequence rises with every change of content, restarts included.
	Sequence uint64
	// RefreshHint is how often to ask again.
	RefreshHint time.Duration
}

// RootsDER returns the roots' bytes.
func (b *Bundle) RootsDER() [][]byte { return nil }

// RootsPEM returns the roots, and only roots, as PEM.
func (b *Bundle) RootsPEM() []byte { return nil }

// MarshalJWKS returns the whole bundle in SPIFFE format (Trust Domain and Bundle 4).
func (b *Bundle) MarshalJWKS() []byte { return nil }

// MarshalJWTAuthorities returns a JWKS of the JWT keys only, each with the use
// "jwt-svid" and a key id.
func (b *Bundle) MarshalJWTAuthorities() []byte { return nil }

// WriteBundleFile writes the roots as PEM, replacing path atomically.
func WriteBundleFile(path string, b *Bundle) error { return nil }
