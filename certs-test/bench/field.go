package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"castellan.dev/internal/config"
)

const (
	// benchRules is how many rules each policy of the comparison holds.
	benchRules = 20
	httpPort   = 8080
	tcpPort    = 9090
)

// ruleCaller names the caller of a rule: the loader's own in the last.
func ruleCaller(i int) string {
	if i == benchRules-1 {
		return "frontend"
	}
	return fmt.Sprintf("caller-%d", i)
}

// benchPolicies are 20 rules for orders, the same as Envoy gets; the one that
// matches the loader stands last. Payments has the same rules, each for end users
// of a group only; frontend has none.
func benchPolicies() map[string]string {
	policies := map[string]string{
		"strict.yaml": `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: castellan-system}
spec: {mtls: {mode: STRICT}}
`,
	}
	for _, p := range []struct{ app, source, when string }{
		{app: "orders"},
		{app: "payments", source: `, requestPrincipals: ["*"]`, when: `    when: [{key: "request.auth.claims[groups]", values: ["finance"]}]` + "\n"},
	} {
		var b strings.Builder
		fmt.Fprintf(&b, `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bench-%s, namespace: shop}
spec:
  selector: {matchLabels: {app: %[1]s}}
  action: ALLOW
  rules:
`, p.app)
		for i := range benchRules {
			fmt.Fprintf(&b, `  - from: [{source: {principals: ["cluster.local/ns/shop/sa/%s"]%s}}]
    to: [{operation: {methods: ["GET"], paths: ["/r%d/*"]}}]
%s`, ruleCaller(i), p.source, i, p.when)
		}
		policies[p.app+".yaml"] = b.String()
	}
	return policies
}

// field is one application and everything that answers in front of it.
type field struct {
	opt     options
	mesh    *mesh
	mat     *material
	dir     string
	backend string
	stops   []func()
}

// close ends every program, the last started first.
func (f *field) close() {
	for i := len(f.stops) - 1; i >= 0; i-- {
		f.stops[i]()
	}
	os.RemoveAll(f.dir)
}

// newField starts a mesh and the application; programs are put in front of it by start.
func newField(ctx context.Context, opt options) (f *field, err error) {
	f = &field{opt: opt}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	if f.dir, err = os.MkdirTemp("", "cb"); err != nil {
		return nil, err
	}
	if f.mesh, err = startMesh(ctx, opt, benchPolicies()); err != nil {
		return nil, err
	}
	f.stops = append(f.stops, f.mesh.stop)
	if f.mat, err = fetchMaterial(ctx, f.mesh.Workloads["shop/frontend"].Socket, f.dir); err != nil {
		return nil, err
	}
	if err := pin(os.Getpid(), loadCPU); err != nil {
		return nil, err
	}
	if f.backend, err = freeAddr(); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	_, stop, err := start(loadCPU, self, "backend", "-listen", f.backend)
	if err != nil {
		return nil, err
	}
	f.stops = append(f.stops, stop)
	return f, f.ready(ctx, "the backend", load{addr: f.backend, size: 1024, conns: 1})
}

// ready waits until one request of a load succeeds.
func (f *field) ready(ctx context.Context, what string, l load) error {
	err := waitListen(ctx, func() error { return l.once(ctx) })
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// refused waits until a request is answered with a status.
func (f *field) refused(ctx context.Context, p peer, l load, status string) error {
	err := waitListen(ctx, func() error {
		if err := l.once(ctx); err == nil || !strings.Contains(err.Error(), " "+status+" ") {
			return fmt.Errorf("got %w, want %s", err, status)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%s does not enforce what it says: %w", p.name, err)
	}
	return nil
}

// castellan starts a proxy of a workload of the mesh in front of the backend. Its
// access log, which the peers do not write, goes to a file.
func (f *field) castellan(ctx context.Context, name, workload string, change func(*config.Proxy)) (peer, error) {
	listen, err := freeAddr()
	if err != nil {
		return peer{}, err
	}
	admin, err := freeAddr()
	if err != nil {
		return peer{}, err
	}
	base := filepath.Join(f.dir, strings.NewReplacer(" ", "-", ",", "").Replace(name))
	conf := config.Proxy{
		Header:      config.Header{APIVersion: config.APIVersion, Kind: "ProxyConfig"},
		AgentSocket: f.mesh.Workloads[workload].Socket,
		Inbound:     []config.Inbound{{Listen: listen, Port: httpPort, App: f.backend}},
		Admin:       admin,
		AccessLog:   base + ".access",
	}
	if change != nil {
		change(&conf)
	}
	raw, err := json.Marshal(conf) // which YAML is, too
	if err != nil {
		return peer{}, err
	}
	if err := os.WriteFile(base+".yaml", raw, 0o600); err != nil {
		return peer{}, err
	}
	pid, stop, err := start(testCPU, filepath.Join(f.opt.bin, "castellan-proxy"), "-config", base+".yaml")
	if err != nil {
		return peer{}, err
	}
	f.stops = append(f.stops, stop)
	p := peer{name: name, addr: listen, pid: pid, accessLog: conf.AccessLog}
	return p, waitListen(ctx, func() error { return getOK("http://" + admin + "/readyz") })
}

// ordersProxy is the proxy of the promises: 20 rules, authorization, access log and metrics on.
func (f *field) ordersProxy(ctx context.Context) (peer, error) {
	p, err := f.castellan(ctx, ours, "shop/orders", nil)
	if err != nil {
		return p, err
	}
	if err := f.ready(ctx, p.name, f.load(p, 1024, 1)); err != nil {
		return p, err
	}
	l := f.load(p, 1024, 1)
	l.path = "/other/1024"
	return p, f.refused(ctx, p, l, "403")
}

// paymentsProxy has end users' tokens checked too.
func (f *field) paymentsProxy(ctx context.Context) (peer, error) {
	p, err := f.castellan(ctx, "castellan-proxy, 20 rules + JWT", "shop/payments", nil)
	if err != nil {
		return p, err
	}
	keys, err := os.ReadFile(f.mesh.JWT.JWKS)
	if err != nil {
		return p, err
	}
	inline, err := json.Marshal(string(keys))
	if err != nil {
		return p, err
	}
	policy := fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: bench-users, namespace: shop}
spec:
  selector: {matchLabels: {app: payments}}
  jwtRules: [{issuer: %q, audiences: ["payments"], jwks: %s}]
`, f.mesh.JWT.Issuer, inline)
	if err := os.WriteFile(filepath.Join(f.mesh.PolicyDir, "users.yaml"), []byte(policy), 0o644); err != nil {
		return p, err
	}
	if err := f.refused(ctx, p, f.load(p, 1024, 1), "403"); err != nil {
		return p, err
	}
	token, err := os.ReadFile(f.mesh.JWT.ValidToken)
	if err != nil {
		return p, err
	}
	p.header = "Authorization: Bearer " + strings.TrimSpace(string(token)) + "\r\n"
	return p, f.ready(ctx, p.name, f.load(p, 1024, 1))
}

// plainProxy is without policy.
func (f *field) plainProxy(ctx context.Context) (peer, error) {
	p, err := f.castellan(ctx, "castellan-proxy, no policy", "shop/frontend", nil)
	if err != nil {
		return p, err
	}
	return p, f.ready(ctx, p.name, f.load(p, 1024, 1))
}

// tcpProxy passes bytes on: its workload's port is declared TCP.
func (f *field) tcpProxy(ctx context.Context) (peer, error) {
	err := editWorkloads(f.mesh, func(pods []any) []any {
		for _, p := range pods {
			if pod := p.(map[string]any); pod["serviceAccount"] == "frontend" {
				ports, _ := pod["ports"].([]any)
				pod["ports"] = append(ports, map[string]any{"number": tcpPort, "protocol": "tcp"})
			}
		}
		return pods
	})
	if err != nil {
		return peer{}, err
	}
	p, err := f.castellan(ctx, "castellan-proxy, TCP", "shop/frontend", func(c *config.Proxy) { c.Inbound[0].Port = tcpPort })
	if err != nil {
		return p, err
	}
	// A second Host is what only the backend lets pass: it shows that nothing reads along.
	p.tcp = true
	l := f.load(p, 1024, 1)
	l.header = "Host: another\r\n"
	return p, f.ready(ctx, p.name, l)
}

// load is keep-alive HTTP/1.1 with bodies of a size.
func (f *field) load(p peer, size, conns int) load {
	protocols := []string{"http/1.1"}
	if p.tcp {
		protocols = nil
	}
	return load{addr: p.addr, tls: clientTLS(f.mat, protocols...), header: p.header, size: size, conns: conns}
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
