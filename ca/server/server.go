// Package server is the certificate authority's front: the gRPC services that
// issue X509-SVIDs and JWT-SVIDs to attested callers, the gate before every other
// method of the same listener, and the operator's service.
//
//	metadata → attest → rate limit → audit record → issue → audit record → answer
//
// It refuses callers that attest does not know, requests that are too large or
// too many, and on other methods everyone but an agent with a valid certificate.
// Callers get a code and a constant text; the cause goes to the log. It assumes
// TLS below it, and that the signing path behind it checks what it signs.
package server

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	istiov1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca"
	"castellan.dev/ca/attest"
)

// Attestor decides who a caller is; *attest.Attestor is one.
type Attestor interface {
	Attest(ctx context.Context, c attest.Credentials) (attest.Attested, error)
}

// Issuer signs X509-SVIDs; *ca.Issuer is one.
type Issuer interface {
	Issue(ctx context.Context, r ca.Request) (*ca.Issued, error)
}

// JWTIssuer signs JWT-SVIDs; *ca.JWTIssuer is one.
type JWTIssuer interface {
	Mint(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (*ca.JWTSVID, error)
}

// Config configures a Server.
type Config struct {
	Attestor  Attestor
	Issuer    Issuer
	JWTIssuer JWTIssuer
	Limits    Limits
	// Log takes the audit records and every cause of a refusal; nil discards them.
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time
}

// Server implements IstioCertificateService and castellan.v1.Identity.
type Server struct {
	istiov1.UnimplementedIstioCertificateServiceServer
	castellanv1.UnimplementedIdentityServer

	cfg     Config
	limiter *limiter
	metrics *metrics
	quiet   *quiet
	// authorities remembers the PEM form of what follows the leaf in a chain.
	authorities atomic.Pointer[authorityPEM]
}

// New checks cfg.
func New(cfg Config) (*Server, error) {
	if cfg.Attestor == nil || cfg.Issuer == nil || cfg.JWTIssuer == nil {
		return nil, errors.New("server: attestor and both issuers are needed")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	l, err := newLimiter(cfg.Limits)
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, limiter: l, metrics: m, quiet: newQuiet(cfg.Now, m.suppressed)}, nil
}

// Register adds both services to r.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	istiov1.RegisterIstioCertificateServiceServer(r, s)
	castellanv1.RegisterIdentityServer(r, s)
}

// OpenMethods are the full names of the methods that ask for no certificate: their
// callers prove themselves by tokens (an agent whose certificate expired must be
// able to start over).
func OpenMethods() []string {
	return []string{
		istiov1.IstioCertificateService_CreateCertificate_FullMethodName,
		castellanv1.Identity_MintJWT_FullMethodName,
	}
}
