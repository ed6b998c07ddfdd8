package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"
)

const (
	minAcceptPause = 5 * time.Millisecond
	maxAcceptPause = time.Second
)

// acceptor takes connections from one listener and hands each to secure, in a
// goroutine of its own.
type acceptor struct {
	p        *Proxy
	side     direction
	listener net.Listener
	limits   *limits
	// secure owns the connection: it settles the transport and returns what then
	// serves it, in its place, or closes it and returns nil. The two run in goroutines of their
	// own, so that the stack a handshake has grown is not kept while a connection
	// idles.
	secure secureFunc
}

type secureFunc func(ctx context.Context, conn net.Conn, source netip.AddrPort) (serve func(*place))

// run accepts until ctx ends. An accept error (no descriptors left) is waited
// out, longer each time, since the listener itself is still good.
func (a *acceptor) run(ctx context.Context, serving *sync.WaitGroup) error {
	stop := context.AfterFunc(ctx, func() { a.listener.Close() })
	defer stop()
	pause := minAcceptPause
	for {
		conn, err := a.listener.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			a.p.log.Warn("accept failed; waiting", "direction", a.side.String(), "pause", pause.String(), "error", err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
			pause = min(2*pause, maxAcceptPause)
			continue
		}
		pause = minAcceptPause
		a.admit(conn, serving)
	}
}

// admit counts the connection before any work is done for it.
func (a *acceptor) admit(conn net.Conn, serving *sync.WaitGroup) {
	source := addrPort(conn.RemoteAddr())
	held, dropped, reason := a.limits.admit(source.Addr(), conn)
	if reason != "" {
		a.p.refuse(a.side, reason, source, nil)
		conn.Close()
		return
	}
	for _, d := range dropped {
		a.p.metrics.closed.WithLabelValues(a.side.String(), closedCrowded).Inc()
		_ = d.Close() // it is lost anyway
	}
	a.p.metrics.open[a.side].Inc()
	release := func() {
		a.p.metrics.open[a.side].Dec()
		held.release()
	}
	serving.Go(func() {
		var serve func(*place)
		a.p.guard(a.side, conn, func() { serve = a.secure(a.p.serving, conn, source) })
		if serve == nil {
			release()
			return
		}
		held.settle()
		serving.Go(func() {
			defer release()
			a.p.guard(a.side, conn, func() { serve(held) })
		})
	})
}

// guard runs f; a panic costs its connection and not the others.
func (p *Proxy) guard(side direction, conn net.Conn, f func()) {
	defer func() {
		if r := recover(); r != nil {
			conn.Close()
			p.metrics.refused.WithLabelValues(side.String(), refusedPanic).Inc()
			p.log.Error("connection panicked", "direction", side.String(), "panic", r, "stack", string(debug.Stack()))
		}
	}()
	f()
}

// refuse counts a connection that was turned away, and logs it, sparingly: who
// is turned away may come often.
func (p *Proxy) refuse(side direction, reason string, source netip.AddrPort, err error) {
	p.metrics.refused.WithLabelValues(side.String(), reason).Inc()
	if p.quiet.AllowN(p.now(), 1) {
		p.log.Warn("connection refused", "direction", side.String(), "reason", reason, "source", source.String(), "error", err)
	}
}

// addrPort is the address of a TCP peer, unmapped; the zero value for others.
func addrPort(addr net.Addr) netip.AddrPort {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
