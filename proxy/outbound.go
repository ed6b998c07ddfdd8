package proxy

import (
	"context"
	"net"
	"net/netip"

	"castellan.dev/proxy/accesslog"
)

// outbound is one plain listener of the application for one destination.
type outbound struct {
	p       *Proxy
	service string
	port    uint16
}

// resolve finds the destination's port as it is known now.
func (out *outbound) resolve() *servicePort {
	return out.p.store.load().services[out.service].port(out.port)
}

// serve tells what the application speaks and hands the connection on.
func (out *outbound) serve(ctx context.Context, conn net.Conn, source netip.AddrPort) {
	p := out.p
	declared := undeclared
	if port := out.resolve(); port != nil {
		declared = port.protocol
	}
	speaks := declared
	if declared != speaksTCP {
		var err error
		if speaks, err = p.tellByBytes(&conn, declared); err != nil {
			conn.Close()
			return
		}
	}
	l := &live{side: outboundSide}
	l.subject.SourceIP = source.Addr()
	switch speaks {
	case speaksTCP:
		p.metrics.conns[outboundSide]["tcpplaintext"].Inc()
		out.serveTCP(ctx, conn, l, source)
	default:
		h2 := speaks == speaksHTTP2
		if h2 {
			p.metrics.conns[outboundSide]["http2plaintext"].Inc()
		} else {
			p.metrics.conns[outboundSide]["http1plaintext"].Inc()
		}
		served := p.outboundEngine.NewConn(conn, h2, &outboundSession{out: out, source: source.String()})
		l.closeNow, l.gracefully = served.CloseNow, served.CloseGracefully
		p.watch(l, func() { served.Serve(ctx) })
	}
}

// serveTCP carries an application's connection to one endpoint.
func (out *outbound) serveTCP(ctx context.Context, conn net.Conn, l *live, source netip.AddrPort) {
	p := out.p
	l.tcp = true
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.closeNow = cancel
	l.active.Store(p.now().UnixNano())
	p.watch(l, func() {
		defer conn.Close()
		e := accesslog.Entry{Start: p.now(), Direction: "outbound", Protocol: "TCP", Source: source.String(), Destination: out.service, Rule: -1}
		dialCtx, done := context.WithTimeout(ctx, p.connectTimeout())
		up, err := out.dial(dialCtx, out.resolve(), nil, wireTCP)
		done()
		if err != nil {
			e.Reason, e.Error = err.Reason, err.Err
		} else {
			e.Peer = up.live.peer.ID.String()
			// What closes the upstream by judgement ends both.
			e.BytesReceived, e.BytesSent, e.Error = p.splice(ctx, conn, up, l)
			if why := up.live.why(); why != "" {
				e.Reason = why
			}
			_ = up.Close()
		}
		p.metrics.transferred(outboundSide, e.BytesReceived, e.BytesSent)
		e.Duration = p.now().Sub(e.Start)
		if why := l.why(); why != "" {
			e.Reason = why
		}
		p.cfg.AccessLog.Add(&e)
	})
}
