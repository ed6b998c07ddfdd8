// Package proxytest is a small working agent for tests of the proxy: it serves one
// workload's certificate, policy and services on a socket, and waits until the
// proxy has acknowledged them.
package proxytest

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/tlsconf/tlsconftest"
	"castellan.dev/internal/xds"
)

const (
	SecretType  = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	PolicyType  = "type.googleapis.com/castellan.v1.WorkloadPolicy"
	ServiceType = "type.googleapis.com/castellan.v1.ServiceIdentity"
	JWKSType    = "type.googleapis.com/castellan.v1.Jwks"
	BundleType  = "type.googleapis.com/castellan.v1.Bundle"
	DeniedType  = "type.googleapis.com/castellan.v1.Denylist"

	// Port is the workload port that an Agent's policy declares at first.
	Port = 8080

	patience = 15 * time.Second
)

// Agent serves one workload's resources on a socket, as castellan-agent does.
type Agent struct {
	t        testing.TB
	Socket   string
	Table    *xds.Table
	Recorder xds.Recorder
	Root     *tlsconftest.CA
	Issuer   *tlsconftest.CA
	// Policy and Services are sent at the next Publish and Service.
	Policy   *castellanv1.WorkloadPolicy
	Services map[string]*castellanv1.ServiceIdentity
	// Stop ends it, as does the test.
	Stop func()
}

type deltaStream = grpc.GenericServerStream[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]

// NewAgent starts one for a SPIFFE ID of the trust domain cluster.local. It serves
// neither certificate nor policy until Secrets and Publish.
func NewAgent(t testing.TB, root *tlsconftest.CA, id string) *Agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "cp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a := &Agent{
		t: t, Socket: filepath.Join(dir, "s"), Root: root, Issuer: root.SVIDIssuer(t),
		Table:    xds.NewTable(SecretType, PolicyType, ServiceType, JWKSType, BundleType, DeniedType),
		Services: map[string]*castellanv1.ServiceIdentity{},
	}
	for _, typeURL := range []string{ServiceType, JWKSType, BundleType, DeniedType} {
		a.Table.Set(typeURL, xds.Snapshot{})
	}
	account := strings.Split(strings.TrimPrefix(id, "spiffe://cluster.local/ns/"), "/sa/")
	a.Policy = &castellanv1.WorkloadPolicy{
		Namespace: account[0], ServiceAccount: account[1], TrustDomain: "cluster.local",
		Labels: map[string]string{"app": account[1]},
		Mesh:   []byte(`{"trustDomain":"cluster.local","rootNamespace":"castellan-system"}`),
		Ports:  []*castellanv1.WorkloadPort{{Number: Port, Protocol: "http"}},
	}
	a.Serve()
	t.Cleanup(func() { a.Stop() })
	return a
}

// Serve opens the socket and serves every stream from the table.
func (a *Agent) Serve() {
	a.t.Helper()
	l, err := net.Listen("unix", a.Socket)
	if err != nil {
		a.t.Fatal(err)
	}
	// Proxies under test may be processes of another uid.
	if err := errors.Join(os.Chmod(filepath.Dir(a.Socket), 0o755), os.Chmod(a.Socket, 0o777)); err != nil {
		a.t.Fatal(err)
	}
	server := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		cfg := xds.Config{Source: a.Table, Observer: &a.Recorder, Types: []string{SecretType}}
		if strings.HasSuffix(method, "/DeltaAggregatedResources") {
			cfg.Types = []string{PolicyType, ServiceType, JWKSType, BundleType, DeniedType}
		}
		return xds.ServeDelta(&deltaStream{ServerStream: stream}, cfg)
	}))
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	a.Stop = sync.OnceFunc(func() { server.Stop(); <-done })
}

func pemOf(kind string, blocks ...[]byte) []byte {
	var out []byte
	for _, b := range blocks {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b})...)
	}
	return out
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// Resource packs a message.
func Resource(t testing.TB, name string, m proto.Message) xds.Resource {
	t.Helper()
	r, err := xds.NewResource(name, m)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Secrets publishes a certificate and the roots that are trusted.
func (a *Agent) Secrets(cert *tls.Certificate, roots ...*tlsconftest.CA) {
	a.t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		a.t.Fatal(err)
	}
	var ders [][]byte
	for _, r := range roots {
		ders = append(ders, r.Cert.Raw)
	}
	a.Table.Set(SecretType, xds.NewSnapshot(
		Resource(a.t, "default", &tlsv3.Secret{Name: "default", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(pemOf("CERTIFICATE", cert.Certificate...)), PrivateKey: inline(pemOf("PRIVATE KEY", key)),
		}}}),
		Resource(a.t, "ROOTCA", &tlsv3.Secret{Name: "ROOTCA", Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: inline(pemOf("CERTIFICATE", ders...)),
		}}}),
	))
}

// Publish sends policies, YAML documents separated by "---".
func (a *Agent) Publish(documents string) {
	a.t.Helper()
	a.Policy.Documents = nil
	for _, doc := range strings.Split(documents, "---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		j, err := yaml.YAMLToJSON([]byte(doc))
		if err != nil {
			a.t.Fatal(err)
		}
		a.Policy.Documents = append(a.Policy.Documents, j)
	}
	a.Table.Set(PolicyType, xds.NewSnapshot(Resource(a.t, "uid-1", a.Policy)))
}

// Service publishes a destination with one port 80 and the endpoints' addresses by identity.
func (a *Agent) Service(name, protocol string, expected []string, endpoints ...[2]string) {
	a.t.Helper()
	s := &castellanv1.ServiceIdentity{
		Namespace: "shop", Name: name, ExpectedIds: expected,
		Hosts: []string{name, name + ".shop", name + ".shop.svc.cluster.local"},
		Ports: []*castellanv1.ServicePort{{Name: "p", Number: 80, Protocol: protocol}},
	}
	for _, e := range endpoints {
		host, port, err := net.SplitHostPort(e[0])
		if err != nil {
			a.t.Fatal(err)
		}
		n, _ := strconv.Atoi(port)
		s.Endpoints = append(s.Endpoints, &castellanv1.Endpoint{Address: host, Ports: map[uint32]uint32{80: uint32(n)}, SpiffeId: e[1]})
	}
	a.Services[name] = s
	a.SetServices(slices.Collect(maps.Values(a.Services))...)
}

// SetServices publishes these services and no others.
func (a *Agent) SetServices(services ...*castellanv1.ServiceIdentity) {
	a.t.Helper()
	all := make([]xds.Resource, 0, len(services))
	for _, s := range services {
		all = append(all, Resource(a.t, s.GetNamespace()+"/"+s.GetName(), s))
	}
	a.Table.Set(ServiceType, xds.NewSnapshot(all...))
}

func (a *Agent) Deny(d *castellanv1.Denylist) {
	a.t.Helper()
	a.Table.Set(DeniedType, xds.NewSnapshot(Resource(a.t, "default", d)))
}

// Settled waits until the proxy has acknowledged everything published.
func (a *Agent) Settled() {
	a.t.Helper()
	ok := func() bool {
		acked := map[string]string{}
		for _, r := range a.Recorder.Records() {
			acked[r.TypeURL+r.Name] = r.Acked
		}
		for _, typeURL := range []string{SecretType, PolicyType, ServiceType, JWKSType, DeniedType} {
			snapshot, _ := a.Table.Resources(typeURL)
			for name, r := range snapshot {
				if acked[typeURL+name] != r.Version {
					return false
				}
			}
		}
		return true
	}
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) { //nolint:forbidigo // a test's
		if time.Now().After(deadline) { //nolint:forbidigo // a test's
			a.t.Fatalf("not everything was acknowledged within %s", patience)
		}
	}
}
