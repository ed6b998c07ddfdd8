package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"log/slog"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	istiov1 "istio.io/api/security/v1alpha1"

	"castellan.dev/ca"
)

const (
	// maxCSR is far below gRPC's own bound, whose answer clients would retry.
	maxCSR = 16 << 10
	// maxMetadata bounds the request's free-form metadata.
	maxMetadata = 64
	// minValiditySeconds is also the shortest default the configuration allows. A
	// client that renews at half-life then asks every 2 s or seldomer, which its
	// bucket refills for; certificates hold whole seconds, so that a shorter one may
	// have hardly any life left when it arrives, and the client asks in a loop.
	// Raising it instead would give more than was asked for.
	minValiditySeconds = 5

	impersonatedIdentity = "ImpersonatedIdentity"
)

// CreateCertificate issues an X509-SVID. Each element of the answer's chain is
// one PEM ending in a newline: leaf, intermediates, then all roots in the last.
func (s *Server) CreateCertificate(ctx context.Context, req *istiov1.IstioCertificateRequest) (*istiov1.IstioCertificateResponse, error) {
	call := s.begin(ctx, kindX509)
	if len(req.GetCsr()) > maxCSR {
		return nil, call.refuse(invalid("csr-size", "certificate request of %d bytes, %d are allowed", len(req.GetCsr()), maxCSR))
	}
	if v := req.GetValidityDuration(); v > 0 && v < minValiditySeconds {
		return nil, call.refuse(invalid("validity", "a validity of %d s, at least %d s are needed", v, minValiditySeconds))
	}
	impersonate, err := impersonation(req.GetMetadata())
	if err != nil {
		return nil, call.refuse(err)
	}
	who, err := call.admit(impersonate)
	if err != nil {
		return nil, call.refuse(err)
	}
	call.requested()
	issued, err := s.cfg.Issuer.Issue(ctx, ca.Request{
		CSR: []byte(req.GetCsr()), Workload: who.Workload, TTL: seconds(req.GetValidityDuration()),
		PodUID: who.PodUID, Node: who.Node, Cluster: who.Cluster, Attestor: who.Attestor,
	})
	if err != nil {
		return nil, call.refuse(err)
	}
	call.issued(slog.String("serial", issued.Serial), issued.NotAfter)
	return &istiov1.IstioCertificateResponse{CertChain: s.chain(issued)}, nil
}

// seconds reads a validity: zero and negative mean the default, and what does
// not fit is as long as can be, to be capped.
func seconds(v int64) time.Duration {
	if v <= 0 {
		return 0
	}
	return time.Duration(min(v, math.MaxInt64/int64(time.Second))) * time.Second
}

// impersonation reads the one member of the metadata that means something here.
func impersonation(md *structpb.Struct) (string, error) {
	if len(md.GetFields()) > maxMetadata {
		return "", invalid("metadata", "metadata of %d fields, %d are allowed", len(md.GetFields()), maxMetadata)
	}
	v, ok := md.GetFields()[impersonatedIdentity]
	if !ok {
		return "", nil
	}
	s, ok := v.GetKind().(*structpb.Value_StringValue)
	if !ok || s.StringValue == "" {
		// Passing over it would issue the caller's own identity in place of the one asked for.
		return "", invalid("metadata", "metadata %s is no name", impersonatedIdentity)
	}
	return s.StringValue, nil
}

// authorityPEM is the PEM form of intermediates and roots. It is immutable.
type authorityPEM struct {
	intermediates, roots [][]byte // DER
	elements             []string
}

func (a *authorityPEM) is(intermediates, roots [][]byte) bool {
	return equalAll(a.intermediates, intermediates) && equalAll(a.roots, roots)
}

func equalAll(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

// chain writes the answer; what follows the leaf changes with rotations only.
func (s *Server) chain(issued *ca.Issued) []string {
	intermediates := issued.Chain[1:]
	tail := s.authorities.Load()
	if tail == nil || !tail.is(intermediates, issued.Roots) {
		tail = &authorityPEM{intermediates: intermediates, roots: issued.Roots}
		for _, der := range intermediates {
			tail.elements = append(tail.elements, certificatePEM(der))
		}
		var roots string
		for _, der := range issued.Roots {
			roots += certificatePEM(der)
		}
		tail.elements = append(tail.elements, roots)
		s.authorities.Store(tail)
	}
	chain := make([]string, 0, 1+len(tail.elements))
	chain = append(chain, certificatePEM(issued.Chain[0]))
	return append(chain, tail.elements...)
}

// certificatePEM writes what pem.EncodeToMemory does (a test holds them equal) with
// few allocations: it is done once per certificate, beside the signing.
func certificatePEM(der []byte) string {
	const begin, end = "-----BEGIN CERTIFICATE-----\n", "-----END CERTIFICATE-----\n"
	const perLine = 48 // bytes that make 64 characters
	out := make([]byte, 0, len(begin)+len(end)+base64.StdEncoding.EncodedLen(len(der))+len(der)/perLine+1)
	out = append(out, begin...)
	for line := range slices.Chunk(der, perLine) {
		out = append(base64.StdEncoding.AppendEncode(out, line), '\n')
	}
	out = append(out, end...)
	return string(out)
}
