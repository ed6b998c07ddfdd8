package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"castellan.dev/agent/svid"
	"castellan.dev/agent/upstream"
	"castellan.dev/agent/workloadapi"
	"castellan.dev/internal/xds"
	"castellan.dev/sds"
)

// socket serves one workload everything it may have: SDS, its discovery stream,
// the Workload API, health and reflection.
type socket struct {
	listener net.Listener
	server   *grpc.Server
	health   *health.Server
	source   *svid.Source
	metrics  *metrics
	log      *slog.Logger

	now func() time.Time
	// wipe overwrites the keys that were made ready to send.
	wipe func()

	calls *calls
	// stopping ends when the agent stops: streams end with it.
	stopping context.Context
	stopNow  context.CancelFunc
	stopped  chan struct{}
}

// socketConfig is what a socket is made of.
type socketConfig struct {
	listener  net.Listener
	tenant    *tenant
	source    *svid.Source
	jwts      workloadapi.JWTs
	view      *upstream.View
	reporter  *upstream.Reporter
	metrics   *metrics
	log       *slog.Logger
	now       func() time.Time
	deadlines deadlines
}

func newSocket(cfg socketConfig) (*socket, error) {
	s := &socket{
		listener: counted{cfg.listener, cfg.tenant}, source: cfg.source, health: health.NewServer(),
		metrics: cfg.metrics, log: cfg.log, now: cfg.now, stopped: make(chan struct{}),
		calls: newCalls(cfg.deadlines, cfg.tenant, cfg.metrics.refused),
	}
	s.stopping, s.stopNow = context.WithCancel(context.Background())
	api, err := workloadapi.New(workloadapi.Config{
		Source: cfg.source, JWTs: cfg.jwts, Log: cfg.log, Now: cfg.now,
		Pushed: func(d time.Duration) { cfg.metrics.pushed("workloadapi", d) },
	})
	if err != nil {
		return nil, err
	}
	s.server = grpc.NewServer(s.options()...)
	workload.RegisterSpiffeWorkloadAPIServer(s.server, api)
	keys := &material{source: cfg.source, log: cfg.log}
	secrets := sds.NewServer(sds.Config{
		Provider: keys, Log: cfg.log,
		Observe: func(context.Context) (xds.Observer, func()) { return cfg.reporter.Stream("sds") },
	})
	s.wipe = func() { secrets.Wipe(); keys.wipe() }
	secretv3.RegisterSecretDiscoveryServiceServer(s.server, secrets)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(s.server, &discovery{view: cfg.view, reporter: cfg.reporter, log: cfg.log})
	healthv1.RegisterHealthServer(s.server, s.health)
	reflection.Register(s.server)
	s.calls.learn(s.server.GetServiceInfo())
	s.show(false)
	return s, nil
}

// show sets the health of the identity services: serving while there is an
// identity. The socket itself ("") is up as long as it answers.
func (s *socket) show(valid bool) {
	st := healthv1.HealthCheckResponse_NOT_SERVING
	if valid {
		st = healthv1.HealthCheckResponse_SERVING
	}
	for _, name := range []string{
		workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName,
		secretv3.SecretDiscoveryService_ServiceDesc.ServiceName,
	} {
		s.health.SetServingStatus(name, st)
	}
}

// run serves until ctx ends; then streams are told to come again, and what does
// not end in time is cut.
func (s *socket) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, s.stop)
	defer stop()
	if err := s.server.Serve(s.listener); err != nil && ctx.Err() == nil {
		return fmt.Errorf("socket %q: %w", s.listener.Addr(), err)
	}
	<-s.stopped
	s.wipe()
	return nil
}

func (s *socket) stop() {
	defer close(s.stopped)
	s.stopNow()
	s.health.Shutdown()
	cut := time.AfterFunc(drainTimeout, s.server.Stop)
	defer cut.Stop()
	s.server.GracefulStop()
}
