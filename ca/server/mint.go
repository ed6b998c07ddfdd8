package server

import (
	"context"
	"log/slog"

	"google.golang.org/protobuf/types/known/timestamppb"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// Bounds of a MintJWT request.
const (
	maxAudiences     = 16
	maxAudienceBytes = 1024
)

// MintJWT issues a JWT-SVID.
func (s *Server) MintJWT(ctx context.Context, req *castellanv1.MintJWTRequest) (*castellanv1.MintJWTResponse, error) {
	call := s.begin(ctx, kindJWT)
	if len(req.GetAudience()) > maxAudiences {
		return nil, call.refuse(invalid("audience", "%d audiences, %d are allowed", len(req.GetAudience()), maxAudiences))
	}
	for _, a := range req.GetAudience() {
		if len(a) > maxAudienceBytes {
			return nil, call.refuse(invalid("audience", "an audience of %d bytes, %d are allowed", len(a), maxAudienceBytes))
		}
	}
	who, err := call.admit("")
	if err != nil {
		return nil, call.refuse(err)
	}
	call.requested()
	id := who.Workload.ID()
	svid, err := s.cfg.JWTIssuer.Mint(ctx, id, req.GetAudience(), seconds(req.GetTtlSeconds()))
	if err != nil {
		return nil, call.refuse(err)
	}
	call.issued(slog.Any("audience", req.GetAudience()), svid.ExpiresAt)
	return &castellanv1.MintJWTResponse{
		Token:     svid.Token,
		SpiffeId:  id.String(),
		ExpiresAt: timestamppb.New(svid.ExpiresAt),
		IssuedAt:  timestamppb.New(svid.IssuedAt),
	}, nil
}
