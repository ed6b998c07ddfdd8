package agent

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/svid"
	"castellan.dev/agent/upstream"
	"castellan.dev/internal/xds"
	"castellan.dev/sds"
)

// stream watches streams, and ends them when the agent stops.
func (s *socket) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	s.metrics.streams.WithLabelValues(service(info.FullMethod)).Inc()
	defer s.metrics.streams.WithLabelValues(service(info.FullMethod)).Dec()
	stop := context.AfterFunc(s.stopping, cancel)
	defer stop()
	var observed grpc.ServerStream = &bounded{ServerStream: ss, ctx: ctx, call: callOf(ctx)}
	if service(info.FullMethod) == "sds" {
		observed = s.timed(observed)
	}
	err := handler(srv, observed)
	if s.stopping.Err() != nil {
		return status.Error(codes.Unavailable, "agent is stopping, try again")
	}
	return err
}

// service names an API as metrics label it.
func service(method string) string {
	switch {
	case strings.HasPrefix(method, "/SpiffeWorkloadAPI/"):
		return "workloadapi"
	case strings.HasPrefix(method, "/envoy.service.secret.v3."):
		return "sds"
	case strings.HasPrefix(method, "/envoy.service.discovery.v3."):
		return "ads"
	default:
		return "other"
	}
}

// bounded has the agent know what a stream makes it hold.
type bounded struct {
	grpc.ServerStream
	ctx  context.Context
	call *call
}

// Context ends with the stream or with the agent.
func (b *bounded) Context() context.Context { return b.ctx }

// RecvMsg notes that the client has spoken (the first message has a deadline) and
// what is remembered of it.
func (b *bounded) RecvMsg(m any) error {
	err := b.ServerStream.RecvMsg(m)
	b.call.first.Stop()
	if err == nil && !b.call.keep(m) {
		return status.Error(codes.Unavailable, "no room for what is asked, try again")
	}
	return err
}

// SendMsg waits until there is room for what the client may leave unread.
func (b *bounded) SendMsg(m any) error {
	if err := b.call.send(b.ctx, m); err != nil {
		return err
	}
	return b.ServerStream.SendMsg(m)
}

// answer waits until there is room for a unary call's answer.
func answer(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err == nil {
		err = callOf(ctx).send(ctx, resp)
	}
	return resp, err
}

// timed measures how long a new certificate takes to be sent on an SDS stream: a
// message that goes out after a state was published, with nothing asked since,
// is a push of it.
type timed struct {
	grpc.ServerStream
	socket *socket
	asked  atomic.Int64 // when the client last said something, Unix nanoseconds
	shown  *svid.Snapshot
}

func (s *socket) timed(ss grpc.ServerStream) grpc.ServerStream {
	now, _ := s.source.Current()
	return &timed{ServerStream: ss, socket: s, shown: now}
}

// RecvMsg notes the time.
func (t *timed) RecvMsg(m any) error {
	err := t.ServerStream.RecvMsg(m)
	t.asked.Store(t.socket.now().UnixNano())
	return err
}

// SendMsg observes the push once it has been handed to the connection.
func (t *timed) SendMsg(m any) error {
	err := t.ServerStream.SendMsg(m)
	state, _ := t.socket.source.Current()
	if err == nil && state != t.shown && state.Published.UnixNano() > t.asked.Load() {
		t.socket.metrics.pushed("sds", t.socket.now().Sub(state.Published))
	}
	t.shown = state
	return err
}

// material shows a workload's state to package sds.
type material struct {
	source *svid.Source
	log    *slog.Logger
	last   atomic.Pointer[made]
}

// made keeps what was built of a state, for the streams that come to ask.
type made struct {
	from     *svid.Snapshot
	material *sds.Material
}

// Material implements sds.Provider. Without a valid SVID there is none: Envoy
// keeps what it has, which has expired by itself.
func (m *material) Material() (*sds.Material, <-chan struct{}) {
	state, changed := m.source.Current()
	if state.Status != svid.Valid || state.SVID == nil || state.Trust == nil {
		return nil, changed
	}
	if last := m.last.Load(); last != nil && last.from == state {
		return last.material, changed
	}
	key, err := state.SVID.Key.PKCS8()
	if err != nil {
		m.log.Error("key cannot be encoded", "id", state.SVID.ID.String(), "error", err)
		return nil, changed
	}
	out := &sds.Material{
		ID: state.SVID.ID, Chain: state.SVID.Chain, KeyPKCS8: key,
		TrustDomain: state.Trust.Domain, Roots: state.Trust.Own.X509,
	}
	for td, b := range state.Trust.Federated {
		if out.Federated == nil {
			out.Federated = map[spiffeid.TrustDomain][][]byte{}
		}
		out.Federated[td] = b.X509
	}
	m.last.Store(&made{from: state, material: out})
	return out, changed
}

// wipe overwrites what was made last. No stream is left to send it.
func (m *material) wipe() {
	if last := m.last.Load(); last != nil {
		clear(last.material.KeyPKCS8)
	}
}

// discovery serves the workload's delta stream; it has no state-of-the-world form.
type discovery struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	view     *upstream.View
	reporter *upstream.Reporter
	log      *slog.Logger
}

// DeltaAggregatedResources serves policy, services, key sets, bundles and the deny list.
func (d *discovery) DeltaAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	observer, end := d.reporter.Stream("ads")
	defer end()
	return xds.ServeDelta(stream, xds.Config{Source: d.view, Types: upstream.Types(), Observer: observer, Log: d.log})
}
