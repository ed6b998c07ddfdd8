package discovery

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/identity"
	"castellan.dev/internal/xds"
)

const (
	// agentNames and agentHeld bound what one agent may ask and bring back.
	agentNames = 10_000
	agentHeld  = 100_000
)

// DeltaAggregatedResources serves an agent: the policies of its own node's
// workloads, and what the whole mesh shares.
func (s *Server) DeltaAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	node, err := s.caller(stream.Context())
	if err != nil {
		return err
	}
	own, end := s.nodes.open(node)
	defer end()
	s.metrics.streams.Inc()
	defer s.metrics.streams.Dec()
	log := s.log.With(slog.String("node", node))
	log.Info("agent follows discovery")
	err = xds.ServeDelta(stream, xds.Config{
		Source: nodeSource{mesh: s.mesh, own: own},
		Types: []string{castellanv1.TypeWorkloadPolicy, castellanv1.TypeServiceIdentity, castellanv1.TypeJwks,
			castellanv1.TypeBundle, castellanv1.TypeDenylist},
		Observer: s.metrics.observer(),
		Log:      log,
		Limits:   xds.Limits{Names: agentNames, Held: agentHeld},
	})
	log.Info("agent's discovery stream ended", slog.Any("error", err))
	return err
}

// nodeSource is what one node may see.
type nodeSource struct{ mesh, own *xds.Table }

// Resources implements xds.Source.
func (n nodeSource) Resources(typeURL string) (xds.Snapshot, <-chan struct{}) {
	if typeURL == castellanv1.TypeWorkloadPolicy {
		return n.own.Resources(typeURL)
	}
	return n.mesh.Resources(typeURL)
}

// lookupTimeout bounds the question which node a certificate belongs to.
const lookupTimeout = 5 * time.Second

// caller names the node of the agent that calls. It fails closed: without a
// certificate, with one of anybody but an agent, or of a node nobody knows, there
// is nothing to see.
func (s *Server) caller(ctx context.Context) (string, error) {
	denied := status.Error(codes.PermissionDenied, "not an agent of this mesh")
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", status.Error(codes.Unauthenticated, "a client certificate is needed")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return "", status.Error(codes.Unauthenticated, "a client certificate is needed")
	}
	cert := info.State.PeerCertificates[0]
	serial := cert.SerialNumber.Text(16)
	refuse := func(why string, err error) (string, error) {
		s.log.Warn("caller refused", slog.String("reason", why), slog.String("serial", serial), slog.Any("error", err))
		return "", denied
	}
	id, err := identity.FromCertificate(cert)
	if err != nil {
		return refuse("certificate is no SVID", err)
	}
	w, err := identity.FromID(id)
	if err != nil || w.TrustDomain() != s.cfg.TrustDomain || !slices.Contains(s.cfg.Agents, w.Account()) {
		return refuse("certificate is not an agent's: "+id.String(), err)
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	node, err := s.cfg.NodeOf(ctx, serial)
	switch {
	case errors.Is(err, ErrUnknownNode) || err == nil && node == "":
		return refuse("certificate is of no known node", err)
	case err != nil:
		s.log.Error("node of a certificate cannot be looked up", slog.String("serial", serial), slog.Any("error", err))
		return "", status.Error(codes.Unavailable, "try again later")
	}
	return node, nil
}
