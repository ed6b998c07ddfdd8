package proxy

import (
	"context"
	"net"
	"net/netip"

	"castellan.dev/proxy/accesslog"
	"castellan.dev/proxy/engine"
)

// outbound is where connections of the application go: a configured destination,
// or where one that was captured had been going.
type outbound struct {
	p       *Proxy
	service string
	port    uint16
	// original is the destination of a captured connection; the zero value for a
	// configured one.
	original netip.AddrPort
	// name is the destination in the log.
	name string
}

// resolve finds the destination as it is known now; or why there is none.
func (out *outbound) resolve(st *state) (target, *engine.StatusError) {
	if !out.original.IsValid() {
		if port := st.services[out.service].port(out.port); port != nil {
			return target{port: port}, nil
		}
		return target{}, &engine.StatusError{Status: 502, Reason: failedUnknown}
	}
	switch at, ours := st.index.find(out.original); {
	case ours:
		return at, nil
	case st.index == nil:
		return target{}, &engine.StatusError{Status: 503, Reason: failedNotYet}
	}
	return target{}, &engine.StatusError{Status: 502, Reason: failedUnknown}
}

// wants says which endpoints of the destination will do.
func (out *outbound) wants(st *state) wanted {
	w := wanted{plain: st.plainAllowed()}
	switch addr := out.original.Addr(); {
	case addr.Is4():
		w.family = onlyIPv4
	case addr.Is6():
		w.family = onlyIPv6
	}
	return w
}

// serving serves in a place that nobody is driven out of: all are the pod's own.
func (out *outbound) serving(ctx context.Context, conn net.Conn, source netip.AddrPort) func(*place) {
	return func(held *place) {
		held.prove()
		out.serve(ctx, conn, source)
	}
}

// serve tells what the application speaks and hands the connection on.
func (out *outbound) serve(ctx context.Context, conn net.Conn, source netip.AddrPort) {
	p := out.p
	st := p.store.load()
	if out.original.IsValid() && st.passes(out.original) {
		out.pass(ctx, conn, source)
		return
	}
	at, refused := out.resolve(st)
	declared := undeclared
	if refused == nil {
		declared = at.port.protocol
	}
	speaks, unsaid := declared, false
	if declared != speaksTCP {
		var err error
		if speaks, err = p.tellByBytes(&conn, declared, min(p.firstByte, quiet)); err != nil {
			conn.Close()
			return
		}
		first, ok := conn.(*prefixConn)
		unsaid = ok && speaks == speaksTCP && sniff(first.prefix[:first.length]) == sniffedNothing
	}
	l := out.live(source)
	if speaks == speaksTCP {
		if speaks = out.serveTCP(ctx, conn, l, source, unsaid); speaks == speaksTCP {
			return
		}
		l = out.live(source)
	}
	out.serveHTTP(ctx, conn, l, speaks == speaksHTTP2, source)
}

func (out *outbound) live(source netip.AddrPort) *live {
	l := &live{side: outboundSide}
	l.subject.SourceIP = source.Addr()
	return l
}

func (out *outbound) serveHTTP(ctx context.Context, conn net.Conn, l *live, h2 bool, source netip.AddrPort) {
	p := out.p
	if h2 {
		p.metrics.conns[outboundSide]["http2plaintext"].Inc()
	} else {
		p.metrics.conns[outboundSide]["http1plaintext"].Inc()
	}
	served := p.outboundEngine.NewConn(conn, h2, &outboundSession{out: out, source: source.String()})
	l.closeNow, l.gracefully = served.CloseNow, served.CloseGracefully
	p.watch(l, func() { served.Serve(ctx) })
}

// serveTCP carries an application's connection to one endpoint. unsaid: nobody has
// spoken on it yet. If the application then speaks HTTP, that is returned, and the
// connection left as it is.
func (out *outbound) serveTCP(ctx context.Context, conn net.Conn, l *live, source netip.AddrPort, unsaid bool) (speaks protocol) {
	return out.carry(ctx, conn, l, source, func(ctx context.Context, e *accesslog.Entry) protocol {
		p := out.p
		if !unsaid {
			p.metrics.conns[outboundSide]["tcpplaintext"].Inc()
		}
		dialCtx, done := context.WithTimeout(ctx, p.connectTimeout())
		at, err := out.resolve(p.store.load())
		var up *upstream
		if err == nil {
			up, err = out.dial(dialCtx, at.port, at.endpoint, at.endpoint != nil, wireTCP)
		}
		done()
		if err != nil {
			e.Reason, e.Error = err.Reason, err.Err
			return speaksTCP
		}
		defer func() { _ = up.Close() }()
		var server net.Conn = up
		if first, ok := conn.(*prefixConn); ok && unsaid {
			told := &prefixConn{Conn: up}
			if speaks := p.firstWord(ctx, first, told); speaks != speaksTCP {
				return speaks
			}
			server = told
			p.metrics.conns[outboundSide]["tcpplaintext"].Inc()
		}
		if len(up.live.chain) > 0 {
			e.Peer = up.live.peer.ID.String()
		}
		// What closes the upstream by judgement ends both.
		e.BytesReceived, e.BytesSent, e.Error = p.splice(ctx, conn, server, l)
		if why := up.live.why(); why != "" {
			e.Reason = why
		}
		return speaksTCP
	})
}

// pass carries a captured connection to where it was going, as it is.
func (out *outbound) pass(ctx context.Context, conn net.Conn, source netip.AddrPort) {
	l := out.live(source)
	l.passing = out.original
	out.carry(ctx, conn, l, source, func(ctx context.Context, e *accesslog.Entry) protocol {
		p := out.p
		p.metrics.conns[outboundSide]["tcpplaintext"].Inc()
		dialCtx, done := context.WithTimeout(ctx, p.connectTimeout())
		server, err := p.dialer.DialContext(dialCtx, "tcp", out.original.String())
		done()
		if err != nil {
			p.metrics.connects.WithLabelValues("outbound", "pass_failed").Inc()
			e.Reason, e.Error = engine.ReasonDial, err
			reset(conn)
			return speaksTCP
		}
		defer server.Close()
		p.metrics.connects.WithLabelValues("outbound", "passed").Inc()
		e.BytesReceived, e.BytesSent, e.Error = p.splice(ctx, conn, server, l)
		return speaksTCP
	})
}

// carry registers a connection that is carried as bytes, and logs what f did with
// it; unless f finds that something else is spoken.
func (out *outbound) carry(ctx context.Context, conn net.Conn, l *live, source netip.AddrPort, f func(context.Context, *accesslog.Entry) protocol) (speaks protocol) {
	p := out.p
	l.tcp = true
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.closeNow = cancel
	l.active.Store(p.now().UnixNano())
	p.watch(l, func() {
		e := accesslog.Entry{Start: p.now(), Direction: "outbound", Protocol: "TCP", Source: source.String(), Destination: out.name, Rule: -1}
		if speaks = f(ctx, &e); speaks != speaksTCP {
			return
		}
		conn.Close()
		p.metrics.transferred(outboundSide, e.BytesReceived, e.BytesSent)
		e.Duration = p.now().Sub(e.Start)
		if why := l.why(); why != "" {
			e.Reason = why
		}
		p.cfg.AccessLog.Add(&e)
	})
	return speaks
}

// reset has the application see what it would have without us: no connection.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
}
