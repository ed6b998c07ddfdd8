package workloadapi

import (
	"context"
	"errors"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
)

// Bounds of what a caller may ask a JWT-SVID for.
const (
	maxAudience      = 16
	maxAudienceBytes = 1024
)

// FetchJWTSVID returns the workload's JWT-SVID for the asked audience.
func (s *Server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := checkHeader(ctx); err != nil {
		return nil, err
	}
	if err := checkAudience(req.GetAudience()); err != nil {
		return nil, err
	}
	state, err := s.started(ctx)
	if err != nil {
		return nil, err
	}
	if asked := req.GetSpiffeId(); asked != "" {
		id, err := spiffeid.FromString(asked)
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, "spiffe_id is not a SPIFFE ID")
		}
		if id != state.Workload.ID() {
			return nil, status.Error(codes.PermissionDenied, textNoIdentity)
		}
	}
	jwt, err := s.cfg.JWTs.Fetch(ctx, req.GetAudience())
	if err != nil {
		return nil, s.jwtError(ctx, err)
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{
		SpiffeId: jwt.ID.String(), Svid: jwt.Marshal(), Hint: hint(state),
	}}}, nil
}

func checkAudience(audience []string) error {
	if len(audience) == 0 || len(audience) > maxAudience {
		return status.Errorf(codes.InvalidArgument, "audience must name 1 to %d recipients", maxAudience)
	}
	for _, a := range audience {
		if a == "" || len(a) > maxAudienceBytes {
			return status.Errorf(codes.InvalidArgument, "each audience must have 1 to %d bytes", maxAudienceBytes)
		}
	}
	return nil
}

// started waits, within bounds, until it is known who the workload is, and that
// the server does not refuse it.
func (s *Server) started(ctx context.Context) (*svid.Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Hold)
	defer cancel()
	for {
		state, changed := s.cfg.Source.Current()
		switch {
		case state.Status == svid.Refused:
			return nil, status.Error(codes.PermissionDenied, textNoIdentity)
		case !state.Workload.IsZero():
			return state, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, status.Error(codes.Unavailable, textStarting)
		}
	}
}

// jwtError tells the caller what to do, and the log why.
func (s *Server) jwtError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	s.cfg.Log.Warn("JWT-SVID not issued", "kind", caclient.KindOf(err).String(), "error", err)
	switch caclient.KindOf(err) {
	case caclient.Refused:
		return status.Error(codes.PermissionDenied, textNoIdentity)
	case caclient.Invalid:
		return status.Error(codes.InvalidArgument, "the server does not issue a JWT-SVID for this audience")
	default:
		return status.Error(codes.Unavailable, "JWT-SVID cannot be issued now, try again")
	}
}

// FetchJWTBundles streams the keys that JWT-SVIDs are verified with, by trust domain.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream workload.SpiffeWorkloadAPI_FetchJWTBundlesServer) error {
	return watch(stream.Context(), s, func(state *svid.Snapshot) (*workload.JWTBundlesResponse, error) {
		if err := jwtBundles(state); err != nil {
			return nil, err
		}
		resp := &workload.JWTBundlesResponse{Bundles: map[string][]byte{state.Trust.Domain.IDString(): state.Trust.Own.JWT}}
		for td, b := range state.Trust.Federated {
			resp.Bundles[td.IDString()] = b.JWT
		}
		return resp, nil
	}, stream.Send)
}

func jwtBundles(state *svid.Snapshot) error {
	if err := bundles(state); err != nil {
		return err
	}
	// The keys come only with the Bundle resource, not with a certificate.
	if len(state.Trust.Own.JWT) == 0 {
		return status.Error(codes.Unavailable, textNoBundle)
	}
	return nil
}

// ValidateJWTSVID verifies somebody's JWT-SVID for the caller.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if err := checkHeader(ctx); err != nil {
		return nil, err
	}
	switch {
	case req.GetAudience() == "":
		return nil, status.Error(codes.InvalidArgument, "audience must be given")
	case req.GetSvid() == "":
		return nil, status.Error(codes.InvalidArgument, "svid must be given")
	}
	state, _ := s.cfg.Source.Current()
	if err := jwtBundles(state); err != nil {
		return nil, err
	}
	id, claims, err := validate(req.GetSvid(), req.GetAudience(), state.Trust, s.cfg.Now())
	if err != nil {
		invalid := &invalidError{}
		errors.As(err, &invalid)
		s.cfg.Log.Info("JWT-SVID refused", "reason", invalid.text, "error", err)
		return nil, status.Error(codes.InvalidArgument, "JWT-SVID refused: "+invalid.text)
	}
	out, err := structpb.NewStruct(claims)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "JWT-SVID refused: its claims cannot be returned")
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: out}, nil
}
