package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"slices"
	"time"

	"castellan.dev/internal/config"
)

// benchMemory: resident memory of one proxy, idle and with idle mutual TLS
// connections, each of which has done one request.
func benchMemory(ctx context.Context, opt options) error {
	f, err := newField(ctx, opt)
	if err != nil {
		return err
	}
	defer f.close()
	time.Sleep(3 * time.Second)
	var idle []float64
	for _, w := range f.mesh.Workloads {
		mb, err := rss(w.PID)
		if err != nil {
			return err
		}
		idle = append(idle, mb)
	}
	opt.reach("resident memory, idle, largest of the mesh's proxies", slices.Max(idle), 20, " MB")

	// The promise is of the proxy as the mesh starts it; its application answers 1 KB.
	orders := f.mesh.Workloads["shop/orders"]
	inMesh := peer{name: "castellan-proxy, as the mesh starts it", addr: orders.Inbound, pid: orders.PID}
	held, err := f.hold(ctx, inMesh, 1000)
	if err != nil {
		return err
	}
	opt.reach("resident memory, 1,000 idle mTLS connections", held, 90, " MB")

	many, why, err := manyConnections()
	if err != nil {
		return err
	}
	wide, err := f.castellan(ctx, ours, "shop/orders", func(c *config.Proxy) {
		c.Limits = config.ProxyLimits{MaxConnections: many + 1000, MaxPerSource: many + 1000, IdleTimeout: config.Duration(time.Hour)}
	})
	if err != nil {
		return err
	}
	rest, err := f.start(ctx, envoyRules(), nginx())
	if err != nil {
		return err
	}
	opt.printf("  %-40s %10s %12s %14s\n", "", "idle MB", "held MB", "KB each")
	for _, c := range []struct {
		peer
		conns int
	}{{wide, 1000}, {rest[0], 1000}, {rest[1], 1000}, {wide, many}} {
		time.Sleep(time.Second)
		before, err := rss(c.pid)
		if err != nil {
			return err
		}
		held, err := f.hold(ctx, c.peer, c.conns)
		if err != nil {
			return fmt.Errorf("%s, %d connections: %w", c.name, c.conns, err)
		}
		opt.printf("  %-40s %10.1f %12.1f %14.1f\n", fmt.Sprintf("%s, %d connections", c.name, c.conns), before, held, 1000*(held-before)/float64(c.conns))
	}
	opt.printf("  %s\n", why)
	return nil
}

// manyConnections is 10,000, or what the descriptor limit leaves: a proxy holds two
// for each connection, its client's and its application's.
func manyConnections() (int, string, error) {
	limit, err := fileLimit()
	if err != nil {
		return 0, "", err
	}
	const wanted, spare = 10_000, 500
	if fit := (int(min(limit, 1<<20)) - spare) / 2; fit < wanted {
		return fit, fmt.Sprintf("%d and not %d connections: the limit is %d descriptors, and each may take two", fit, wanted, limit), nil
	}
	return wanted, fmt.Sprintf("the limit is %d descriptors", limit), nil
}

// hold opens connections, does one request on each, and returns the resident
// memory in MB after they have been idle for a while.
func (f *field) hold(ctx context.Context, p peer, conns int) (float64, error) {
	l := f.load(p, 1024, 1)
	request := []byte("GET " + l.target() + " HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	r := bufio.NewReader(nil)
	for range conns {
		c, err := l.dial(ctx)
		if err != nil {
			return 0, err
		}
		open = append(open, c)
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		r.Reset(c)
		if err := exchange(c, r, request, l.size); err != nil {
			return 0, err
		}
	}
	time.Sleep(5 * time.Second)
	return rss(p.pid)
}
