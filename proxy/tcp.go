package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"castellan.dev/authz"
	"castellan.dev/internal/judge"
	"castellan.dev/proxy/accesslog"
)

const (
	smallBuffer = 4 << 10
	largeBuffer = 32 << 10
)

// authorizeTCP judges a connection as a whole. Without a policy it is denied.
func (p *Proxy) authorizeTCP(st *state, subject authz.Peer) authz.Decision {
	switch {
	case st.policy == nil:
		return authz.Decision{Rule: -1, Reason: authz.ReasonNoSnapshot}
	case st.policy.broken != "":
		return authz.Decision{Rule: -1, Reason: "policy cannot be enforced, all is denied: " + st.policy.broken}
	}
	return st.policy.snapshot.Connect(subject).AuthorizeTCP()
}

// serveTCP judges the connection, and carries its bytes as long as it would be
// judged the same. unsaid: nobody has spoken on it yet. If the client then speaks
// HTTP, that is returned, and the connection left as it is.
func (in *inbound) serveTCP(ctx context.Context, conn net.Conn, l *live, source netip.AddrPort, unsaid bool) (speaks protocol) {
	l.tcp = true
	p := in.p
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.closeNow = cancel
	l.active.Store(p.now().UnixNano())
	p.watch(l, func() {
		e := accesslog.Entry{
			Start: p.now(), Direction: "inbound", Protocol: "TCP", Source: source.String(), Destination: in.app, Rule: -1,
		}
		if len(l.chain) > 0 {
			e.Peer = l.peer.ID.String()
		}
		if speaks = in.carryTCP(ctx, conn, l, &e, unsaid); speaks != speaksTCP {
			return
		}
		conn.Close()
		p.metrics.transferred(inboundSide, e.BytesReceived, e.BytesSent)
		e.Duration = p.now().Sub(e.Start)
		if why := l.why(); why != "" {
			e.Reason = why
		}
		p.cfg.AccessLog.Add(&e)
	})
	return speaks
}

// carryTCP returns what is spoken if it turned out not to be TCP.
func (in *inbound) carryTCP(ctx context.Context, conn net.Conn, l *live, e *accesslog.Entry, unsaid bool) protocol {
	p := in.p
	d := p.authorizeTCP(p.store.load(), l.subject)
	e.Policy, e.Rule = d.Policy, d.Rule
	if !d.Allowed {
		e.Reason = d.Reason
		p.metrics.deniedBy[judge.KindPolicy].Inc()
		return speaksTCP
	}
	dialCtx, cancel := context.WithTimeout(ctx, p.connectTimeout())
	app, err := in.dial(dialCtx)
	cancel()
	if err != nil {
		e.Reason, e.Error = "upstream_connect_failed", err
		return speaksTCP
	}
	defer app.Close()
	if first, ok := conn.(*prefixConn); ok && unsaid {
		server := &prefixConn{Conn: app}
		speaks := p.firstWord(ctx, first, server)
		if speaks == speaksHTTP || speaks == speaksHTTP2 {
			speaks = in.asHTTP(speaks)
		}
		if speaks != speaksTCP {
			first.late, first.mayBeTLS = false, false
			return speaks
		}
		app = server
	}
	in.count(speaksTCP, l)
	e.BytesReceived, e.BytesSent, e.Error = p.splice(ctx, conn, app, l)
	if errors.Is(e.Error, errLate) {
		e.Reason = refusedLate
		p.metrics.refused.WithLabelValues(inboundSide.String(), refusedLate).Inc()
	}
	return speaksTCP
}

// asHTTP: what looks like HTTP is that, but on a port declared to carry bytes.
func (in *inbound) asHTTP(speaks protocol) protocol {
	if judge.ProtocolOf(in.p.store.load().declared(in.port)) == speaksTCP {
		return speaksTCP
	}
	return speaks
}

// closeWith closes both connections when ctx ends; stop is that of context.AfterFunc.
func closeWith(ctx context.Context, a, b net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() {
		a.Close()
		b.Close()
	})
}

// splice carries bytes both ways until both ended, one failed, or ctx ended.
// The end of one direction is passed on and leaves the other open.
func (p *Proxy) splice(ctx context.Context, client, server net.Conn, l *live) (received, sent int64, err error) {
	defer closeWith(ctx, client, server)()
	var up, down int64
	var failed atomic.Pointer[error]
	direction := func(dst, src net.Conn, n *int64) {
		err := p.buffers.carry(dst, src, n, func() { l.active.Store(p.now().UnixNano()) })
		if err == nil {
			err = closeWrite(dst)
		}
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				failed.CompareAndSwap(nil, &err)
			}
			// A side that failed, or that a judgement closed, takes the other with it.
			client.Close()
			server.Close()
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { direction(server, client, &up) })
	direction(client, server, &down)
	wg.Wait()
	if ctx.Err() == nil {
		if e := failed.Load(); e != nil {
			err = *e
		}
	}
	return up, down, err
}

// buffers lends small buffers to connections, and large ones to those that fill them.
type buffers struct{ small, large sync.Pool }

func (b *buffers) get(large bool) *[]byte {
	pool, size := &b.small, smallBuffer
	if large {
		pool, size = &b.large, largeBuffer
	}
	if buf, ok := pool.Get().(*[]byte); ok {
		return buf
	}
	buf := make([]byte, size)
	return &buf
}

func (b *buffers) put(buf *[]byte) {
	if len(*buf) == largeBuffer {
		b.large.Put(buf)
		return
	}
	b.small.Put(buf)
}

// carry copies until the end of src. It counts as it goes.
func (b *buffers) carry(dst io.Writer, src io.Reader, count *int64, moved func()) error {
	buf := b.get(false)
	defer func() { b.put(buf) }()
	for {
		n, err := src.Read(*buf)
		if n > 0 {
			moved()
			if _, werr := dst.Write((*buf)[:n]); werr != nil {
				return werr
			}
			*count += int64(n)
			if n == smallBuffer && len(*buf) == smallBuffer {
				b.put(buf)
				buf = b.get(true)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (p *Proxy) connectTimeout() time.Duration {
	return p.cfg.Proxy.Limits.ConnectTimeout.Or(5 * time.Second)
}
