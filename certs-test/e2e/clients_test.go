package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	securityv1alpha1 "istio.io/api/security/v1alpha1"
)

var (
	frontendID = spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/frontend")
	ordersID   = spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/orders")
)

func source(t *testing.T, socket string) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestGoSPIFFE: a go-spiffe program talks to our proxy, and our proxy's port
// tells the frontend from the intruder.
func TestGoSPIFFE(t *testing.T) {
	m := start(t, shortDir(t))
	f := m.file()
	for _, c := range []struct {
		caller string
		want   int
	}{{"shop/frontend", 200}, {"guest/intruder", 403}} {
		src := source(t, f.Workloads[c.caller].Socket)
		client := &http.Client{Timeout: patience, Transport: &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(ordersID))}}
		resp, err := client.Get("https://" + f.Workloads["shop/orders"].Inbound + "/")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		client.CloseIdleConnections()
		if resp.StatusCode != c.want {
			t.Errorf("%s: %s, want %d", c.caller, resp.Status, c.want)
		}
	}

	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	addr := workloadapi.WithAddr("unix://" + f.Workloads["shop/orders"].Socket)
	svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "payments"}, addr)
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID != ordersID {
		t.Errorf("JWT-SVID of %s", svid.ID)
	}
	bundles, err := workloadapi.FetchJWTBundles(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{"payments"}); err != nil {
		t.Error(err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{"other"}); err == nil {
		t.Error("another audience was accepted")
	}
}

// TestIstioCSR: the certificate request of istio-agent, with an RSA key and
// nothing in the CSR, answered with leaf, intermediate and roots.
func TestIstioCSR(t *testing.T) {
	m := start(t, shortDir(t))
	f := m.file()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	roots, err := os.ReadFile(f.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(roots) {
		t.Fatal("no roots")
	}
	conn, err := grpc.NewClient(f.Server.GRPC, grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(pool, "")))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	token := func(file string) string {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	client := securityv1alpha1.NewIstioCertificateServiceClient(conn)
	call := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token(f.Workloads["shop/orders"].Token),
		"castellan-agent-token", token(f.Agent.Token), "clusterid", "Kubernetes")
	resp, err := client.CreateCertificate(call, &securityv1alpha1.IstioCertificateRequest{Csr: csr, ValidityDuration: 86400})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.CertChain) < 3 {
		t.Fatalf("a chain of %d elements", len(resp.CertChain))
	}
	if last := resp.CertChain[len(resp.CertChain)-1]; last != string(roots) {
		t.Errorf("the last element is not the roots:\n%s", last)
	}
	block, rest := pem.Decode([]byte(resp.CertChain[0]))
	if block == nil || len(rest) != 0 || !strings.HasSuffix(resp.CertChain[0], "\n") {
		t.Fatalf("leaf %q", resp.CertChain[0])
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != ordersID.String() {
		t.Errorf("URIs %v", leaf.URIs)
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life > 24*time.Hour+30*time.Second {
		t.Errorf("valid for %v", life)
	}
	// Without an agent's token nobody is known to be on a node.
	bare := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token(f.Workloads["shop/orders"].Token), "clusterid", "Kubernetes")
	if _, err := client.CreateCertificate(bare, &securityv1alpha1.IstioCertificateRequest{Csr: csr}); err == nil {
		t.Error("a caller without an agent token was answered")
	}
}

// TestCommandLineClients: what cert fetch writes works with curl and openssl.
func TestCommandLineClients(t *testing.T) {
	m := start(t, shortDir(t))
	f := m.file()
	dir := t.TempDir()
	castellan(t, "cert", "fetch", "--socket", f.Workloads["shop/frontend"].Socket, "--write", dir).want(t, 0)
	st, err := os.Stat(filepath.Join(dir, "svid_key.pem"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", st, err)
	}
	castellan(t, "cert", "verify", "--bundle", filepath.Join(dir, "bundle.pem"), "--id", frontendID.String(), filepath.Join(dir, "svid.pem")).want(t, 0, "valid until")
	castellan(t, "cert", "verify", "--bundle", f.Bundle, "--id", ordersID.String(), filepath.Join(dir, "svid.pem")).want(t, 2, "wrong SPIFFE ID")
	castellan(t, "cert", "lint", filepath.Join(dir, "svid.pem")).want(t, 0, "no findings")
	castellan(t, "cert", "inspect", filepath.Join(dir, "svid.pem"), "--expires-within", "1m").want(t, 0)
	castellan(t, "cert", "inspect", filepath.Join(dir, "svid.pem"), "--expires-within", "100h").want(t, 2, "renew it")
	castellan(t, "cert", "inspect", f.Server.GRPC).want(t, 0, "localhost")
	castellan(t, "cert", "inspect", f.Workloads["shop/orders"].Inbound, "--client-cert", filepath.Join(dir, "svid.pem"), "--client-key", filepath.Join(dir, "svid_key.pem"), "-o", "json").want(t, 0, ordersID.String())

	// The server's name is a SPIFFE ID, which curl cannot check: the chain is
	// verified, the name not.
	out, err := exec.Command("curl", "-sS", "--insecure", "--cert", filepath.Join(dir, "svid.pem"), "--key", filepath.Join(dir, "svid_key.pem"),
		"-o", os.DevNull, "-w", "%{http_code}", "https://"+f.Workloads["shop/orders"].Inbound+"/").CombinedOutput()
	if err != nil || string(out) != "200" {
		t.Errorf("curl: %v %s", err, out)
	}
	// Stdin stays open, or s_client leaves before the handshake is done.
	cmd := exec.Command("openssl", "s_client", "-connect", f.Workloads["shop/orders"].Inbound, "-cert", filepath.Join(dir, "svid.pem"),
		"-cert_chain", filepath.Join(dir, "svid.pem"), "-key", filepath.Join(dir, "svid_key.pem"), "-CAfile", f.Bundle, "-verify_return_error", "-tls1_3")
	cmd.Stdin = strings.NewReader("Q\n")
	out, err = cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("Verify return code: 0 (ok)")) {
		t.Errorf("openssl: %v\n%s", err, out)
	}
	out, err = exec.Command("openssl", "s_client", "-connect", f.Workloads["shop/orders"].Inbound, "-tls1_2").CombinedOutput()
	if err == nil {
		t.Errorf("TLS 1.2 was accepted\n%s", out)
	}
}

// envoyPath finds Envoy where `make tools` puts it. Without it the test is
// skipped by name, but never on CI.
func envoyPath(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("CASTELLAN_TOOLS")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		dir = filepath.Join(cache, "castellan", "tools")
	}
	path := filepath.Join(dir, "envoy-1.40.0")
	if _, err := os.Stat(path); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("Envoy is not installed: %v; make tools installs it", err)
		}
		t.Skipf("Envoy is not installed (%v); make tools installs it", err)
	}
	return path
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// secretNames are the names by which Istio's and SPIRE's Envoy configurations ask.
type secretNames struct{ certificate, validation string }

// startEnvoy starts an Envoy that is the server "orders" on one port, in front of
// its application, and the client "frontend" of our orders proxy on another.
func startEnvoy(t *testing.T, m *mesh, base int, server, client secretNames) (serverAddr, clientURL string) {
	t.Helper()
	f := m.file()
	split := func(addr string) string {
		host, port, _ := net.SplitHostPort(addr)
		return fmt.Sprintf("{address: %s, port_value: %s}", host, port)
	}
	tlsContext := func(kind, cluster string, n secretNames) string {
		return fmt.Sprintf(`{name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.%s%s, common_tls_context: {tls_params: {tls_minimum_protocol_version: TLSv1_2, tls_maximum_protocol_version: TLSv1_3},
        tls_certificate_sds_secret_configs: [{name: "%s", sds_config: {resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: %[4]s}}]}}}],
        combined_validation_context: {default_validation_context: {}, validation_context_sds_secret_config: {name: "%[5]s", sds_config: {resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: %[4]s}}]}}}}}}}`,
			kind, map[string]string{"DownstreamTlsContext": ", require_client_certificate: true", "UpstreamTlsContext": ""}[kind], n.certificate, cluster, n.validation)
	}
	sds := func(name, socket string) string {
		return fmt.Sprintf(`  - {name: %s, connect_timeout: 1s, typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}},
     load_assignment: {cluster_name: %s, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %s}}}}]}]}}`, name, name, socket)
	}
	hcm := func(cluster string) string {
		return fmt.Sprintf(`[{name: hcm, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: x,
      route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: "/"}, route: {cluster: %s}}]}]},
      http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]}}]`, cluster)
	}
	serverPort, clientPort := freePort(t), freePort(t)
	config := fmt.Sprintf(`node: {id: test, cluster: test}
static_resources:
  listeners:
  - {name: server, address: {socket_address: {address: 127.0.0.1, port_value: %s}}, filter_chains: [{transport_socket: %s, filters: %s}]}
  - {name: client, address: {socket_address: {address: 127.0.0.1, port_value: %s}}, filter_chains: [{filters: %s}]}
  clusters:
  - {name: app, connect_timeout: 1s, load_assignment: {cluster_name: app, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: %s}}}]}]}}
  - {name: orders, connect_timeout: 1s, transport_socket: %s, load_assignment: {cluster_name: orders, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: %s}}}]}]}}
%s
%s
`, serverPort, tlsContext("DownstreamTlsContext", "sds_orders", server), hcm("app"),
		clientPort, hcm("orders"),
		split(f.Workloads["shop/orders"].App), tlsContext("UpstreamTlsContext", "sds_frontend", client), split(f.Workloads["shop/orders"].Inbound),
		sds("sds_orders", f.Workloads["shop/orders"].Socket), sds("sds_frontend", f.Workloads["shop/frontend"].Socket))
	path := filepath.Join(t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(envoyPath(t), "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "warning", "--base-id", fmt.Sprint(base))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log := &lockedBuffer{}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(log)
		}
	})
	return "127.0.0.1:" + serverPort, "http://127.0.0.1:" + clientPort
}

// TestEnvoy: Istio's and SPIRE's Envoy configurations work unchanged against the
// agent's socket, both as server and as client, and follow a rotation.
func TestEnvoy(t *testing.T) {
	envoyPath(t)
	m := start(t, shortDir(t), "--svid-ttl", "10s")
	for i, c := range []struct {
		name           string
		server, client secretNames
	}{
		{"names of Istio", secretNames{"default", "ROOTCA"}, secretNames{"default", "ROOTCA"}},
		{"names of SPIRE", secretNames{ordersID.String(), "spiffe://cluster.local"}, secretNames{frontendID.String(), "spiffe://cluster.local"}},
		{"all bundles of SPIRE", secretNames{ordersID.String(), "ALL"}, secretNames{frontendID.String(), "ALL"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			serverAddr, clientURL := startEnvoy(t, m, 20+i, c.server, c.client)
			src := source(t, m.file().Workloads["shop/frontend"].Socket)
			shake := func() (string, error) {
				d := &tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(ordersID))}
				conn, err := d.Dial("tcp", serverAddr)
				if err != nil {
					return "", err
				}
				defer conn.Close()
				if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n"); err != nil {
					return "", err
				}
				_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
				answer, err := io.ReadAll(conn)
				if !bytes.HasPrefix(answer, []byte("HTTP/1.1 200")) {
					return "", fmt.Errorf("%q %w", answer, errors.Join(err, errors.New("no 200")))
				}
				return fmt.Sprintf("%x", conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber), nil
			}
			var first string
			eventually(t, "Envoy serves with the certificate of orders", func() (err error) {
				first, err = shake()
				return err
			})
			eventually(t, "Envoy is a client with the certificate of the frontend", func() error {
				resp, err := plainClient.Get(clientURL)
				if err != nil {
					return err
				}
				defer resp.Body.Close()
				if resp.StatusCode != 200 {
					body, _ := io.ReadAll(resp.Body)
					return fmt.Errorf("%s %s", resp.Status, body)
				}
				return nil
			})
			eventually(t, "Envoy serves with the next certificate", func() error {
				now, err := shake()
				if err == nil && now == first {
					err = errors.New("still the first certificate")
				}
				return err
			})
		})
	}
}
