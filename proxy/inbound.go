package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	"castellan.dev/authz"
	"castellan.dev/internal/judge"
	"castellan.dev/proxy/engine"
)

// inbound is one port of the application: that of a listener in front of it, or
// the one a captured connection was going to.
type inbound struct {
	p *Proxy
	// port is the workload port the listener stands for.
	port uint16
	app  string
	// address is the pod's own that a captured connection was going to; the zero
	// value for a listener's.
	address netip.Addr
	dialer  *net.Dialer
	// http1 and h2 name the application's connections in the engine's pool.
	http1, h2 string
}

func newInbound(p *Proxy, port uint16, app string) *inbound {
	return &inbound{p: p, port: port, app: app, dialer: &p.dialer, http1: app + "|http1", h2: app + "|h2"}
}

// accepted is a connection whose transport has been settled.
type accepted struct {
	conn net.Conn
	// chain is what the peer proved by TLS; empty for plaintext.
	chain []*x509.Certificate
	alpn  string
	sni   string
	// opaque: TLS of the application's own, which is not looked into.
	opaque bool
	// silent: nothing has been said yet, be it in the clear or a ClientHello.
	silent bool
}

// secure settles transport as the mode of the port says.
func (in *inbound) secure(ctx context.Context, conn net.Conn, source netip.AddrPort) func(*place) {
	a, reason, err := in.transport(ctx, conn, source)
	if err != nil {
		in.p.refuse(inboundSide, reason, source, err)
		conn.Close()
		return nil
	}
	return func(held *place) { in.serve(ctx, a, source, held) }
}

func (in *inbound) transport(ctx context.Context, conn net.Conn, source netip.AddrPort) (*accepted, string, error) {
	st := in.p.store.load()
	speaks := judge.ProtocolOf(st.declared(in.port))
	switch st.mode(in.port) {
	case authz.ModeDisable:
		return &accepted{conn: conn}, "", nil
	case authz.ModePermissive:
		return in.either(ctx, conn, speaks, source)
	}
	slot := in.p.slotted(conn)
	secured := tls.Server(slot, in.p.strict[speaks])
	if err := in.p.handshake(ctx, secured, slot); err != nil {
		return nil, refusalOf(err), err
	}
	return settled(secured), "", nil
}

func settled(secured *tls.Conn) *accepted {
	cs := secured.ConnectionState()
	return &accepted{conn: secured, chain: cs.PeerCertificates, alpn: cs.NegotiatedProtocol, sni: cs.ServerName}
}

// either tells TLS of the mesh, TLS of the application and plaintext apart (authz 32).
func (in *inbound) either(ctx context.Context, conn net.Conn, speaks protocol, source netip.AddrPort) (*accepted, string, error) {
	first := &prefixConn{Conn: conn}
	began, something := in.p.now(), func(b []byte) bool { return len(b) > 0 }
	err := first.fill(something, began.Add(min(in.p.firstByte, quiet)))
	if timedOut(err) {
		if in.mayServerSpeak(in.subject(first, source, "")) {
			return &accepted{conn: first, silent: true}, "", first.SetReadDeadline(time.Time{})
		}
		err = first.fill(something, began.Add(in.p.firstByte))
	}
	switch {
	case timedOut(err) && speaks == speaksTCP:
		// Policy judges the peer as the anonymous one it is.
		return &accepted{conn: first}, "", first.SetReadDeadline(time.Time{})
	case err != nil:
		return nil, refusedTimeout, err
	}
	return in.eitherTLS(ctx, first, speaks)
}

// eitherTLS does it where the first byte is there.
func (in *inbound) eitherTLS(ctx context.Context, first *prefixConn, speaks protocol) (*accepted, string, error) {
	if first.length == 0 || first.prefix[0] != recordHandshake {
		return &accepted{conn: first}, "", nil
	}
	secured, plain, sni, err := in.p.permissive(ctx, first, speaks)
	if errors.Is(err, errNotMesh) {
		return &accepted{conn: plain, sni: sni, opaque: true}, "", nil
	}
	if err != nil {
		return nil, refusalOf(err), err
	}
	return settled(secured), "", nil
}

// mayServerSpeak reports whether a peer may be served before it has said anything:
// the port may carry bytes of any kind, and policy lets the peer have them.
func (in *inbound) mayServerSpeak(subject authz.Peer) bool {
	st := in.p.store.load()
	speaks := judge.ProtocolOf(st.declared(in.port))
	return (speaks == speaksTCP || speaks == undeclared && !st.wantsHTTP(in.port)) && in.p.authorizeTCP(st, subject).Allowed
}

// subject is what policy judges of a connection, but for who it is.
func (in *inbound) subject(conn net.Conn, source netip.AddrPort, sni string) authz.Peer {
	to := in.address
	if !to.IsValid() {
		to = addrPort(conn.LocalAddr()).Addr()
	}
	return authz.Peer{SourceIP: source.Addr(), DestinationIP: to, DestinationPort: in.port, SNI: sni}
}

// serve registers the connection, tells its protocol and hands it on.
func (in *inbound) serve(ctx context.Context, a *accepted, source netip.AddrPort, held *place) {
	l := &live{side: inboundSide, port: in.port, chain: a.chain, opaque: a.opaque, subject: in.subject(a.conn, source, a.sni)}
	if len(a.chain) > 0 {
		// The handshake judged the peer; this says who it is.
		peer, err := in.p.verifier.Check(a.chain)
		if err != nil {
			in.p.refuse(inboundSide, refusedIdentity, source, err)
			a.conn.Close()
			return
		}
		l.peer, l.subject.ID = peer, peer.ID
		held.prove()
	}
	held.idles(func() bool { return true }) // until something is said
	speaks, unsaid, err := in.tell(a, l)
	if err != nil {
		reason := refusedTimeout
		if errors.Is(err, errNotHTTP) {
			reason = refusedNotHTTP
		}
		in.p.refuse(inboundSide, reason, source, err)
		a.conn.Close()
		return
	}
	if speaks == speaksTCP {
		held.idles(nil)
		switch speaks = in.serveTCP(ctx, a.conn, l, source, unsaid); speaks {
		case speaksTCP:
			return
		case speaksTLS:
			in.serveTLS(ctx, a, source, held)
			return
		}
		l = l.anew()
	}
	in.count(speaks, l)
	in.serveHTTP(ctx, a.conn, l, speaks == speaksHTTP2, source, held)
}

// serveTLS goes on with a peer that has said nothing until now, and then hello.
func (in *inbound) serveTLS(ctx context.Context, a *accepted, source netip.AddrPort, held *place) {
	first, ok := a.conn.(*prefixConn)
	if !ok {
		a.conn.Close()
		return
	}
	speaks := judge.ProtocolOf(in.p.store.load().declared(in.port))
	secured, reason, err := in.eitherTLS(ctx, first, speaks)
	if err != nil {
		in.p.refuse(inboundSide, reason, source, err)
		a.conn.Close()
		return
	}
	in.serve(ctx, secured, source, held)
}

func (in *inbound) count(speaks protocol, l *live) {
	name := "http1"
	switch speaks {
	case speaksTCP:
		name = "tcp"
	case speaksHTTP2:
		name = "http2"
	}
	security := "plaintext"
	if len(l.chain) > 0 {
		security = "mtls"
	}
	in.p.metrics.conns[inboundSide][name+security].Inc()
}

// tell decides what is spoken: by the port's declaration, and where there is
// none by the first bytes. Within HTTP the version is what was negotiated, or
// else what the first bytes show. unsaid: nothing tells yet, and the connection may
// be carried as bytes as far as policy goes.
func (in *inbound) tell(a *accepted, l *live) (speaks protocol, unsaid bool, err error) {
	st := in.p.store.load()
	declared := judge.ProtocolOf(st.declared(in.port))
	if first, ok := a.conn.(*prefixConn); ok && a.silent {
		first.mayBeTLS, first.late = true, declared == undeclared
		return speaksTCP, true, nil
	}
	switch {
	case declared == speaksTCP || a.opaque:
		return speaksTCP, false, nil
	case declared != undeclared && (a.alpn == alpnH2 || a.alpn == alpnIstioH2):
		return speaksHTTP2, false, nil
	case declared != undeclared && (a.alpn == alpnHTTP11 || strings.HasPrefix(a.alpn, "istio-http/")):
		return speaksHTTP, false, nil
	}
	httpOnly := declared == undeclared && st.wantsHTTP(in.port)
	if httpOnly {
		declared = speaksHTTP // which waits for the client
	}
	wait, mayServe := in.p.firstByte, false
	if declared == undeclared && in.mayServerSpeak(l.subject) {
		// The server may speak first. A proxy that says of its client's bytes that they
		// are no HTTP has waited already.
		wait, mayServe = min(wait, quiet), true
		if a.alpn == alpnIstio {
			wait = 0
		}
	}
	speaks, err = in.p.tellByBytes(&a.conn, declared, wait)
	first, ok := a.conn.(*prefixConn)
	if err != nil || !ok {
		return speaks, false, err
	}
	what := sniff(first.prefix[:first.length])
	if httpOnly && what == sniffedOther {
		return speaks, false, errNotHTTP
	}
	first.late = speaks == speaksTCP && what == sniffedNothing
	return speaks, first.late && mayServe, nil
}

// errNotHTTP: other bytes than HTTP where policy is about HTTP.
var errNotHTTP = errors.New("not http, on an undeclared port that has rules about http")

// tellByBytes replaces *conn by one that gives the bytes read ahead once more. On
// an undeclared port it waits for them no longer than told.
func (p *Proxy) tellByBytes(conn *net.Conn, declared protocol, wait time.Duration) (protocol, error) {
	first, ok := (*conn).(*prefixConn)
	if !ok {
		first = &prefixConn{Conn: *conn}
		*conn = first
	}
	if declared != undeclared {
		// The first byte may be long in coming, the rest of a head may not.
		limit := p.cfg.Proxy.Limits
		err := first.fill(func(b []byte) bool { return len(b) > 0 }, p.now().Add(limit.IdleTimeout.Or(5*time.Minute)))
		if err == nil {
			err = first.fill(func(b []byte) bool { _, sure := isPreface(b); return sure }, p.now().Add(limit.HeaderTimeout.Or(10*time.Second)))
		}
		if yes, _ := isPreface(first.prefix[:first.length]); yes {
			return speaksHTTP2, err
		}
		return speaksHTTP, err
	}
	if wait <= 0 {
		return first.sounds(), nil
	}
	err := first.fill(func(b []byte) bool { return sniff(b) != sniffedNothing }, p.now().Add(wait))
	if timedOut(err) {
		// The server speaks first, or the client is slow: bytes either way.
		return first.sounds(), first.SetReadDeadline(time.Time{})
	}
	return first.sounds(), err
}

// serveHTTP registers before any request is judged, so that each is judged by
// the state of its moment and none is missed by a change.
func (in *inbound) serveHTTP(ctx context.Context, conn net.Conn, l *live, h2 bool, source netip.AddrPort, held *place) {
	s := newInboundSession(in, l, source)
	l.requests = s.rejudge
	served := in.p.inboundEngine.NewConn(conn, h2, s)
	l.closeNow, l.gracefully = served.CloseNow, served.CloseGracefully
	held.idles(func() bool { _, idle := served.IdleSince(); return idle })
	held.cuts(func() { in.p.shed(l) })
	served.Reports(held.holds)
	in.p.watch(l, func() { served.Serve(ctx) })
}

// watch registers l while f runs. A connection that stopped being acceptable
// since it was judged first is closed, by the same judgement as later ones; that
// of policy is f's own to take, after registering.
func (p *Proxy) watch(l *live, f func()) {
	p.registry.add(l)
	defer p.registry.remove(l)
	if reason, err := p.stillAccepted(l, p.store.load()); reason != "" && reason != closedPolicy {
		p.end(l, reason, err)
	}
	f()
}

var _ engine.Session = (*inboundSession)(nil)
