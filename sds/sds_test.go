package sds_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"castellan.dev/internal/xds"
	"castellan.dev/sds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const id = "spiffe://cluster.local/ns/shop/sa/orders"

// provider is what the agent is to the server.
type provider struct {
	mu       sync.Mutex
	material *sds.Material
	changed  chan struct{}
}

func (p *provider) Material() (*sds.Material, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.material, p.changed
}

func (p *provider) set(m *sds.Material) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.material = m
	close(p.changed)
	p.changed = make(chan struct{})
}

var serial int64

// material makes a fresh certificate, self-signed, which is its own root too.
func material(t *testing.T) *sds.Material {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, _ := url.Parse(id)
	serial++
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(serial), URIs: []*url.URL{uri},
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &sds.Material{ID: spiffeid.RequireFromString(id), Chain: [][]byte{der, der}, KeyPKCS8: pkcs8,
		TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), Roots: [][]byte{der},
		Federated: map[spiffeid.TrustDomain][][]byte{spiffeid.RequireTrustDomainFromString("other.test"): {der}}}
}

type fixture struct {
	*provider
	recorder *xds.Recorder
	client   secretv3.SecretDiscoveryServiceClient
	log      *bytes.Buffer
}

// start serves SDS on a Unix socket, as the agent does.
func start(t *testing.T, first *sds.Material) *fixture {
	t.Helper()
	f := &fixture{provider: &provider{material: first, changed: make(chan struct{})}, recorder: &xds.Recorder{}, log: &bytes.Buffer{}}
	var ended sync.WaitGroup
	srv := sds.NewServer(sds.Config{Provider: f, Log: slog.New(slog.NewJSONHandler(&locked{w: f.log}, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Observe: func(context.Context) (xds.Observer, func()) { ended.Add(1); return f.recorder, ended.Done }})
	l, err := net.Listen("unix", t.TempDir()+"/socket")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	secretv3.RegisterSecretDiscoveryServiceServer(g, srv)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	f.client = secretv3.NewSecretDiscoveryServiceClient(conn)
	t.Cleanup(func() { conn.Close(); g.Stop(); <-done; ended.Wait() })
	return f
}

type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// received is a response of either variant.
type received struct {
	version, nonce string
	secrets        map[string]*tlsv3.Secret
}

func (r received) names() []string {
	var names []string
	for name := range r.secrets {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func secret(t *testing.T, into map[string]*tlsv3.Secret, raw *anypb.Any) {
	t.Helper()
	s := &tlsv3.Secret{}
	if err := raw.UnmarshalTo(s); err != nil {
		t.Fatal(err)
	}
	if err := s.ValidateAll(); err != nil {
		t.Errorf("Envoy would refuse %s: %v", s.GetName(), err)
	}
	into[s.GetName()] = s
}

func recvSotW(t *testing.T, st secretv3.SecretDiscoveryService_StreamSecretsClient) received {
	t.Helper()
	resp, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	r := received{version: resp.GetVersionInfo(), nonce: resp.GetNonce(), secrets: map[string]*tlsv3.Secret{}}
	for _, raw := range resp.GetResources() {
		secret(t, r.secrets, raw)
	}
	return r
}

func (f *fixture) stream(t *testing.T) secretv3.SecretDiscoveryService_StreamSecretsClient {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	st, err := f.client.StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func send(t *testing.T, st secretv3.SecretDiscoveryService_StreamSecretsClient, req *discoveryv3.DiscoveryRequest) {
	t.Helper()
	if err := st.Send(req); err != nil {
		t.Fatal(err)
	}
}

// checkPair checks that the certificate is m's and that the key fits it.
func checkPair(t *testing.T, s *tlsv3.Secret, m *sds.Material) {
	t.Helper()
	c := s.GetTlsCertificate()
	chain, key := c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes()
	if !strings.HasPrefix(string(key), "-----BEGIN PRIVATE KEY-----\n") {
		t.Errorf("%s: the key is not PKCS#8", s.GetName())
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		t.Fatalf("%s: %v", s.GetName(), err)
	}
	if len(pair.Certificate) != len(m.Chain) || !bytes.Equal(pair.Certificate[0], m.Chain[0]) {
		t.Errorf("%s: another chain", s.GetName())
	}
}

func checkRoots(t *testing.T, name string, got []byte, want [][]byte) {
	t.Helper()
	for _, der := range want {
		block, rest := pem.Decode(got)
		if block == nil || block.Type != "CERTIFICATE" || !bytes.Equal(block.Bytes, der) {
			t.Fatalf("%s: other roots", name)
		}
		got = rest
	}
	if len(got) > 0 {
		t.Errorf("%s: %d bytes too many", name, len(got))
	}
}

func validator(t *testing.T, s *tlsv3.Secret) []string {
	t.Helper()
	ext := s.GetValidationContext().GetCustomValidatorConfig()
	if ext.GetName() != "envoy.tls.cert_validator.spiffe" {
		t.Fatalf("%s: validator %q", s.GetName(), ext.GetName())
	}
	var cfg tlsv3.SPIFFECertValidatorConfig
	if err := ext.GetTypedConfig().UnmarshalTo(&cfg); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, td := range cfg.GetTrustDomains() {
		names = append(names, td.GetName())
		if block, _ := pem.Decode(td.GetTrustBundle().GetInlineBytes()); block == nil {
			t.Errorf("%s: no roots for %s", s.GetName(), td.GetName())
		}
	}
	return names
}

func TestNames(t *testing.T) {
	m := material(t)
	f := start(t, m)
	all := []string{"ALL", "ROOTCA", "default", "spiffe://cluster.local", id, "spiffe://other.test"}
	for name, c := range map[string]struct{ ask, want []string }{
		"Istio":                       {[]string{"default", "ROOTCA"}, []string{"ROOTCA", "default"}},
		"SPIRE":                       {[]string{id, "spiffe://cluster.local"}, []string{"spiffe://cluster.local", id}},
		"SPIRE, all bundles":          {[]string{"ALL"}, []string{"ALL"}},
		"federated":                   {[]string{"spiffe://other.test"}, []string{"spiffe://other.test"}},
		"one bad name among good":     {[]string{"default", "spiffe://cluster.local/ns/shop/sa/payments", "ROOTCA"}, []string{"ROOTCA", "default"}},
		"everything":                  {nil, all},
		"an empty name is none given": {[]string{""}, all},
	} {
		t.Run(name, func(t *testing.T) {
			st := f.stream(t)
			send(t, st, &discoveryv3.DiscoveryRequest{TypeUrl: sds.TypeSecret, ResourceNames: c.ask})
			got := recvSotW(t, st)
			if !slices.Equal(got.names(), c.want) {
				t.Errorf("got %q, want %q", got.names(), c.want)
			}
			resp, err := f.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{TypeUrl: sds.TypeSecret, ResourceNames: c.ask})
			if err != nil || len(resp.GetResources()) != len(c.want) {
				t.Errorf("fetched %d secrets, %v", len(resp.GetResources()), err)
			}
			if resp.GetVersionInfo() != got.version {
				t.Errorf("fetched version %q, streamed %q", resp.GetVersionInfo(), got.version)
			}
		})
	}
}

func TestSecrets(t *testing.T) {
	m := material(t)
	f := start(t, m)
	st := f.stream(t)
	send(t, st, &discoveryv3.DiscoveryRequest{}) // the type may be left out
	got := recvSotW(t, st)
	checkPair(t, got.secrets["default"], m)
	checkPair(t, got.secrets[id], m)
	checkRoots(t, "ROOTCA", got.secrets["ROOTCA"].GetValidationContext().GetTrustedCa().GetInlineBytes(), m.Roots)
	if got.secrets["ROOTCA"].GetValidationContext().GetCustomValidatorConfig() != nil {
		t.Error("ROOTCA has a custom validator")
	}
	own := got.secrets["spiffe://cluster.local"]
	checkRoots(t, own.GetName(), own.GetValidationContext().GetTrustedCa().GetInlineBytes(), m.Roots)
	if names := validator(t, own); !slices.Equal(names, []string{"cluster.local"}) {
		t.Errorf("own trust domain trusts %q", names)
	}
	if names := validator(t, got.secrets["ALL"]); !slices.Equal(names, []string{"cluster.local", "other.test"}) {
		t.Errorf("ALL trusts %q", names)
	}
	if got.secrets["ALL"].GetValidationContext().GetTrustedCa() != nil {
		t.Error("ALL mixes the roots of trust domains")
	}
}

// TestVersions: a version changes exactly when the content does.
func TestVersions(t *testing.T) {
	m := material(t)
	f := start(t, m)
	version := func(name string) string {
		resp, err := f.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{name}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetVersionInfo()
	}
	leaf, root := version("default"), version("ROOTCA")
	same := *m
	f.set(&same)
	if version("default") != leaf || version("ROOTCA") != root {
		t.Error("versions changed and content did not")
	}
	renewed := material(t)
	renewed.Roots, renewed.Federated = m.Roots, m.Federated
	f.set(renewed)
	if version("default") == leaf {
		t.Error("a new certificate has the old version")
	}
	if version("ROOTCA") != root {
		t.Error("the same roots have another version")
	}
	rerooted := *renewed
	rerooted.Roots = [][]byte{m.Roots[0], renewed.Chain[0]}
	f.set(&rerooted)
	if version("ROOTCA") == root {
		t.Error("new roots have the old version")
	}
}

func TestFetchByLocatorIsRefused(t *testing.T) {
	f := start(t, material(t))
	_, err := f.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{sds.NameRoot},
		ResourceLocators: []*discoveryv3.ResourceLocator{{Name: sds.NameDefault}}})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "resource locators are not served, ask by resource_names") {
		t.Errorf("got %v", err)
	}
}

func TestWaitsForMaterial(t *testing.T) {
	f := start(t, nil)
	if _, err := f.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("fetch before there is any: %v", err)
	}
	st := f.stream(t)
	send(t, st, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
	m := material(t)
	f.set(m)
	checkPair(t, recvSotW(t, st).secrets["default"], m)
}

// TestNack: a client that refuses a certificate keeps the old one, the server
// notes which and why, does not send it again, and goes on with the next.
func TestNack(t *testing.T) {
	first, second, third := material(t), material(t), material(t)
	f := start(t, first)
	st := f.stream(t)
	ask := func(version, nonce, refuse string) {
		req := &discoveryv3.DiscoveryRequest{TypeUrl: sds.TypeSecret, ResourceNames: []string{"default"}, VersionInfo: version, ResponseNonce: nonce}
		if refuse != "" {
			req.ErrorDetail = &statuspb.Status{Code: int32(codes.InvalidArgument), Message: refuse}
		}
		send(t, st, req)
	}
	ask("", "", "")
	one := recvSotW(t, st)
	ask(one.version, one.nonce, "")
	f.set(second)
	two := recvSotW(t, st)
	ask(one.version, two.nonce, "Failed to load private key")
	wait(t, func() bool { r := f.recorder.Records(); return len(r) == 1 && r[0].Nacked != "" })
	want := xds.Record{TypeURL: sds.TypeSecret, Name: "default", Acked: one.version, Nacked: two.version, Reason: "Failed to load private key"}
	if got := f.recorder.Records()[0]; got != want {
		t.Errorf("recorded %+v, want %+v", got, want)
	}
	again := *second // a change that changes nothing for this stream
	again.Roots = third.Roots
	f.set(&again)
	f.set(third)
	three := recvSotW(t, st)
	checkPair(t, three.secrets["default"], third)
	ask(three.version, three.nonce, "")
	wait(t, func() bool { return f.recorder.Records()[0].Acked == three.version })
}

func TestDelta(t *testing.T) {
	m := material(t)
	f := start(t, m)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	st, err := f.client.DeltaSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: sds.TypeSecret, ResourceNamesSubscribe: []string{"default", "ROOTCA", "nobody"}}); err != nil {
		t.Fatal(err)
	}
	resp, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.GetResources()) != 2 || !slices.Equal(resp.GetRemovedResources(), []string{"nobody"}) {
		t.Fatalf("got %d secrets, removed %q", len(resp.GetResources()), resp.GetRemovedResources())
	}
	if err := st.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: sds.TypeSecret, ResponseNonce: resp.GetNonce()}); err != nil {
		t.Fatal(err)
	}
	renewed := material(t)
	renewed.Roots, renewed.Federated = m.Roots, m.Federated
	f.set(renewed)
	if resp, err = st.Recv(); err != nil {
		t.Fatal(err)
	}
	got := map[string]*tlsv3.Secret{}
	for _, r := range resp.GetResources() {
		secret(t, got, r.GetResource())
	}
	if len(got) != 1 {
		t.Errorf("roots were sent again: %d secrets", len(got))
	}
	checkPair(t, got["default"], renewed)
}

// TestHalfMaterialIsNotServed: Envoy takes a validation context without roots for
// "verify nothing", so none ever leaves; streams keep what they have.
func TestHalfMaterialIsNotServed(t *testing.T) {
	m := material(t)
	for name, spoil := range map[string]func(*sds.Material){
		"no roots":       func(m *sds.Material) { m.Roots = nil },
		"no key":         func(m *sds.Material) { m.KeyPKCS8 = nil },
		"no certificate": func(m *sds.Material) { m.Chain = nil },
	} {
		t.Run(name, func(t *testing.T) {
			half := *m
			spoil(&half)
			f := start(t, &half)
			if resp, err := f.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{}); status.Code(err) != codes.Unavailable {
				t.Errorf("got %v, %v", resp, err)
			}
			f.set(m)
			if _, err := f.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{}); err != nil {
				t.Fatal(err)
			}
			f.set(&half)
			resp, err := f.client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}})
			if err != nil || len(resp.GetResources()) != 1 {
				t.Errorf("the last good material is gone: %v, %v", resp, err)
			}
		})
	}
}

// TestFederatedWithoutRoots: a bundle without X.509 authorities is left out, and
// fails nothing else.
func TestFederatedWithoutRoots(t *testing.T) {
	m := material(t)
	m.Federated[spiffeid.RequireTrustDomainFromString("jwt-only.test")] = nil
	f := start(t, m)
	st := f.stream(t)
	send(t, st, &discoveryv3.DiscoveryRequest{})
	got := recvSotW(t, st)
	if got.secrets["spiffe://jwt-only.test"] != nil || got.secrets["default"] == nil {
		t.Errorf("got %q", got.names())
	}
	if names := validator(t, got.secrets["ALL"]); !slices.Equal(names, []string{"cluster.local", "other.test"}) {
		t.Errorf("ALL trusts %q", names)
	}
}

func TestNoKeyIsShown(t *testing.T) {
	m := material(t)
	f := start(t, m)
	log := slog.New(slog.NewJSONHandler(f.log, nil))
	log.Info("x", "m", m, "v", *m, "in", []any{m, *m})
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q"} {
		fmt.Fprintf(f.log, verb+verb, m, *m)
	}
	_ = json.NewEncoder(f.log).Encode(m)
	// The key's own 32 bytes in each of the forms a printer gives bytes.
	key, err := x509.ParsePKCS8PrivateKey(m.KeyPKCS8)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := key.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	st := f.stream(t)
	send(t, st, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
	got := recvSotW(t, st)
	send(t, st, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, ResponseNonce: got.nonce, ErrorDetail: &statuspb.Status{Message: "no"}})
	wait(t, func() bool { r := f.recorder.Records(); return len(r) == 1 && r[0].Nacked != "" })
	out := f.log.String()
	for _, form := range []string{string(secret), fmt.Sprintf("%x", secret), strings.Trim(fmt.Sprint(secret), "[]"),
		base64.StdEncoding.EncodeToString(m.KeyPKCS8), "PRIVATE KEY"} {
		if strings.Contains(out, form) {
			t.Errorf("the log shows the key: %.80s", form)
		}
	}
}

func wait(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("not within 10s")
		}
		time.Sleep(time.Millisecond)
	}
}
