package cli_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca"
	"castellan.dev/ca/ledger"
	"castellan.dev/ca/server"
	"castellan.dev/internal/telemetry"
	"castellan.dev/internal/tlsconf/tlsconftest"
	"castellan.dev/internal/up"
)

const workloadsYAML = `apiVersion: castellan.dev/v1alpha1
kind: Workloads
workloads:
- {namespace: shop, serviceAccount: orders, podUID: o, node: local, labels: {app: orders, tier: back}, address: 127.0.0.1, ports: [{number: 8080, protocol: http}, {number: 9000, protocol: tcp}, {number: 9100}]}
- {namespace: shop, serviceAccount: frontend, podUID: f, node: local, labels: {app: frontend}, address: 127.0.0.1, ports: [{number: 8080, protocol: http}]}
services:
- {namespace: shop, name: orders, hosts: [orders, orders.shop.svc], ports: [{name: http, number: 80, protocol: http}], endpoints: [{workload: o, ports: {80: 8080}}]}
- {namespace: shop, name: web, ports: [{name: http, number: 80, protocol: http}], endpoints: [{workload: f, ports: {80: 8080}}]}
- {namespace: blog, name: web, ports: [{name: http, number: 80, protocol: http}]}
`

// meshDir is a data directory as a running mesh leaves it: enough for what only reads.
func meshDir(t *testing.T, policies string) (upFile string, file up.File) {
	t.Helper()
	dir := t.TempDir()
	file = up.File{TrustDomain: "cluster.local", PolicyDir: filepath.Join(dir, "policy"), Bundle: filepath.Join(dir, "bundle.pem"), Workloads: map[string]up.Workload{}}
	if err := os.Mkdir(file.PolicyDir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{"policy/p.yaml": policies, "workloads.yaml": workloadsYAML} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	upFile = filepath.Join(dir, "up.json")
	writeUp(t, upFile, file)
	return upFile, file
}

func writeUp(t *testing.T, path string, file up.File) {
	t.Helper()
	data, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// policyStatus is what the server says of its policies.
type policyStatus struct {
	castellanv1.UnimplementedDiscoveryAdminServer
	mu     sync.Mutex
	answer *castellanv1.PoliciesResponse
}

func (p *policyStatus) Policies(context.Context, *castellanv1.PoliciesRequest) (*castellanv1.PoliciesResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.answer, nil
}

func (p *policyStatus) set(answer *castellanv1.PoliciesResponse) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = answer
}

// liveMesh is a mesh of this process: the real authority with its ledger, and
// the faces of the other parts that check looks at.
type liveMesh struct {
	t         *testing.T
	upFile    string
	file      up.File
	authority *ca.Authority
	policies  *policyStatus
	notReady  error
}

func newLiveMesh(t *testing.T) *liveMesh {
	t.Helper()
	m := &liveMesh{t: t, policies: &policyStatus{answer: &castellanv1.PoliciesResponse{}}}
	m.upFile, m.file = meshDir(t, "")
	dir := filepath.Dir(m.upFile)
	rows, err := ledger.Open(t.Context(), ledger.Config{Path: filepath.Join(dir, "ledger.db")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rows.Close() })
	m.authority, err = ca.Open(t.Context(), ca.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), DataDir: dir, Ledger: rows,
		ServingIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.authority.Close() })
	if err := ca.WriteBundleFile(m.file.Bundle, m.authority.Bundle()); err != nil {
		t.Fatal(err)
	}

	operator := grpc.NewServer(grpc.Creds(server.OperatorCredentials(uint32(os.Geteuid()))))
	server.NewAdmin(m.authority, rows, nil).Register(operator)
	castellanv1.RegisterDiscoveryAdminServer(operator, m.policies)
	m.file.Server.Admin = filepath.Join(dir, "admin.sock")
	m.serve(listen(t, "unix", m.file.Server.Admin), operator.Serve, operator.Stop)

	m.file.Server.GRPC = tlsServer(t, "tcp4", &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := m.authority.ServingCertificate()(h)
		if err != nil {
			return nil, err
		}
		return &tls.Config{Certificates: []tls.Certificate{*c}, NextProtos: []string{"h2"}}, nil
	}})
	m.file.Server.HTTP, m.file.Agent.Admin = m.admin(), m.admin()
	m.file.Server.PID, m.file.Agent.PID = os.Getpid(), os.Getpid()
	m.save()
	return m
}

func (m *liveMesh) save() { writeUp(m.t, m.upFile, m.file) }

func listen(t *testing.T, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (m *liveMesh) serve(l net.Listener, serve func(net.Listener) error, stop func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = serve(l)
	}()
	m.t.Cleanup(func() {
		stop()
		l.Close()
		<-done
	})
}

// admin serves /readyz, ready unless notReady is set.
func (m *liveMesh) admin() string {
	l := listen(m.t, "tcp", "127.0.0.1:0")
	a := telemetry.NewAdmin(l, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	a.AddCheck("identity", func() error { return m.notReady })
	ctx, cancel := context.WithCancel(context.Background())
	m.serve(l, func(net.Listener) error { return a.Run(ctx) }, cancel)
	return l.Addr().String()
}

// workload adds one whose SVID comes from a Workload API of its own.
func (m *liveMesh) workload(name string, svid *tls.Certificate, root *tlsconftest.CA) *workloadAPI {
	api := newWorkloadAPI(m.t)
	if svid != nil {
		api.give(m.t, root, svid)
	}
	app := listen(m.t, "tcp", "127.0.0.1:0")
	m.t.Cleanup(func() { app.Close() })
	m.file.Workloads[name] = up.Workload{Socket: api.socket, Admin: m.admin(), App: app.Addr().String(), PID: os.Getpid()}
	m.save()
	return api
}

// service names and what the workloads file declares are known with a running mesh.
func TestCanIUp(t *testing.T) {
	upFile, file := meshDir(t, policyOf("orders", `{selector: {matchLabels: {tier: back}}, rules: [{from: [{source: {principals: ["cluster.local/ns/shop/sa/frontend"]}}], to: [{operation: {methods: [GET], ports: ["8080"]}}]}]}`))
	ask := func(args ...string) result {
		return castellanRun(t, append([]string{"authz", "can-i", "--up", upFile, "--from", "shop/frontend"}, args...)...)
	}
	for _, to := range []string{"orders", "shop/orders", "orders.shop.svc"} {
		ask("--to", to, "GET", "/").want(t, 0, "shop/frontend -> shop/orders", "ALLOW shop/orders, rule 0")
		ask("--to", to, "POST", "/").want(t, 2)
	}
	t.Run("the directory of the running mesh is read, others on request", func(t *testing.T) {
		ask("--to", "shop/web", "POST", "/").want(t, 0, "shop/frontend -> shop/frontend")
		ask("--to", "orders", "GET", "/", "-f", t.TempDir()).want(t, 0, "no ALLOW policy")
		t.Chdir(filepath.Dir(upFile))
		if err := os.Mkdir(".castellan", 0o755); err != nil {
			t.Fatal(err)
		}
		writeUp(t, ".castellan/up.json", file)
		if err := os.WriteFile(".castellan/workloads.yaml", []byte(workloadsYAML), 0o600); err != nil {
			t.Fatal(err)
		}
		castellanRun(t, "authz", "can-i", "--from", "shop/frontend", "--to", "orders", "GET", "/").want(t, 0, "ALLOW shop/orders")
	})
	t.Run("ports as declared", func(t *testing.T) {
		ask("--to", "orders", "GET", "/", "--port", "9000").want(t, 2, "port 9000 is declared tcp: the proxy reads no requests there and judges the connection")
		ask("--to", "orders", "--tcp").want(t, 2, "port 8080 is declared http: the proxy reads requests there, and judges each")
		ask("--to", "orders", "--tcp", "--port", "9100").want(t, 2)
		ask("--to", "orders", "GET", "/", "--port", "80").want(t, 2, "shop/orders declares no port 80; give the workload's port, not the service's")
	})
	t.Run("a service's port leads to the workload's only one", func(t *testing.T) {
		r := ask("--to", "shop/web", "GET", "/", "--port", "80", "--explain").want(t, 0, "mutual TLS on port 8080: ")
		if r.err != "" {
			t.Errorf("%s", r.err)
		}
		ask("--to", "shop/web", "GET", "/", "--port", "81", "--explain").want(t, 0, "mutual TLS on port 81: ", "shop/frontend declares no port 81")
		ask("--to", "shop/frontend", "GET", "/", "--port", "80", "--explain").want(t, 0, "mutual TLS on port 80: ")
	})
	t.Run("nobody of that name", func(t *testing.T) {
		ask("--to", "nosuch", "GET", "/").want(t, 3, `--to "nosuch" is neither a workload nor a service of this mesh`)
		ask("--to", "shop/nosuch", "GET", "/").want(t, 3, "is neither a workload nor a service")
		ask("--to", "web", "GET", "/").want(t, 3, `--to "web" is a service in several namespaces; give NAMESPACE/SERVICE`)
		ask("--to", "blog/web", "GET", "/").want(t, 3, "is a service without workloads")
	})
	t.Run("damaged", func(t *testing.T) {
		broken := writeFile(t, "up.json", []byte("{"))
		castellanRun(t, "authz", "can-i", "--up", broken, "--from", "shop/frontend", "--to", "orders", "GET", "/").want(t, 1, "up.json")
		castellanRun(t, "authz", "can-i", "--up", t.TempDir(), "--from", "shop/frontend", "--to", "orders", "GET", "/").want(t, 1, "is a directory")
		lonely := writeFile(t, "up.json", []byte("{}"))
		castellanRun(t, "authz", "can-i", "--up", lonely, "--from", "shop/frontend", "--to", "orders", "GET", "/").want(t, 3, "--up: there is no file")
	})
}

func TestCA(t *testing.T) {
	m := newLiveMesh(t)
	id := "spiffe://cluster.local/ns/shop/sa/orders"
	serial := issue(t, m.authority, "shop/orders")
	issue(t, m.authority, "shop/frontend")

	t.Run("status", func(t *testing.T) {
		r := castellanRun(t, "ca", "status", "--up", m.upFile).want(t, 0, "TRUST DOMAIN", "cluster.local", "LEAF TTL", "1h0m0s", "ROLE", "root")
		if r.err != "" {
			t.Errorf("%s", r.err)
		}
		var got struct {
			TrustDomain  string `json:"trustDomain"`
			LedgerRows   uint64 `json:"ledgerRows"`
			Certificates []struct {
				Role string `json:"role"`
				IsCA bool   `json:"isCA"`
			} `json:"certificates"`
		}
		castellanRun(t, "ca", "status", "--up", m.upFile, "-o", "json").want(t, 0).decode(t, &got)
		if got.TrustDomain != "cluster.local" || got.LedgerRows < 2 || len(got.Certificates) < 3 || !got.Certificates[0].IsCA {
			t.Errorf("%+v", got)
		}
		castellanRun(t, "ca", "status", "--up", m.upFile, "-o", "yaml").want(t, 0, "trustDomain: cluster.local")
	})
	t.Run("issued", func(t *testing.T) {
		type row struct {
			Serial   string `json:"serial"`
			SPIFFEID string `json:"spiffeId"`
			Outcome  string `json:"outcome"`
		}
		list := func(args ...string) []row {
			t.Helper()
			var rows []row
			castellanRun(t, append([]string{"ca", "issued", "--up", m.upFile, "-o", "json"}, args...)...).want(t, 0).decode(t, &rows)
			return rows
		}
		if rows := list("--id", id); len(rows) != 1 || rows[0].Serial != serial || rows[0].SPIFFEID != id {
			t.Errorf("%+v", rows)
		}
		if rows := list("--serial", serial); len(rows) != 1 || rows[0].SPIFFEID != id {
			t.Errorf("%+v", rows)
		}
		all := list()
		if len(all) < 2 || len(list("--since", "1h")) != len(all) || len(list("--until", "1h")) != 0 || len(list("--limit", "1")) != 1 || len(list("--since", "2000-01-01T00:00:00Z")) != len(all) {
			t.Errorf("%+v", all)
		}
		// An empty list is a list, and no error.
		r := castellanRun(t, "ca", "issued", "--up", m.upFile, "-o", "json", "--id", "spiffe://cluster.local/ns/none/sa/none").want(t, 0)
		if strings.TrimSpace(r.out) != "[]" {
			t.Errorf("%q", r.out)
		}
		castellanRun(t, "ca", "issued", "--up", m.upFile).want(t, 0, "CREATED", id, serial)
		castellanRun(t, "ca", "issued", "--up", m.upFile, "--since", "yesterday").want(t, 3, `--since "yesterday": want a time such as 2006-01-02T15:04:05Z or a duration such as 1h`)
		castellanRun(t, "ca", "issued", "--up", m.upFile, "-o", "x").want(t, 3, `-o "x"`)
	})
	t.Run("the server is away", func(t *testing.T) {
		m.file.Server.Admin = filepath.Join(t.TempDir(), "gone.sock")
		m.save()
		for _, cmd := range []string{"status", "issued"} {
			castellanRun(t, "ca", cmd, "--up", m.upFile).want(t, 1, "the server's admin socket does not answer", "is the mesh running, and are you its user?")
		}
	})
}

func TestCheck(t *testing.T) {
	setup := func(t *testing.T) *liveMesh {
		m := newLiveMesh(t)
		m.policies.answer = &castellanv1.PoliciesResponse{
			Policies:  []*castellanv1.PolicyStatus{{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "orders", Accepted: true, Selected: 1, Programmed: 1}},
			Workloads: []*castellanv1.WorkloadStatus{{Namespace: "shop", ServiceAccount: "orders", Version: "v1", Report: acked("v1", "")}},
		}
		return m
	}
	svid := func(t *testing.T, m *liveMesh, account string) (*tls.Certificate, *tlsconftest.CA) {
		root := &tlsconftest.CA{Cert: m.authority.Bundle().Roots[0]}
		return issueTo(t, m.authority, account), root
	}
	t.Run("all is well", func(t *testing.T) {
		m := setup(t)
		c, root := svid(t, m, "shop/orders")
		m.workload("shop/orders", c, root)
		r := castellanRun(t, "check", "--up", m.upFile).want(t, 0,
			"√ bundle: 1 root\n", "√ server process: pid ", "√ server ready", "√ server certificate: valid for 127.0.0.1", "√ agent ready",
			"√ shop/orders SVID: "+ordersID, "√ shop/orders application: ",
			"√ policy AuthorizationPolicy shop/orders: in force on 1 of 1 workloads it selects", "√ workload shop/orders: policy version v1 acknowledged")
		if r.err != "" || strings.Contains(r.out, "×") {
			t.Errorf("%s%s", r.out, r.err)
		}
		var got []struct{ Check, Status, Hint string }
		castellanRun(t, "check", "--up", m.upFile, "-o", "json").want(t, 0).decode(t, &got)
		for _, c := range got {
			if c.Status != "ok" || c.Check == "" {
				t.Errorf("%+v", c)
			}
		}
	})
	// One thing is broken at a time; each is found, with a hint.
	tests := map[string]struct {
		breakIt func(t *testing.T, m *liveMesh)
		want    []string
	}{
		"bundle is gone": {func(t *testing.T, m *liveMesh) { m.file.Bundle = "/nothing" }, []string{"× bundle: ", "hint: the server writes it at start"}},
		"bundle is another's": {func(t *testing.T, m *liveMesh) {
			m.file.Bundle = writeFile(t, "b.pem", pemOf(tlsconftest.NewRoot(t).Cert))
		}, []string{"× server certificate: ", "hint: the bundle is not the server's"}},
		"server died":            {func(t *testing.T, m *liveMesh) { m.file.Server.PID = 0 }, []string{"× server process: process 0 is gone", "hint: castellan up restarts its parts"}},
		"server does not answer": {func(t *testing.T, m *liveMesh) { m.file.Server.HTTP = "127.0.0.1:1" }, []string{"× server ready: ", "hint: nothing listens there; read "}},
		"agent died":             {func(t *testing.T, m *liveMesh) { m.file.Agent.PID = -1 }, []string{"× agent process"}},
		"a part is not ready":    {func(t *testing.T, m *liveMesh) { m.notReady = errors.New("no certificate") }, []string{"× server ready: [-] identity: no certificate", "× agent ready"}},
		"up.json is damaged":     {func(t *testing.T, m *liveMesh) { m.file.Agent.Admin = "no address\x7f" }, []string{"× agent ready: ", "hint: up.json is damaged"}},
		"admin socket is gone":   {func(t *testing.T, m *liveMesh) { m.file.Server.Admin = "/nothing.sock" }, []string{"× authorities: ", "× policies: ", "hint: run it as the user that runs the mesh"}},
		"policy directory gone":  {func(t *testing.T, m *liveMesh) { m.file.PolicyDir = "/nothing" }, []string{"× policy directory: ", "hint: without it there is no policy to enforce"}},
		"no SVID":                {func(t *testing.T, m *liveMesh) { m.workload("shop/orders", nil, nil) }, []string{"× shop/orders SVID: no SVID from ", "hint: the agent has no certificate for it"}},
		"SVID of somebody else": {func(t *testing.T, m *liveMesh) {
			c, root := svid(t, m, "shop/frontend")
			m.workload("shop/orders", c, root)
		}, []string{"× shop/orders SVID: wrong SPIFFE ID"}},
		"application is down": {func(t *testing.T, m *liveMesh) {
			c, root := svid(t, m, "shop/orders")
			m.workload("shop/orders", c, root)
			w := m.file.Workloads["shop/orders"]
			w.App = "127.0.0.1:1"
			m.file.Workloads["shop/orders"] = w
		}, []string{"× shop/orders application: ", "hint: the application does not listen; the proxy answers 503 for it"}},
		"policy refused, last good in force": {func(_ *testing.T, m *liveMesh) {
			p := m.policies.answer.GetPolicies()[0]
			p.Accepted, p.LastGoodInForce, p.File = false, true, "orders.yaml"
			p.Findings = []*castellanv1.PolicyFinding{{Severity: "error", Field: "spec.action", Value: "PERMIT", Reason: "unknown action"}}
		}, []string{`× policy AuthorizationPolicy shop/orders: orders.yaml: spec.action: "PERMIT": unknown action`, "hint: mend it; its last good version stays in force until then"}},
		"policy refused": {func(_ *testing.T, m *liveMesh) {
			p := m.policies.answer.GetPolicies()[0]
			p.Accepted, p.File, p.Name = false, "orders.yaml", ""
		}, []string{"× policy file orders.yaml: refused", "hint: mend it; where it could select a workload, that workload denies everything until then"}},
		"deny all": {func(_ *testing.T, m *liveMesh) {
			w := m.policies.answer.GetWorkloads()[0]
			w.DenyAll, w.DenyReason = true, "orders.yaml cannot be read"
		}, []string{"× workload shop/orders: denies everything: orders.yaml cannot be read", "hint: mend the policy that is refused"}},
		"NACK": {func(_ *testing.T, m *liveMesh) { m.policies.answer.GetWorkloads()[0].Report = acked("v1", "v2") }, []string{"× workload shop/orders: its proxy refused policy version v2: why"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m := setup(t)
			tt.breakIt(t, m)
			m.save()
			r := castellanRun(t, "check", "--up", m.upFile).want(t, 2, tt.want...)
			lines := strings.Split(r.out, "\n")
			for i, line := range lines {
				if strings.HasPrefix(line, "×") && !strings.HasPrefix(lines[i+1], "    hint: ") {
					t.Errorf("no hint: %s", line)
				}
			}
		})
	}
	t.Run("warnings are not failures", func(t *testing.T) {
		m := setup(t)
		m.policies.answer.GetWorkloads()[0].Version = "v2" // not acknowledged yet
		m.policies.answer.GetPolicies()[0].Findings = []*castellanv1.PolicyFinding{{Severity: "warning", Field: "spec.rules", Reason: "risky"}}
		castellanRun(t, "check", "--up", m.upFile).want(t, 0, "! workload shop/orders: policy version v2 is not acknowledged by any proxy", "! policy AuthorizationPolicy shop/orders: ")
	})
}

func acked(version, nacked string) *castellanv1.WorkloadReport {
	r := &castellanv1.ResourceReport{TypeUrl: castellanv1.TypeWorkloadPolicy, Acked: version}
	if nacked != "" {
		r.Nacked, r.Reason = nacked, "why"
	}
	return &castellanv1.WorkloadReport{Streams: []*castellanv1.StreamReport{{Resources: []*castellanv1.ResourceReport{r}}}}
}
