package agenttest

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/xds"
)

// accountOf reads a credential of the call.
func accountOf(ctx context.Context, header string) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get(header)
	if len(values) != 1 {
		return "", status.Errorf(codes.Unauthenticated, "%d values of %s", len(values), header)
	}
	parts := strings.Split(strings.TrimPrefix(values[0], "Bearer "), ".")
	if len(parts) != 3 {
		return "", status.Error(codes.Unauthenticated, "no token")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct{ Sub string }
	if err != nil || json.Unmarshal(payload, &claims) != nil {
		return "", status.Error(codes.Unauthenticated, "no token")
	}
	return strings.ReplaceAll(strings.TrimPrefix(claims.Sub, "system:serviceaccount:"), ":", "/"), nil
}

// begin attests a call and counts it in.
func (s *Server) begin(ctx context.Context, method string, key any) (account string, knobs Knobs, end func(), err error) {
	if account, err = accountOf(ctx, "authorization"); err != nil {
		return "", knobs, nil, err
	}
	agent, err := accountOf(ctx, "castellan-agent-token")
	if err != nil || agent != AgentAccount {
		return "", knobs, nil, status.Error(codes.PermissionDenied, "not an agent")
	}
	md, _ := metadata.FromIncomingContext(ctx)
	s.mu.Lock()
	s.requests = append(s.requests, Request{Method: method, Account: account, Cluster: strings.Join(md.Get("clusterid"), ","), Key: key, At: now()})
	s.inFlight[method+account]++
	s.maxFlight[method+account] = max(s.maxFlight[method+account], s.inFlight[method+account])
	knobs = s.Knobs
	s.mu.Unlock()
	end = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.inFlight[method+account]--
	}
	if knobs.Before != nil {
		if err := knobs.Before(ctx, account); err != nil {
			end()
			return "", knobs, nil, err
		}
	}
	return account, knobs, end, nil
}

// ID is the SPIFFE ID of an account.
func ID(account string) string {
	ns, sa, _ := strings.Cut(account, "/")
	return "spiffe://" + TrustDomain + "/ns/" + ns + "/sa/" + sa
}

type certificates struct {
	securityv1alpha1.UnimplementedIstioCertificateServiceServer
	s *Server
}

func (c certificates) CreateCertificate(ctx context.Context, req *securityv1alpha1.IstioCertificateRequest) (*securityv1alpha1.IstioCertificateResponse, error) {
	block, _ := pem.Decode([]byte(req.GetCsr()))
	if block == nil {
		return nil, status.Error(codes.InvalidArgument, "no PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || csr.CheckSignature() != nil {
		return nil, status.Error(codes.InvalidArgument, "no CSR")
	}
	account, knobs, end, err := c.s.begin(ctx, "CreateCertificate", csr.PublicKey)
	if err != nil {
		return nil, err
	}
	defer end()
	a := c.s.Authority()
	good := a.Elements(a.Leaf(c.s.t, ID(account), csr.PublicKey, knobs.TTL, nil), knobs.Roots...)
	if knobs.Answer != nil {
		good = knobs.Answer(account, csr, good)
	}
	return &securityv1alpha1.IstioCertificateResponse{CertChain: good}, nil
}

type identities struct {
	castellanv1.UnimplementedIdentityServer
	s *Server
}

func (i identities) MintJWT(ctx context.Context, req *castellanv1.MintJWTRequest) (*castellanv1.MintJWTResponse, error) {
	account, knobs, end, err := i.s.begin(ctx, "MintJWT", nil)
	if err != nil {
		return nil, err
	}
	defer end()
	expires := now().Add(knobs.JWTTTL)
	token := i.s.Mint(map[string]any{"sub": ID(account), "aud": req.GetAudience(), "exp": expires.Unix(), "iat": now().Unix()}, nil)
	return &castellanv1.MintJWTResponse{Token: token, SpiffeId: ID(account), ExpiresAt: timestamppb.New(expires)}, nil
}

// Mint signs any claims, with extra headers.
func (s *Server) Mint(claims map[string]any, header map[jose.HeaderKey]any) string {
	opts := (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", "jwt-1")
	for k, v := range header {
		opts = opts.WithHeader(k, v)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: s.jwtKey}, opts)
	if err != nil {
		s.t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

// SignPayload signs any bytes as a token's claims.
func (s *Server) SignPayload(payload string) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: s.jwtKey}, (&jose.SignerOptions{}).WithHeader("kid", "jwt-1"))
	if err != nil {
		s.t.Fatal(err)
	}
	jws, err := signer.Sign([]byte(payload))
	if err != nil {
		s.t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

type discovery struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	s *Server
}

func (d discovery) DeltaAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	if err := d.s.checkAgent(stream.Context()); err != nil {
		return err
	}
	d.s.mu.Lock()
	d.s.streams++
	d.s.mu.Unlock()
	return xds.ServeDelta(stream, xds.Config{Source: d.s.Table, Types: []string{
		"type.googleapis.com/castellan.v1.WorkloadPolicy", "type.googleapis.com/castellan.v1.ServiceIdentity",
		"type.googleapis.com/castellan.v1.Jwks", "type.googleapis.com/castellan.v1.Bundle", "type.googleapis.com/castellan.v1.Denylist",
	}})
}

// checkAgent wants a client certificate of the agent that verifies now.
func (s *Server) checkAgent(ctx context.Context) error {
	s.mu.Lock()
	refuse, a := s.Knobs.Stream, s.authority
	s.mu.Unlock()
	if refuse != nil {
		if err := refuse(); err != nil {
			return err
		}
	}
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return status.Error(codes.Unauthenticated, "no client certificate")
	}
	leaf := info.State.PeerCertificates[0]
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	opts.Roots.AddCert(a.Root)
	opts.Intermediates.AddCert(a.Intermediate)
	if _, err := leaf.Verify(opts); err != nil {
		return status.Error(codes.Unauthenticated, "client certificate does not verify")
	}
	if leaf.URIs[0].String() != ID(AgentAccount) {
		return status.Error(codes.PermissionDenied, "not an agent")
	}
	return nil
}

type nodes struct {
	castellanv1.UnimplementedNodeServer
	s *Server
}

func (n nodes) Report(ctx context.Context, req *castellanv1.ReportRequest) (*castellanv1.ReportResponse, error) {
	if err := n.s.checkAgent(ctx); err != nil {
		return nil, err
	}
	n.s.mu.Lock()
	defer n.s.mu.Unlock()
	n.s.reports = append(n.s.reports, proto.Clone(req).(*castellanv1.ReportRequest))
	return &castellanv1.ReportResponse{}, nil
}
