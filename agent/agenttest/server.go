// Package agenttest is a small working server for tests of the agent: it signs
// certificates and JWT-SVIDs for tokens it takes at their word, serves resources,
// and records reports. Tests make it slow, refusing, wrong or absent.
package agenttest

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/go-jose/go-jose/v4"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/xds"
)

// TrustDomain is the fake's.
const TrustDomain = "cluster.local"

// AgentAccount is who the agent's token names.
const AgentAccount = "castellan-system/castellan-agent"

// Server is a fake of castellan-server. Its fields may be changed between calls
// through Set.
type Server struct {
	t          testing.TB
	dir        string
	BundleFile string
	Table      *xds.Table

	mu        sync.Mutex
	addr      string
	grpc      *grpc.Server
	done      chan struct{}
	Knobs     Knobs
	authority *Authority
	jwtKey    *ecdsa.PrivateKey
	served    tls.Certificate
	requests  []Request
	inFlight  map[string]int
	maxFlight map[string]int
	reports   []*castellanv1.ReportRequest
	streams   int
}

// Knobs are what a test turns.
type Knobs struct {
	TTL    time.Duration
	JWTTTL time.Duration
	// Before may delay or refuse a call for an account.
	Before func(ctx context.Context, account string) error
	// Answer may replace a CreateCertificate answer.
	Answer func(account string, csr *x509.CertificateRequest, good []string) []string
	// Stream may refuse the discovery stream and reports.
	Stream func() error
	// Roots are those of an answer; nil is the authority's own.
	Roots []*x509.Certificate
}

// Request is one CreateCertificate or MintJWT call.
type Request struct {
	Method, Account, Cluster string
	Key                      any
	At                       time.Time
}

// New starts a server that ends with the test.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{
		t: t, dir: t.TempDir(), jwtKey: newKey(t), authority: NewAuthority(t, "first"),
		Knobs:    Knobs{TTL: time.Hour, JWTTTL: 5 * time.Minute},
		inFlight: map[string]int{}, maxFlight: map[string]int{},
		Table: xds.NewTable("type.googleapis.com/castellan.v1.WorkloadPolicy", "type.googleapis.com/castellan.v1.ServiceIdentity",
			"type.googleapis.com/castellan.v1.Jwks", "type.googleapis.com/castellan.v1.Bundle", "type.googleapis.com/castellan.v1.Denylist"),
	}
	s.BundleFile = filepath.Join(s.dir, "bundle.pem")
	s.WriteBundle(s.authority.Root)
	s.Serve(s.authority)
	for _, url := range []string{"WorkloadPolicy", "ServiceIdentity", "Jwks", "Denylist"} {
		s.Table.Set("type.googleapis.com/castellan.v1."+url, xds.Snapshot{})
	}
	s.SetBundle(s.authority.Root)
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// Serve makes a serving certificate under a.
func (s *Server) Serve(a *Authority) {
	key := newKey(s.t)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.served = tls.Certificate{Certificate: [][]byte{a.serving(s.t, key).Raw}, PrivateKey: key}
}

// WriteBundle replaces the bundle file.
func (s *Server) WriteBundle(roots ...*x509.Certificate) {
	text := ""
	for _, r := range roots {
		text += PEM(r)
	}
	WriteFile(s.t, s.BundleFile, text)
}

// WriteFile replaces a file atomically.
func WriteFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// SetBundle publishes the Bundle resource.
func (s *Server) SetBundle(roots ...*x509.Certificate) {
	b := &castellanv1.Bundle{TrustDomain: TrustDomain, JwtAuthorities: s.JWKS(), Sequence: uint64(len(roots))}
	for _, r := range roots {
		b.X509Authorities = append(b.X509Authorities, r.Raw)
	}
	s.Publish(TrustDomain, b)
}

// Publish sets a type's resources to this one.
func (s *Server) Publish(name string, m proto.Message) {
	s.t.Helper()
	r, err := xds.NewResource(name, m)
	if err != nil {
		s.t.Fatal(err)
	}
	s.Table.Set(r.Body.GetTypeUrl(), xds.NewSnapshot(r))
}

// JWKS is the key set of JWT-SVIDs, with a key for another use beside it.
func (s *Server) JWKS() []byte {
	out, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: s.jwtKey.Public(), KeyID: "jwt-1", Use: "jwt-svid", Algorithm: "ES256"},
		{Key: s.jwtKey.Public(), KeyID: "x509-1", Use: "x509-svid"},
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// Authority returns the one that signs now; SetAuthority replaces it.
func (s *Server) Authority() *Authority {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.authority
}

// SetAuthority makes a sign from now on.
func (s *Server) SetAuthority(a *Authority) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.authority = a
}

// Set turns knobs.
func (s *Server) Set(change func(*Knobs)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.Knobs)
}

// Addr is host:port, the same after a restart.
func (s *Server) Addr() string { return s.addr }

// Start begins to listen.
func (s *Server) Start() {
	s.t.Helper()
	addr := s.addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	var l net.Listener
	var err error
	for range 500 { // the kernel may not have let go of the port yet
		if l, err = net.Listen("tcp", addr); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr = l.Addr().String()
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return &s.served, nil
		},
	})), grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 15 * time.Second, PermitWithoutStream: true}))
	securityv1alpha1.RegisterIstioCertificateServiceServer(server, certificates{s: s})
	castellanv1.RegisterIdentityServer(server, identities{s: s})
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(server, discovery{s: s})
	castellanv1.RegisterNodeServer(server, nodes{s: s})
	done := make(chan struct{})
	s.mu.Lock()
	s.grpc, s.done = server, done
	s.mu.Unlock()
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
}

// Stop ends every connection.
func (s *Server) Stop() {
	s.mu.Lock()
	server, done := s.grpc, s.done
	s.grpc = nil
	s.mu.Unlock()
	if server != nil {
		server.Stop()
		<-done
	}
}

// Requests returns the calls so far.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

// MaxInFlight is the most calls of one method that were under way for account.
func (s *Server) MaxInFlight(method, account string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.maxFlight[method+account]
}

// Reports returns the reports so far.
func (s *Server) Reports() []*castellanv1.ReportRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*castellanv1.ReportRequest(nil), s.reports...)
}

// Streams counts discovery streams opened so far.
func (s *Server) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams
}

// TokenFile writes a token of the account and returns its path.
func (s *Server) TokenFile(account, podUID string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, "token-"+strings.ReplaceAll(account, "/", "-")+podUID)
	WriteFile(s.t, path, Token(account, podUID)+"\n")
	return path
}

// Token is of the shape of a service account's token; its signature is none.
func Token(account, podUID string) string {
	ns, sa, _ := strings.Cut(account, "/")
	payload, _ := json.Marshal(map[string]any{
		"sub": "system:serviceaccount:" + ns + ":" + sa, "jti": fmt.Sprint(now().UnixNano()),
		"kubernetes.io": map[string]any{
			"namespace": ns, "pod": map[string]string{"name": sa + "-0", "uid": podUID}, "node": map[string]string{"name": "local"},
			"serviceaccount": map[string]string{"name": sa, "uid": "sa-" + sa},
		},
	})
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(`{"alg":"RS256","kid":"k"}`)) + "." + enc(payload) + "." + enc([]byte("signature"))
}
