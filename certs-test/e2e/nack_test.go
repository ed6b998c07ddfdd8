package e2e_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"castellan.dev/internal/xds"
	"castellan.dev/sds"
)

// authority is a throw-away issuer for tests that need broken secrets, which the
// real one cannot be made to give.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local"}}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t: t, cert: cert, key: key, next: 100}
}

func (a *authority) material() *sds.Material {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.next++
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(a.next), URIs: []*url.URL{ordersID.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		NotBefore:   time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return &sds.Material{ID: ordersID, Chain: [][]byte{der}, KeyPKCS8: pkcs8, TrustDomain: ordersID.TrustDomain(), Roots: [][]byte{a.cert.Raw}}
}

// secrets is a provider whose material a test sets.
type secrets struct {
	mu       sync.Mutex
	material *sds.Material
	changed  chan struct{}
	streams  []*xds.Recorder
}

func (s *secrets) Material() (*sds.Material, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.material, s.changed
}

func (s *secrets) set(m *sds.Material) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.material = m
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *secrets) observe(context.Context) (xds.Observer, func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &xds.Recorder{}
	s.streams = append(s.streams, r)
	return r, nil
}

// refused returns Envoy's reason for refusing a secret, if it did.
func (s *secrets) refused() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.streams {
		for _, x := range r.Records() {
			if x.Nacked != "" {
				return x.Reason
			}
		}
	}
	return ""
}

// TestEnvoyRefusesASecret: a real Envoy that is sent a certificate with another
// key refuses it, goes on with the one before, and takes the next good one.
func TestEnvoyRefusesASecret(t *testing.T) {
	envoy := envoyPath(t)
	for i, api := range []string{"GRPC", "DELTA_GRPC"} {
		t.Run(api, func(t *testing.T) { refuseASecret(t, envoy, api, 40+i) })
	}
}

func refuseASecret(t *testing.T, envoy, api string, base int) {
	dir := shortDir(t)
	provider := &secrets{changed: make(chan struct{})}
	listener, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	secretv3.RegisterSecretDiscoveryServiceServer(server, sds.NewServer(sds.Config{Provider: provider, Observe: provider.observe}))
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)

	port := freePort(t)
	source := fmt.Sprintf("sds_config: {resource_api_version: V3, api_config_source: {api_type: %s, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: agent}}]}}", api)
	config := fmt.Sprintf(`node: {id: x, cluster: mesh}
static_resources:
  listeners:
  - name: l
    address: {socket_address: {address: 127.0.0.1, port_value: %s}}
    filter_chains:
    - filters: [{name: hcm, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: x,
        route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: "/"}, direct_response: {status: 200}}]}]},
        http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]}}]
      transport_socket: {name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, require_client_certificate: true, common_tls_context: {
        tls_certificate_sds_secret_configs: [{name: default, %[2]s}], validation_context_sds_secret_config: {name: ROOTCA, %[2]s}}}}
  clusters:
  - {name: agent, connect_timeout: 1s, typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}},
     load_assignment: {cluster_name: agent, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[3]s}}}}]}]}}
`, port, source, filepath.Join(dir, "s"))
	if err := os.WriteFile(filepath.Join(dir, "e.yaml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log := &lockedBuffer{}
	cmd := exec.Command(envoy, "-c", filepath.Join(dir, "e.yaml"), "-l", "warning", "--disable-hot-restart", "--concurrency", "1", "--base-id", fmt.Sprint(base))
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
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

	ca := newAuthority(t)
	first, second, third := ca.material(), ca.material(), ca.material()
	serves := func(client, want *sds.Material) error {
		key, err := x509.ParsePKCS8PrivateKey(client.KeyPKCS8)
		if err != nil {
			return err
		}
		cfg := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: client.Chain, PrivateKey: key}}}
		conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", "127.0.0.1:"+port, cfg)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
			return err
		}
		answer := make([]byte, 12)
		if _, err := conn.Read(answer); err != nil {
			return err
		}
		if !bytes.Equal(conn.ConnectionState().PeerCertificates[0].Raw, want.Chain[0]) {
			return errors.New("another certificate")
		}
		return nil
	}
	provider.set(first)
	eventually(t, "the first certificate serves", func() error { return serves(first, first) })
	provider.set(second)
	eventually(t, "the second certificate serves", func() error { return serves(first, second) })
	bad := ca.material()
	bad.KeyPKCS8 = first.KeyPKCS8
	provider.set(bad)
	eventually(t, "Envoy refuses a certificate with another key", func() error {
		if provider.refused() == "" {
			return errors.New("no NACK")
		}
		return nil
	})
	if err := serves(first, second); err != nil {
		t.Errorf("after the NACK the old certificate does not serve: %v", err)
	}
	provider.set(third)
	eventually(t, "the next good certificate serves", func() error { return serves(first, third) })
	if err := serves(newAuthority(t).material(), third); err == nil {
		t.Error("a client of another authority got in")
	}
}
