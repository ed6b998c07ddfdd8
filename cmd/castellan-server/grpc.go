package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca"
	"castellan.dev/ca/server"
	"castellan.dev/internal/tlsconf"
)

// stopTimeout bounds how long calls under way are waited for at the end.
const stopTimeout = 5 * time.Second

// openGRPC makes the two gRPC servers: for agents and callers over TLS, for the
// operator on a Unix socket.
func (p *program) openGRPC(context.Context) error {
	verifier := tlsconf.NewVerifier(p.trust(), nil)
	gate, err := server.NewGate(server.GateConfig{
		Verifier:      verifier,
		TrustDomain:   p.trustDomain,
		AgentAccounts: p.agents,
		Open:          server.OpenMethods(),
		Log:           p.log,
		Registerer:    p.registry,
	})
	if err != nil {
		return err
	}
	tlsConfig := tlsconf.ServerConfig(nil, verifier, tlsconf.ServerOptions{NextProtos: []string{"h2"}, InsecureOptionalClient: true})
	tlsConfig.GetCertificate = p.authority.ServingCertificate()
	healthy := health.NewServer()

	main := server.NewFront(tlsConfig, gate)
	p.issuing.Register(main)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(main, p.discovery)
	castellanv1.RegisterNodeServer(main, p.discovery)
	healthv1.RegisterHealthServer(main, healthy)

	operator := grpc.NewServer(
		grpc.Creds(server.OperatorCredentials(0, uint32(os.Geteuid()))),
		grpc.MaxConcurrentStreams(64), grpc.ConnectionTimeout(5*time.Second))
	server.NewAdmin(p.authority, p.ledger, p.log, p.problems()...).Register(operator)
	castellanv1.RegisterDiscoveryAdminServer(operator, p.discovery)
	healthv1.RegisterHealthServer(operator, healthy)
	reflection.Register(operator)

	p.parts = append(p.parts,
		serveGRPC("listen", main, p.listeners.grpc, func() { healthy.Shutdown(); gate.Close() }),
		serveGRPC("adminSocket", operator, p.listeners.admin, func() {}))
	return nil
}

// grpcServer is *grpc.Server and *server.Front.
type grpcServer interface {
	Serve(l net.Listener) error
	Stop()
	GracefulStop()
}

// serveGRPC serves until ctx ends; then calls under way have stopTimeout to end.
func serveGRPC(name string, s grpcServer, l net.Listener, stopping func()) func(context.Context) error {
	return func(ctx context.Context) error {
		stopped := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(stopped)
			stopping()
			timer := time.AfterFunc(stopTimeout, s.Stop)
			defer timer.Stop()
			s.GracefulStop()
		})
		err := s.Serve(l)
		if !stop() {
			<-stopped
		}
		if err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
}

// trust returns what agents' certificates are judged by: the bundle of the moment.
func (p *program) trust() func() *tlsconf.Trust {
	type entry struct {
		bundle *ca.Bundle
		trust  *tlsconf.Trust
	}
	var last atomic.Pointer[entry]
	return func() *tlsconf.Trust {
		bundle := p.authority.Bundle()
		if bundle == nil {
			return nil // refuses everybody
		}
		if e := last.Load(); e != nil && e.bundle == bundle {
			return e.trust
		}
		e := &entry{bundle: bundle, trust: &tlsconf.Trust{
			TrustDomain: bundle.TrustDomain,
			Roots:       bundle.Roots,
			Version:     strconv.FormatUint(bundle.Sequence, 10),
		}}
		last.Store(e)
		return e.trust
	}
}
