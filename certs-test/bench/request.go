package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// table is what one cell cost each program.
type table struct {
	peers []peer
	cpu   map[string][]float64 // microseconds of one operation
	rate  map[string][]float64 // operations per second
}

// compare runs one cell for every program, repeat times and interleaved there and back.
func compare(ctx context.Context, opt options, peers []peer, cell func(p peer) load) (table, error) {
	t := table{peers, map[string][]float64{}, map[string][]float64{}}
	for i := range opt.repeat {
		order := slices.Clone(peers)
		if i%2 == 1 {
			slices.Reverse(order)
		}
		for _, p := range order {
			if p.accessLog != "" {
				if err := os.Truncate(p.accessLog, 0); err != nil {
					return t, err
				}
			}
			cost, out, err := measure(ctx, p, cell(p), opt.seconds)
			if err != nil {
				return t, err
			}
			t.cpu[p.name] = append(t.cpu[p.name], cost)
			t.rate[p.name] = append(t.rate[p.name], float64(out.requests)/out.wall.Seconds())
		}
	}
	return t, nil
}

// measure returns the CPU microseconds that one operation of a load costs a program.
func measure(ctx context.Context, p peer, l load, d time.Duration) (float64, outcome, error) {
	s := l.open(ctx)
	defer s.close()
	s.run(ctx, d/10)
	before, err := cpuTime(p.pid)
	if err != nil {
		return 0, outcome{}, err
	}
	out := s.run(ctx, d)
	after, err := cpuTime(p.pid)
	if err := errors.Join(err, ctx.Err(), out.err()); err != nil {
		return 0, out, fmt.Errorf("%s: %w", p.name, err)
	}
	return float64((after - before).Nanoseconds()) / 1000 / float64(out.requests), out, nil
}

func (t table) print(opt options, title string) {
	ours := median(t.cpu[t.peers[0].name])
	opt.printf("  %-34s %10s %10s %10s %10s\n", title, "median µs", "min µs", "ours is", "per second")
	for _, p := range t.peers {
		opt.printf("  %-34s %10.1f %10.1f %9.2f× %10.0f\n", p.name, median(t.cpu[p.name]), slices.Min(t.cpu[p.name]), ours/median(t.cpu[p.name]), median(t.rate[p.name]))
	}
}

// ratio is what our first row costs against a peer.
func (t table) ratio(name string) float64 {
	return median(t.cpu[t.peers[0].name]) / median(t.cpu[name])
}

// slowest is the capacity of the slowest program.
func (t table) slowest() float64 {
	slowest := 1e12
	for _, r := range t.rate {
		slowest = min(slowest, median(r))
	}
	return slowest
}

// benchRequest: CPU per request, by protocol, size and number of connections.
func benchRequest(ctx context.Context, opt options) error {
	f, err := newField(ctx, opt)
	if err != nil {
		return err
	}
	defer f.close()
	out := load{addr: f.backend, size: 1024, conns: 32}.run(ctx, opt.seconds)
	if err := out.err(); err != nil {
		return fmt.Errorf("null run: %w", err)
	}
	own, err := f.ordersProxy(ctx)
	if err != nil {
		return err
	}
	opt.printf("  null run, loader straight to the backend in the clear: %.0f/s\n\n", float64(out.requests)/out.wall.Seconds())
	for _, part := range []func(context.Context, *field, options, peer) error{requestHTTP1, requestHTTP2, requestTCP} {
		if err := part(ctx, f, opt, own); err != nil {
			return err
		}
	}
	return nil
}

// requestHTTP1 is the cell of the promise, and its neighbours.
func requestHTTP1(ctx context.Context, f *field, opt options, orders peer) error {
	own := []peer{orders}
	for _, start := range []func(context.Context) (peer, error){f.paymentsProxy, f.plainProxy} {
		p, err := start(ctx)
		if err != nil {
			return err
		}
		own = append(own, p)
	}
	rest, err := f.start(ctx, httpPeers()...)
	if err != nil {
		return err
	}
	peers := slices.Concat(own, rest)
	cell := func(p peer) load { return f.load(p, 1024, 32) }
	t, err := compare(ctx, opt, peers, cell)
	if err != nil {
		return err
	}
	t.print(opt, "HTTP/1.1, 1 KB, 32 connections")
	opt.reach("CPU per request against Envoy with the same rules", t.ratio(envoyName), 1.0, "×")
	opt.printf("  latency at %.0f/s (half of the slowest's capacity):\n", t.slowest()/2)
	for _, p := range peers {
		l := cell(p)
		l.perSecond = t.slowest() / 2
		out := l.run(ctx, opt.seconds)
		if err := out.err(); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		opt.printf("  %-34s %s\n", p.name, quantiles(out.latency))
	}
	second := opt.second()
	if !opt.full {
		main := []string{ours, envoyName, nginxName, haproxyName}
		peers = slices.DeleteFunc(peers, func(p peer) bool { return !slices.Contains(main, p.name) })
	}
	for _, c := range []struct {
		name        string
		size, conns int
	}{
		{"no body, 32 connections", 0, 32},
		{"16 KB, 32 connections", 16 << 10, 32},
		{"1 MB, 32 connections", 1 << 20, 32},
		{"1 KB, 1 connection", 1 << 10, 1},
		{"1 KB, 128 connections", 1 << 10, 128},
		{"1 KB, 512 connections", 1 << 10, 512},
	} {
		t, err := compare(ctx, second, peers, func(p peer) load { return f.load(p, c.size, c.conns) })
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		opt.printf("\n")
		t.print(opt, "HTTP/1.1, "+c.name)
	}
	return nil
}

// load2 is 1 KB over HTTP/2, 32 requests at once on 4 connections.
func (f *field) load2(p peer) load {
	l := f.load(p, 1024, 4)
	l.tls, l.streams = clientTLS(f.mat, "h2"), 8
	return l
}

func requestHTTP2(ctx context.Context, f *field, opt options, own peer) error {
	rest, err := f.start(ctx, http2Peer())
	if err != nil {
		return err
	}
	t, err := compare(ctx, opt.second(), append([]peer{own}, rest...), f.load2)
	if err != nil {
		return err
	}
	opt.printf("\n")
	t.print(opt, "HTTP/2, 1 KB, 4 × 8 streams")
	return nil
}

// requestTCP has the same exchanges carried by programs that do not read them.
func requestTCP(ctx context.Context, f *field, opt options, _ peer) error {
	own, err := f.tcpProxy(ctx)
	if err != nil {
		return err
	}
	rest, err := f.start(ctx, tcpPeers()...)
	if err != nil {
		return err
	}
	t, err := compare(ctx, opt.second(), append([]peer{own}, rest...), func(p peer) load { return f.load(p, 1024, 32) })
	if err != nil {
		return err
	}
	opt.printf("\n")
	t.print(opt, "TCP, 1 KB exchanges, 32 connections")
	return nil
}

// benchConnect: a new mutual TLS connection and one request.
func benchConnect(ctx context.Context, opt options) error {
	f, err := newField(ctx, opt)
	if err != nil {
		return err
	}
	defer f.close()
	own, err := f.ordersProxy(ctx)
	if err != nil {
		return err
	}
	rest, err := f.start(ctx, httpPeers()...)
	if err != nil {
		return err
	}
	cell := func(p peer) load {
		l := f.load(p, 1024, 4)
		l.fresh = true
		return l
	}
	t, err := compare(ctx, opt, append([]peer{own}, rest...), cell)
	if err != nil {
		return err
	}
	t.print(opt, "new connection, one request, 1 KB")
	opt.reach("CPU per new connection against nginx", t.ratio(nginxName), 0.7, "×")
	opt.reach("CPU per new connection against Envoy", t.ratio(envoyName), 1.15, "×")

	// The same with a client that would resume. Nothing may be resumed: a session
	// would outlive the bundle, the denylist and the certificate it was made with.
	l := cell(own)
	l.tls.SessionTicketsDisabled = false
	l.tls.ClientSessionCache = tls.NewLRUClientSessionCache(64)
	cost, out, err := measure(ctx, own, l, opt.seconds)
	if err != nil {
		return err
	}
	if out.resumed != 0 {
		return fmt.Errorf("%s resumed %d sessions, which it must not", own.name, out.resumed)
	}
	opt.printf("  %s, resumption offered: %.1f µs, %d connections, 0 resumed (off by design)\n", own.name, cost, out.requests)
	return nil
}
