package discovery_test

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
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/discovery"
	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
	"castellan.dev/internal/xds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const inventory = `
apiVersion: castellan.dev/v1alpha1
kind: Workloads
workloads:
- {namespace: shop, serviceAccount: orders, podUID: pod-orders, node: one, labels: {app: orders}, address: 127.0.0.1, ports: [{number: 8080, protocol: http}]}
- {namespace: shop, serviceAccount: payments, podUID: pod-payments, node: two, labels: {app: payments}, address: 127.0.0.2, ports: [{number: 8080, protocol: http}]}
- {namespace: guest, serviceAccount: intruder, podUID: pod-intruder, node: two, labels: {app: intruder}, address: 127.0.0.3}
services:
- {namespace: shop, name: orders, hosts: [orders, orders.shop], ports: [{name: http, number: 80, protocol: http}], endpoints: [{workload: pod-orders, ports: {80: 41234}}]}
`

// allow is an AuthorizationPolicy of shop that lets account call app.
func allow(name, app, account string) string {
	return fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: %s}
spec:
  selector: {matchLabels: {app: %s}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/%s"]}}]
`, name, app, account)
}

// broken is the same with a field that does not exist.
func broken(name, app string) string {
	return strings.Replace(allow(name, app, "x"), "principals", "prinzipals", 1)
}

type setup struct {
	t         *testing.T
	dir       string // policies
	workloads string // file
	good      string // last good
	mesh      policy.Mesh
	agents    map[string]string // serial → node
	ledger    error             // what the ledger answers instead

	server *discovery.Server
	log    *logBuffer
	dial   func(cert *tls.Certificate) *grpc.ClientConn
	stop   func()
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

// prepare makes the files; start runs a server on them.
func prepare(t *testing.T, policies map[string]string) *setup {
	t.Helper()
	s := &setup{t: t, dir: filepath.Join(t.TempDir(), "policy"), workloads: filepath.Join(t.TempDir(), "workloads.yaml"),
		good: filepath.Join(t.TempDir(), "good"), agents: map[string]string{},
		mesh: policy.Mesh{TrustDomain: "cluster.local", RootNamespace: "castellan-system", JWKS: policy.JWKSFetch{Allow: []string{"http", "127.0.0.0/8"}}}}
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.replace(s.workloads, inventory)
	for name, text := range policies {
		s.write(name, text)
	}
	return s
}

func start(t *testing.T, policies map[string]string) *setup {
	t.Helper()
	s := prepare(t, policies)
	s.start()
	return s
}

// start may be called again after stop: a restart on the same files.
func (s *setup) start() {
	s.t.Helper()
	s.log = &logBuffer{}
	log := slog.New(slog.NewJSONHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	inv, err := workloads.NewWatcher(s.workloads, log)
	if err != nil {
		s.t.Fatal(err)
	}
	dir, err := discovery.NewDirectory(discovery.DirectoryConfig{Path: s.dir, Mesh: s.mesh, Log: log})
	if err != nil {
		s.t.Fatal(err)
	}
	s.run(dir, inv, inv.Run, dir.Run)
	s.eventually("readiness", func() bool { return s.server.Ready() == nil })
}

// startOn runs a server on any source.
func (s *setup) startOn(source discovery.Source, inv discovery.Inventory) {
	s.t.Helper()
	s.log = &logBuffer{}
	s.run(source, inv)
}

func (s *setup) run(source discovery.Source, inv discovery.Inventory, parts ...func(context.Context) error) {
	s.t.Helper()
	log := slog.New(slog.NewJSONHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	account, err := identity.ParseAccount("castellan-system/castellan-agent")
	if err != nil {
		s.t.Fatal(err)
	}
	bundle := &castellanv1.Bundle{TrustDomain: "cluster.local", X509Authorities: [][]byte{{1}}, Sequence: 1}
	s.server, err = discovery.New(discovery.Config{
		Source: source, Workloads: inv, Mesh: s.mesh, TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
		Bundle: func() (*castellanv1.Bundle, <-chan struct{}) { return bundle, nil }, LastGoodDir: s.good, Agents: []identity.Account{account},
		NodeOf: func(_ context.Context, serial string) (string, error) {
			if node, ok := s.agents[serial]; ok || s.ledger != nil {
				return node, s.ledger
			}
			return "", fmt.Errorf("serial %q: %w", serial, discovery.ErrUnknownNode)
		}, Log: log, Registerer: prometheus.NewRegistry()})
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range append(parts, s.server.Run) {
		running.Go(func() {
			if err := run(ctx); err != nil && !errors.Is(err, context.Canceled) {
				s.t.Errorf("Run: %v", err)
			}
		})
	}
	stopServing := s.serve()
	s.stop = sync.OnceFunc(func() { stopServing(); cancel(); running.Wait() })
	s.t.Cleanup(s.stop)
}

func (s *setup) serve() (stop func()) {
	l := bufconn.Listen(1 << 20)
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert,
		Certificates: []tls.Certificate{*s.certificate("castellan-system", "castellan-server")}})))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s.server)
	castellanv1.RegisterNodeServer(g, s.server)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	var conns []*grpc.ClientConn
	s.dial = func(cert *tls.Certificate) *grpc.ClientConn {
		cfg := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true} // who the server is is not in question here
		if cert != nil {
			cfg.Certificates = []tls.Certificate{*cert}
		}
		conn, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			s.t.Fatal(err)
		}
		conns = append(conns, conn)
		return conn
	}
	return func() {
		for _, c := range conns {
			c.Close()
		}
		g.Stop()
		<-done
	}
}

var serials int64 = 1000

func (s *setup) certificate(namespace, account string) *tls.Certificate {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	serials++
	template := &x509.Certificate{SerialNumber: big.NewInt(serials), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/" + namespace + "/sa/" + account}}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		s.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// agent is a certificate of the agent on a node.
func (s *setup) agent(node string) *tls.Certificate {
	cert := s.certificate("castellan-system", "castellan-agent")
	s.agents[big.NewInt(serials).Text(16)] = node
	return cert
}

// path of a policy file.
func (s *setup) path(name string) string { return filepath.Join(s.dir, name) }

func (s *setup) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// replace writes a file atomically.
func (s *setup) replace(path, text string) {
	s.t.Helper()
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		s.t.Fatal(err)
	}
}

func (s *setup) eventually(what string, ok func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			s.t.Fatalf("no %s within 15s; the log: %s", what, s.log.b.String())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (s *setup) policies() *castellanv1.PoliciesResponse {
	s.t.Helper()
	resp, err := s.server.Policies(s.t.Context(), &castellanv1.PoliciesRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	return resp
}

// describe writes every document as "FILE KIND ns/name accepted|last-good|refused selected field=value".
func (s *setup) describe() []string {
	s.t.Helper()
	var out []string
	for _, p := range s.policies().GetPolicies() {
		state := "refused"
		if p.GetAccepted() {
			state = "accepted"
		} else if p.GetLastGoodInForce() {
			state = "last-good"
		} else if f := p.GetFindings(); len(f) == 1 && f[0].GetSeverity() == "warning" {
			state = "passed-over"
		}
		line := fmt.Sprintf("%s %s/%s %s %d", filepath.Base(p.GetFile()), p.GetNamespace(), p.GetName(), state, p.GetSelected())
		for _, f := range p.GetFindings() {
			if f.GetSeverity() == "error" {
				line += " " + f.GetField()
			}
		}
		out = append(out, line)
	}
	return out
}

func (s *setup) become(want ...string) {
	s.t.Helper()
	var got []string
	deadline := time.Now().Add(15 * time.Second)
	for got = s.describe(); !slices.Equal(got, want); got = s.describe() {
		if time.Now().After(deadline) {
			s.t.Fatalf("documents are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// denied lists the pods that deny everything.
func (s *setup) denied() []string {
	s.t.Helper()
	out := []string{}
	for _, w := range s.policies().GetWorkloads() {
		if w.GetDenyAll() {
			out = append(out, w.GetPodUid())
		}
	}
	return out
}

// follower is an agent that keeps what it is sent.
type follower struct {
	conn *grpc.ClientConn
	mu   sync.Mutex
	held map[string]map[string]xds.Resource // type → name
}

func (s *setup) follow(cert *tls.Certificate) *follower {
	s.t.Helper()
	f := &follower{conn: s.dial(cert), held: map[string]map[string]xds.Resource{}}
	var subs []xds.Subscription
	for _, url := range []string{castellanv1.TypeWorkloadPolicy, castellanv1.TypeServiceIdentity, castellanv1.TypeJwks, castellanv1.TypeBundle, castellanv1.TypeDenylist} {
		subs = append(subs, xds.Subscription{TypeURL: url, Apply: func(changed []xds.Resource, removed []string) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.held[url] == nil {
				f.held[url] = map[string]xds.Resource{}
			}
			for _, r := range changed {
				f.held[url][r.Name] = r
			}
			for _, name := range removed {
				delete(f.held[url], name)
			}
			return nil
		}})
	}
	c := xds.NewClient(xds.ClientConfig{NodeID: "agent", MinBackoff: time.Millisecond, Subscriptions: subs,
		Open: func(ctx context.Context) (xds.DeltaClientStream, error) {
			return discoveryv3.NewAggregatedDiscoveryServiceClient(f.conn).DeltaAggregatedResources(ctx)
		}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	s.t.Cleanup(func() { cancel(); <-done })
	s.eventually("first resources", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.held) == len(subs) })
	return f
}

// names of a type, sorted; nil until anything of the type has come.
func (f *follower) names(url string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.held[url]))
}

// get unpacks a resource, and reports whether there is one.
func (f *follower) get(name string, into proto.Message) (version string, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.held["type.googleapis.com/"+string(into.ProtoReflect().Descriptor().FullName())][name]
	return r.Version, ok && r.Body.UnmarshalTo(into) == nil
}

// policy returns what a pod is told, as "deny" or the documents' names.
func (f *follower) policy(pod string) string {
	var p castellanv1.WorkloadPolicy
	if _, ok := f.get(pod, &p); !ok {
		return "none"
	}
	if p.GetDenyAll() {
		return "deny"
	}
	var names []string
	for _, d := range p.GetDocuments() {
		_, rest, _ := strings.Cut(string(d), `"name":"`)
		name, _, _ := strings.Cut(rest, `"`)
		if _, who, ok := strings.Cut(string(d), "/sa/"); ok {
			who, _, _ = strings.Cut(who, `"`)
			name += "=" + who
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

func (s *setup) told(f *follower, pod, want string) {
	s.t.Helper()
	s.eventually(pod+" being told "+want+" rather than "+f.policy(pod), func() bool { return f.policy(pod) == want })
}
