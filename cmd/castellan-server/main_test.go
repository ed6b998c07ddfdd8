package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	istiov1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/jws/jwstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a directory with everything a server needs.
type site struct {
	t      *testing.T
	dir    string
	issuer *jwstest.Issuer
	grpc   string
	http   string
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir(), issuer: jwstest.RSA(t, "https://workloads.test", "k1"), grpc: freePort(t), http: freePort(t)}
	s.write("keys.json", string(jwstest.JWKS(t, s.issuer)))
	s.write("workloads.yaml", `apiVersion: castellan.dev/v1alpha1
kind: Workloads
workloads:
- {namespace: shop, serviceAccount: orders, podUID: pod-1, podName: orders-1, serviceAccountUID: sa-1, node: node-a}
`)
	if err := os.Mkdir(s.path("policy"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.write("server.yaml", fmt.Sprintf(`apiVersion: castellan.dev/v1alpha1
kind: ServerConfig
dataDir: %[1]s/data
listen: %[2]s
http: %[3]s
bundleFile: %[1]s/bundle.pem
ca: {jwtIssuer: "https://castellan.test"}
attestation:
  issuers: [{issuer: "https://workloads.test", jwksFile: %[1]s/keys.json}]
  workloadsFile: %[1]s/workloads.yaml
discovery: {policyDir: %[1]s/policy}
`, s.dir, s.grpc, s.http))
	return s
}

// freePort returns an address that was free a moment ago.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// log is what the server wrote.
type log struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// start runs the server until stop; it returns when the server is ready.
func (s *site) start() (stop func() error, out *log) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	out = &log{}
	done := make(chan error, 1)
	go func() { done <- start(ctx, []string{"-config", s.path("server.yaml")}, out) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	s.t.Cleanup(func() { _ = stop() })
	deadline := time.Now().Add(30 * time.Second)
	for {
		if code, _ := s.get("/readyz"); code == http.StatusOK {
			return stop, out
		}
		select {
		case err := <-done:
			s.t.Fatalf("server ended: %v\n%s", err, out)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			_, body := s.get("/readyz?verbose")
			s.t.Fatalf("not ready: %s\n%s", body, out)
		}
	}
}

func (s *site) get(path string) (int, string) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + s.http + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body)
}

func (s *site) roots() *x509.CertPool {
	s.t.Helper()
	data, err := os.ReadFile(s.path("bundle.pem"))
	if err != nil {
		s.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		s.t.Fatal("the bundle file holds no certificate")
	}
	return pool
}

func (s *site) dial(cfg *tls.Config) *grpc.ClientConn {
	s.t.Helper()
	conn, err := grpc.NewClient(s.grpc, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

func (s *site) certificate(conn *grpc.ClientConn) (*istiov1.IstioCertificateResponse, *ecdsa.PrivateKey, error) {
	s.t.Helper()
	now := time.Now()
	agent := jwstest.Pod{Namespace: "castellan-system", Account: "castellan-agent", AccountUID: "sa-a", Name: "agent", UID: "pod-a", Node: "node-a"}
	token := s.issuer.PodToken(s.t, now, agent, "castellan.dev")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token, "castellan-agent-token", token)
	resp, err := istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istiov1.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))})
	return resp, key, err
}

func TestServer(t *testing.T) {
	s := newSite(t)
	stop, out := s.start()
	for _, name := range []string{"localhost", "127.0.0.1"} {
		conn := s.dial(&tls.Config{RootCAs: s.roots(), ServerName: name})
		if _, _, err := s.certificate(conn); err != nil {
			t.Fatalf("as %s: %v", name, err)
		}
		_, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("a method that is an agent's, without a certificate: %v", err)
		}
	}
	for path, want := range map[string]string{
		"/livez": "ok", "/readyz?verbose": "[+] ledger ok", "/metrics": "castellan_server_identity_requests_total",
		"/keys": `"use":"jwt-svid"`, "/.well-known/openid-configuration": `"jwks_uri":"https://castellan.test/keys"`,
	} {
		if code, body := s.get(path); code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	admin, err := grpc.NewClient("unix:"+s.path("data/admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	st, err := castellanv1.NewAuthorityAdminClient(admin).Status(t.Context(), &castellanv1.AuthorityStatusRequest{})
	if err != nil || st.GetTrustDomain() != "cluster.local" {
		t.Errorf("admin: %v, %v", st, err)
	}
	if _, err := castellanv1.NewDiscoveryAdminClient(admin).Policies(t.Context(), &castellanv1.PoliciesRequest{}); err != nil {
		t.Errorf("admin: %v", err)
	}
	if info, err := os.Stat(s.path("data/admin.sock")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("admin socket: %v, %v", info.Mode(), err)
	}
	bundle, err := os.ReadFile(s.path("bundle.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Fatalf("stopped with %v\n%s", err, out)
	}
	// Again on the same directory: same root, same trust, same ports.
	stop, _ = s.start()
	if again, err := os.ReadFile(s.path("bundle.pem")); err != nil || string(again) != string(bundle) {
		t.Errorf("another root after a restart (%v)", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.path("data/admin.sock")); err == nil {
		t.Error("the admin socket stayed")
	}
}

// TestStopsWithOpenStreams: an agent's stream does not hold up the end.
func TestStopsWithOpenStreams(t *testing.T) {
	s := newSite(t)
	stop, out := s.start()
	resp, key, err := s.certificate(s.dial(&tls.Config{RootCAs: s.roots(), ServerName: "localhost"}))
	if err != nil {
		t.Fatal(err)
	}
	cert := tls.Certificate{PrivateKey: key}
	for _, element := range resp.GetCertChain()[:len(resp.GetCertChain())-1] {
		block, _ := pem.Decode([]byte(element))
		cert.Certificate = append(cert.Certificate, block.Bytes)
	}
	conn := s.dial(&tls.Config{RootCAs: s.roots(), ServerName: "localhost", Certificates: []tls.Certificate{cert}})
	watch, err := healthv1.NewHealthClient(conn).Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Fatalf("stopped with %v\n%s", err, out)
	}
	for err == nil {
		_, err = watch.Recv()
	}
}

func TestClearErrors(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	swap := func(s *site, old, new string) {
		data, err := os.ReadFile(s.path("server.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(data), old) {
			t.Fatalf("%q is not in the configuration", old)
		}
		s.write("server.yaml", strings.Replace(string(data), old, new, 1))
	}
	tests := map[string]struct {
		prepare func(*site)
		want    string
	}{
		"gRPC address in use": {func(s *site) { swap(s, s.grpc, busy.Addr().String()) }, "listen: " + busy.Addr().String() + " is in use by another process; stop that process"},
		"HTTP address in use": {func(s *site) { swap(s, s.http, busy.Addr().String()) }, "http: " + busy.Addr().String() + " is in use by another process"},
		"bad address":         {func(s *site) { swap(s, s.grpc, "127.0.0.1:99999") }, "listen: "},
		"unknown field":       {func(s *site) { swap(s, "bundleFile", "bundlefile") }, `unknown field "bundlefile"`},
		"no workloads file":   {func(s *site) { _ = os.Remove(s.path("workloads.yaml")) }, "attestation.workloadsFile: workloads: open"},
		"broken workloads":    {func(s *site) { s.write("workloads.yaml", "kind: x") }, "attestation.workloadsFile: workloads: apiVersion"},
		"none configured":     {func(s *site) { swap(s, "workloadsFile: "+s.path("workloads.yaml"), "directCallers: []") }, "attestation.workloadsFile: required"},
		"broken keys":         {func(s *site) { s.write("keys.json", "<html>") }, "attestation.issuers[0].jwksFile: jws: not a JSON key set"},
		"no policy directory": {func(s *site) { _ = os.Remove(s.path("policy")) }, "discovery.policyDir: "},
		"long socket path":    {func(s *site) { swap(s, "bundleFile", "adminSocket: /"+strings.Repeat("x", 120)+"\nbundleFile") }, "adminSocket: "},
		"bundle file nowhere": {func(s *site) { swap(s, "bundle.pem", "nowhere/bundle.pem") }, "bundleFile: "},
		"socket is a file": {func(s *site) {
			_ = os.Mkdir(s.path("data"), 0o700)
			s.write("data/admin.sock", "")
		}, "exists and is no socket"},
		"bad trust domain": {func(s *site) { swap(s, "discovery:", "mesh: {trustDomain: 10.0.0.1}\ndiscovery:") }, "mesh.trustDomain: "},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			tt.prepare(s)
			err := start(t.Context(), []string{"-config", s.path("server.yaml")}, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
		})
	}
	t.Run("second server on the same directory", func(t *testing.T) {
		s := newSite(t)
		stop, _ := s.start()
		err := start(t.Context(), []string{"-config", s.path("server.yaml")}, io.Discard)
		if err == nil || !strings.Contains(err.Error(), "is in use by another process") {
			t.Fatal(err)
		}
		swap(s, s.grpc, freePort(t))
		swap(s, s.http, freePort(t))
		swap(s, "bundleFile", "adminSocket: "+s.path("other.sock")+"\nbundleFile")
		err = start(t.Context(), []string{"-config", s.path("server.yaml")}, io.Discard)
		if err == nil {
			t.Fatal("two servers on one directory")
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("socket of a killed server", func(t *testing.T) {
		s := newSite(t)
		if err := os.Mkdir(s.path("data"), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.path("data/admin.sock"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		stop, _ := s.start()
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	})
	for name, args := range map[string][]string{"no flag": nil, "an argument": {"-config", "x", "y"}} {
		t.Run(name, func(t *testing.T) {
			if err := start(t.Context(), args, io.Discard); err == nil || !strings.Contains(err.Error(), "usage: castellan-server -config FILE") {
				t.Fatal(err)
			}
		})
	}
}
