package workloadapi

import (
	"bytes"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/svid"
)

// FetchX509SVID streams the workload's certificate, key and bundles.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	return watch(stream.Context(), s, s.x509SVIDs, stream.Send)
}

func (s *Server) x509SVIDs(state *svid.Snapshot) (*workload.X509SVIDResponse, error) {
	if err := identity(state); err != nil {
		return nil, err
	}
	key, err := state.SVID.Key.PKCS8()
	if err != nil {
		s.cfg.Log.Error("key cannot be encoded", "id", state.SVID.ID.String(), "error", err)
		return nil, status.Error(codes.Internal, "identity cannot be encoded")
	}
	resp := &workload.X509SVIDResponse{
		Svids: []*workload.X509SVID{{
			SpiffeId:    state.SVID.ID.String(),
			X509Svid:    bytes.Join(state.SVID.Chain, nil),
			X509SvidKey: key,
			Bundle:      bytes.Join(state.Trust.Own.X509, nil),
			Hint:        hint(state),
		}},
	}
	if len(state.Trust.Federated) > 0 {
		resp.FederatedBundles = make(map[string][]byte, len(state.Trust.Federated))
		for td, b := range state.Trust.Federated {
			resp.FederatedBundles[td.IDString()] = bytes.Join(b.X509, nil)
		}
	}
	return resp, nil
}

// FetchX509Bundles streams the roots of every trust domain known, our own among them.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream workload.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	return watch(stream.Context(), s, func(state *svid.Snapshot) (*workload.X509BundlesResponse, error) {
		if err := bundles(state); err != nil {
			return nil, err
		}
		resp := &workload.X509BundlesResponse{Bundles: map[string][]byte{
			state.Trust.Domain.IDString(): bytes.Join(state.Trust.Own.X509, nil),
		}}
		for td, b := range state.Trust.Federated {
			resp.Bundles[td.IDString()] = bytes.Join(b.X509, nil)
		}
		return resp, nil
	}, stream.Send)
}
