package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// benchPolicies are 20 rules for orders, the same as Envoy gets; the one that
// matches the loader stands last.
func benchPolicies() map[string]string {
	const rules = 20
	var b strings.Builder
	b.WriteString(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bench, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: ALLOW
  rules:
`)
	for i := range rules {
		fmt.Fprintf(&b, `  - from: [{source: {principals: ["cluster.local/ns/shop/sa/%s"]}}]
    to: [{operation: {methods: ["GET"], paths: ["/r%d/*"]}}]
`, ruleCaller(i, rules), i)
	}
	return map[string]string{
		"bench.yaml": b.String(),
		"strict.yaml": `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: castellan-system}
spec: {mtls: {mode: STRICT}}
`,
	}
}

// field is everything that answers in front of one application.
type field struct {
	mesh  *mesh
	peers []peer
	mat   *material
	dir   string
}

func (f *field) close() {
	for _, p := range f.peers {
		if p.stop != nil {
			p.stop()
		}
	}
	f.mesh.stop()
	os.RemoveAll(f.dir)
}

func newField(ctx context.Context, opt options) (*field, error) {
	m, err := startMesh(ctx, opt, benchPolicies())
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "cb")
	if err != nil {
		m.stop()
		return nil, err
	}
	f := &field{mesh: m, dir: dir}
	orders := m.Workloads["shop/orders"]
	if f.mat, err = fetchMaterial(ctx, m.Workloads["shop/frontend"].Socket, dir); err != nil {
		f.close()
		return nil, err
	}
	if err := pin(orders.PID, testCPU); err != nil {
		f.close()
		return nil, err
	}
	if err := pin(os.Getpid(), loadCPU); err != nil {
		f.close()
		return nil, err
	}
	f.peers = []peer{{name: "castellan-proxy, 20 rules", addr: orders.Inbound, pid: orders.PID}}
	rest, err := startPeers(ctx, opt, dir, orders.App, f.mat)
	if err != nil {
		f.close()
		return nil, err
	}
	f.peers = append(f.peers, rest...)
	return f, nil
}

// compare runs one cell for every program, repeat times and interleaved there and
// back, and returns the CPU microseconds of one operation, and the rates.
func (f *field) compare(ctx context.Context, opt options, cell func(p peer) load) (cpu, rate map[string][]float64, err error) {
	cpu, rate = map[string][]float64{}, map[string][]float64{}
	for i := range opt.repeat {
		order := slices.Clone(f.peers)
		if i%2 == 1 {
			slices.Reverse(order)
		}
		for _, p := range order {
			l := cell(p)
			l.run(ctx, 200*time.Millisecond)
			before, err := cpuTime(p.pid)
			if err != nil {
				return nil, nil, err
			}
			out := l.run(ctx, opt.seconds)
			after, err := cpuTime(p.pid)
			if err != nil {
				return nil, nil, err
			}
			if out.failed > 0 || out.requests == 0 {
				return nil, nil, fmt.Errorf("%s: %d requests failed: %w", p.name, out.failed, out.firstErr)
			}
			cpu[p.name] = append(cpu[p.name], float64((after-before).Microseconds())/float64(out.requests))
			rate[p.name] = append(rate[p.name], float64(out.requests)/out.wall.Seconds())
		}
	}
	return cpu, rate, nil
}

func (f *field) table(cpu, rate map[string][]float64) {
	ours := median(cpu[f.peers[0].name])
	fmt.Printf("  %-30s %10s %10s %10s %10s\n", "", "median µs", "min µs", "ours is", "per second")
	for _, p := range f.peers {
		fmt.Printf("  %-30s %10.1f %10.1f %9.2f× %10.0f\n", p.name, median(cpu[p.name]), slices.Min(cpu[p.name]), ours/median(cpu[p.name]), median(rate[p.name]))
	}
}

// benchRequest: HTTP/1.1 keep-alive, 1 KB, 32 connections, mutual TLS.
func benchRequest(ctx context.Context, opt options) error {
	f, err := newField(ctx, opt)
	if err != nil {
		return err
	}
	defer f.close()
	cell := func(p peer) load {
		return load{addr: p.addr, tls: clientTLS(f.mat.cert, f.mat.pool), path: "/r19/x", conns: 32}
	}
	null := load{addr: f.mesh.Workloads["shop/orders"].App, path: "/r19/x", conns: 32}
	if out := null.run(ctx, opt.seconds); out.failed > 0 {
		return fmt.Errorf("null run: %w", out.firstErr)
	} else {
		fmt.Printf("  null run, loader straight to the application in the clear: %.0f/s\n", float64(out.requests)/out.wall.Seconds())
	}
	cpu, rate, err := f.compare(ctx, opt, cell)
	if err != nil {
		return err
	}
	f.table(cpu, rate)
	reach("CPU per request against Envoy with the same rules", median(cpu["castellan-proxy, 20 rules"])/median(cpu["envoy, 20 rules"]), 1.0, "×")
	slowest := 1e12
	for _, r := range rate {
		slowest = min(slowest, median(r))
	}
	fmt.Printf("  latency at %.0f/s (half of the slowest's capacity):\n", slowest/2)
	for _, p := range f.peers {
		l := cell(p)
		l.perSecond = slowest / 2
		out := l.run(ctx, 2*opt.seconds)
		if out.failed > 0 || len(out.latency) == 0 {
			return fmt.Errorf("%s: %w", p.name, out.firstErr)
		}
		slices.Sort(out.latency)
		at := func(q float64) time.Duration { return out.latency[int(q*float64(len(out.latency)-1))] }
		fmt.Printf("  %-30s p50 %v  p99 %v\n", p.name, at(0.5).Round(time.Microsecond), at(0.99).Round(time.Microsecond))
	}
	return nil
}

// benchConnect: a new mutual TLS connection and one request.
func benchConnect(ctx context.Context, opt options) error {
	f, err := newField(ctx, opt)
	if err != nil {
		return err
	}
	defer f.close()
	cpu, rate, err := f.compare(ctx, opt, func(p peer) load {
		return load{addr: p.addr, tls: clientTLS(f.mat.cert, f.mat.pool), path: "/r19/x", conns: 4, fresh: true}
	})
	if err != nil {
		return err
	}
	f.table(cpu, rate)
	ours := median(cpu["castellan-proxy, 20 rules"])
	reach("CPU per new connection against nginx", ours/median(cpu["nginx, no policy"]), 0.7, "×")
	reach("CPU per new connection against Envoy", ours/median(cpu["envoy, 20 rules"]), 1.15, "×")
	return nil
}
