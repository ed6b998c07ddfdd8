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

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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
	cfg    Config
	source *source
}

// NewServer returns a Server.
func NewServer(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, source: &source{provider: cfg.Provider, log: cfg.Log}}
}

// StreamSecrets serves the state-of-the-world variant.
func (s *Server) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	cfg, end := s.stream(stream.Context())
	defer end()
	return xds.ServeSotW(stream, cfg)
}

// DeltaSecrets serves the delta variant.
func (s *Server) DeltaSecrets(stream secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	cfg, end := s.stream(stream.Context())
	defer end()
	return xds.ServeDelta(stream, cfg)
}

// FetchSecrets answers once. Before there is any material it is Unavailable. What
// is asked for in another way than by name is refused: passing it over would
// look as if there were nothing.
func (s *Server) FetchSecrets(_ context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	if len(req.GetResourceLocators()) > 0 {
		return nil, status.Error(codes.InvalidArgument, "resource locators are not served, ask by resource_names")
	}
	return xds.Fetch(req, s.config(nil))
}

// stream returns what one stream is served with, and what to call at its end.
func (s *Server) stream(ctx context.Context) (xds.Config, func()) {
	var observer xds.Observer
	var end func()
	if s.cfg.Observe != nil {
		observer, end = s.cfg.Observe(ctx)
	}
	if end == nil {
		end = func() {}
	}
	return s.config(observer), end
}

// Wipe overwrites what was made last, private key and all. Call it when no stream
// is left, and none can come.
func (s *Server) Wipe() { s.source.wipe() }

func (s *Server) config(observer xds.Observer) xds.Config {
	return xds.Config{Source: s.source, Types: []string{TypeSecret}, Observer: observer, Log: s.cfg.Log, Limits: s.cfg.Limits}
}
