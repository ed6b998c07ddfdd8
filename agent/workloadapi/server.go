// Package workloadapi serves the SPIFFE Workload API, X.509 and JWT profiles, to
// one workload.
//
// It refuses callers that do not send the security header, and answers nothing
// half-made: every message is the workload's full state at one moment, or an
// error. It assumes that whoever can call it is the workload: the socket decides
// that, not this package.
package workloadapi

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
)

// defaultHold is how long a stream that was opened before the first certificate
// waits for it; after that the caller is told to come again.
const defaultHold = time.Second

// Source is a workload's state; *svid.Source is one.
type Source interface {
	Current() (*svid.Snapshot, <-chan struct{})
}

// JWTs has JWT-SVIDs of the workload; *svid.JWTs is one.
type JWTs interface {
	Fetch(ctx context.Context, audience []string) (*caclient.JWT, error)
}

// Config sets up a Server.
type Config struct {
	Source Source
	JWTs   JWTs
	// Pushed is told how long a change took to be sent; it may be nil.
	Pushed func(time.Duration)
	// Hold is how long a stream waits for the first certificate; 0 means a second.
	Hold time.Duration
	Log  *slog.Logger
	Now  func() time.Time
}

// Server implements workload.SpiffeWorkloadAPIServer. The WIT profile is not
// served: its methods answer Unimplemented.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	cfg Config
}

// New returns a Server for one workload.
func New(cfg Config) (*Server, error) {
	if cfg.Source == nil || cfg.JWTs == nil {
		return nil, errors.New("workloadapi: a source of SVIDs and one of JWT-SVIDs are needed")
	}
	if cfg.Hold <= 0 {
		cfg.Hold = defaultHold
	}
	if cfg.Pushed == nil {
		cfg.Pushed = func(time.Duration) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	return &Server{cfg: cfg}, nil
}

// The texts that callers see. Clients look for the words of the first.
const (
	textNoIdentity = "no identity issued"
	textStarting   = "identity not issued yet, try again"
	textNoBundle   = "trust bundle not known yet, try again"
	textHeader     = "security header missing: workload.spiffe.io must be \"true\""
)

// checkHeader keeps out whoever was tricked into connecting, such as a browser
// or a proxy that can be made to send requests (Workload Endpoint 6).
func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if !slices.Equal(md.Get("workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, textHeader)
	}
	return nil
}

// watch sends what build makes of each state, first at once and then whenever it
// differs from what was sent last.
func watch[M proto.Message](ctx context.Context, s *Server, build func(*svid.Snapshot) (M, error), send func(M) error) error {
	if err := checkHeader(ctx); err != nil {
		return err
	}
	hold := time.NewTimer(s.cfg.Hold)
	defer hold.Stop()
	var last M
	sent := false
	for {
		snapshot, changed := s.cfg.Source.Current()
		msg, err := build(snapshot)
		switch {
		case err != nil && (sent || status.Code(err) != codes.Unavailable):
			return err
		case err == nil && (!sent || !proto.Equal(last, msg)):
			if err := send(msg); err != nil {
				return err
			}
			if sent {
				s.cfg.Pushed(s.cfg.Now().Sub(snapshot.Published))
			}
			last, sent = msg, true
			hold.Stop()
		}
		select {
		case <-changed:
		case <-hold.C:
			return err
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// identity returns the error of a state that has no SVID to show. One that
// expired is withdrawn like one that was refused: the caller must not use it.
func identity(s *svid.Snapshot) error {
	switch {
	case s.Status == svid.Starting:
		return status.Error(codes.Unavailable, textStarting)
	case s.Status != svid.Valid || s.SVID == nil:
		return status.Error(codes.PermissionDenied, textNoIdentity)
	case s.Trust == nil:
		return status.Error(codes.Unavailable, textNoBundle)
	}
	return nil
}

// bundles returns the error of a state that has no bundles to show. They stay
// good when the SVID has expired, but a workload that is refused gets none.
func bundles(s *svid.Snapshot) error {
	switch {
	case s.Status == svid.Refused:
		return status.Error(codes.PermissionDenied, textNoIdentity)
	case s.Trust == nil:
		return status.Error(codes.Unavailable, textNoBundle)
	}
	return nil
}

// hint tells people which identity this is; there is one per socket, so that it
// is unique (Workload API 5.2.2).
func hint(s *svid.Snapshot) string { return s.Workload.Account().String() }
