package agent

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"castellan.dev/agent/attest"
	"castellan.dev/agent/caclient"
	castellanv1 "castellan.dev/api/castellan/v1"
)

const (
	adminConnections = 16
	adminTimeout     = 30 * time.Second
)

// operators are the uids that may ask on the node's own sockets: root's and ours.
func operators() []uint32 {
	return slices.Compact([]uint32{0, uint32(os.Geteuid())})
}

// serveAdmin serves the operator until ctx ends.
func (a *Agent) serveAdmin(ctx context.Context) error {
	if a.driver != nil {
		// The agent before this one may still have the socket: it goes with the lock
		// on the state that the driver waits for.
		if err := a.driver.Owned(ctx); err != nil {
			return nil // the end, before there was anything to serve
		}
	}
	l, err := attest.Listen(attest.UnixConfig{
		Path: a.cfg.Agent.AdminSocket, UIDs: operators(), Mode: 0o600, Connections: adminConnections, Log: a.cfg.Log,
	})
	if err != nil {
		return fmt.Errorf("admin: %w", err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxHeaderListSize(maxHeaders), grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(adminConnections), grpc.WaitForHandlers(true))
	castellanv1.RegisterAgentAdminServer(server, &admin{agent: a})
	stopped := make(chan struct{})
	context.AfterFunc(ctx, func() { defer close(stopped); server.Stop() })
	if err := server.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("admin: %w", err)
	}
	<-stopped
	return nil
}

// admin answers the operator. It shows certificates, and never a key or a token.
type admin struct {
	castellanv1.UnimplementedAgentAdminServer
	agent *Agent
}

// Certificates tells what is served now.
func (s *admin) Certificates(ctx context.Context, req *castellanv1.CertificatesRequest) (*castellanv1.CertificatesResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	out := &castellanv1.CertificatesResponse{Node: s.agent.cfg.Agent.Node}
	if trust := s.agent.rotator.Trust(); trust != nil {
		out.Roots = trust.Own.X509
	}
	s.agent.each(func(w *workloadServer, podName, podUID string) {
		if want := req.GetPodUid(); (want == "" || want == podUID) && ctx.Err() == nil {
			out.Workloads = append(out.Workloads, s.certificate(w, podName, podUID))
		}
	})
	slices.SortFunc(out.Workloads, func(a, b *castellanv1.WorkloadCertificate) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.PodName, b.PodName), cmp.Compare(a.PodUid, b.PodUid))
	})
	return out, ctx.Err()
}

func (s *admin) certificate(w *workloadServer, podName, podUID string) *castellanv1.WorkloadCertificate {
	state, _ := w.source.Current()
	out := &castellanv1.WorkloadCertificate{
		PodUid: podUID, PodName: podName, Namespace: w.account.Namespace(), ServiceAccount: w.account.Name(), Status: state.Status.String(),
	}
	if state.SVID != nil {
		out.Chain = state.SVID.Chain
	}
	if state.Problem != nil {
		out.Problem = caclient.KindOf(state.Problem).String()
	}
	if at := s.agent.rotator.RenewsAt(w.source); !at.IsZero() {
		out.RenewsAt = timestamppb.New(at)
	}
	return out
}
