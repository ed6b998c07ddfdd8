// Package sds serves one workload's certificate, key and trust bundle to Envoy
// and to castellan-proxy by the Secret Discovery Service, under the names that
// Istio's and SPIRE's Envoy configurations ask for.
//
// It holds no keys beyond what its Provider gives, and logs none. A name it does
// not know never fails the others on the same stream. It assumes that whoever can
// open a stream is the workload itself: the socket decides that, not this package.
package sds

import (
	"context"
	"log/slog"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/internal/xds"
)

// TypeSecret is the type URL of what this package serves.
const TypeSecret = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Names that stand for whatever the workload's own are.
const (
	// NameDefault is the workload's certificate and key (Istio, SPIRE).
	NameDefault = "default"
	// NameRoot is the validation context of the workload's own trust domain (Istio, SPIRE).
	NameRoot = "ROOTCA"
	// NameAll is a validation context with every trust domain's bundle (SPIRE).
	NameAll = "ALL"
)

// Material is everything a workload proves itself and judges others with. It is
// immutable once given out.
type Material struct {
	ID spiffeid.ID
	// Chain is DER, leaf first, roots left out.
	Chain [][]byte
	// KeyPKCS8 is the leaf's private key.
	KeyPKCS8    []byte
	TrustDomain spiffeid.TrustDomain
	// Roots of TrustDomain, DER.
	Roots [][]byte
	// Federated trust domains and their roots.
	Federated map[spiffeid.TrustDomain][][]byte
}

// Provider gives the material as it is now, and a channel that is closed at its
// next change. Nil material means that there is none yet: streams wait.
type Provider interface {
	Material() (*Material, <-chan struct{})
}

// Config configures a Server.
type Config struct {
	Provider Provider
	// Observe, if set, is called when a stream opens and gives that stream's
	// observer (which may be nil) and what to call when it ends (which may be nil).
	Observe func(ctx context.Context) (xds.Observer, func())
	Log     *slog.Logger
	Limits  xds.Limits
}

// Server implements secretv3.SecretDiscoveryServiceServer.
type Server struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	cfg Config
}

// NewServer returns a Server.
func NewServer(cfg Config) *Server { return &Server{cfg: cfg} }
