package ca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"time"
)

// Authority holds the trust domain's signing keys and renews what is under the
// root. It is safe for concurrent use.
type Authority struct{}

// Open loads or creates everything under cfg.DataDir. It refuses what the
// package doc says, with an error that says what to do. Close releases the lock.
func Open(ctx context.Context, cfg Config) (*Authority, error) {
	return nil, errors.New("ca: not yet")
}

// Run renews the issuers, the serving certificate and the JWT keys until ctx ends.
func (a *Authority) Run(ctx context.Context) error { return nil }

// Close releases the directory's lock. The ledger stays its owner's.
func (a *Authority) Close() error { return nil }

// Issuer signs X509-SVIDs.
func (a *Authority) Issuer() *Issuer { return nil }

// JWTIssuer signs JWT-SVIDs.
func (a *Authority) JWTIssuer() *JWTIssuer { return nil }

// Bundle returns what the trust domain is trusted by now.
func (a *Authority) Bundle() *Bundle { return nil }

// Changed returns a channel that is closed at the next change of the bundle.
// Take it before Bundle, so that no change is missed.
func (a *Authority) Changed() <-chan struct{} { return nil }

// ServingCertificate returns the hook for the server's tls.Config; each
// handshake gets the newest certificate.
func (a *Authority) ServingCertificate() func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return nil
}

// Role says what one of the authority's own certificates is for.
type Role string

// Roles, as the AuthorityAdmin service names them.
const (
	RoleRoot          Role = "root"
	RoleSVIDIssuer    Role = "svid-issuer"
	RoleServingIssuer Role = "serving-issuer"
	RoleServing       Role = "serving"
)

// Certificate is one of the authority's own.
type Certificate struct {
	Role Role
	Cert *x509.Certificate
}

// Certificates lists the authority's own certificates now in use.
func (a *Authority) Certificates() []Certificate { return nil }

// LeafTTL returns the validity that a caller gets who asks for none.
func (a *Authority) LeafTTL() time.Duration { return 0 }

// Ready returns nil when the authority can sign now, else why not.
func (a *Authority) Ready() error { return nil }
