package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"sync"

	"castellan.dev/internal/tlsconf"
	"castellan.dev/proxy/engine"
)

// Reasons that an outbound request or connection fails, constant for logs and metrics.
const (
	failedUnknown  = "destination_unknown"
	failedNoOwn    = "no_certificate"
	failedIdentity = "identity_not_expected"
	failedPeer     = "peer_not_accepted"
	failedEmpty    = "no_endpoint"
	failedOutside  = "outside_mesh"
	failedNotYet   = "services_unknown"
	failedLoop     = "own_listener"
)

// maxAttempts bounds the endpoints tried for one connection.
const maxAttempts = 3

// wire is what an outbound connection carries.
type wire uint8

const (
	wireTCP wire = iota
	wireHTTP1
	wireHTTP2
)

// alpns are offered in Istio's order: the protocol within the mesh first.
func (w wire) alpns() []string {
	switch w {
	case wireHTTP1:
		return []string{alpnIstioHTTP11, alpnIstio, alpnHTTP11}
	case wireHTTP2:
		return []string{alpnIstioH2, alpnIstio, alpnH2}
	}
	return []string{alpnIstio}
}

// upstream is a connection to one endpoint whose identity has been checked; or
// one in the clear, outside the mesh.
type upstream struct {
	net.Conn
	// socket is what lies below TLS.
	socket   net.Conn
	p        *Proxy
	live     *live
	port     *servicePort
	endpoint *endpoint
	key      string
	closed   sync.Once
}

// PoolKey is where the engine keeps the connection: with those of the endpoint
// it went to in the end.
func (u *upstream) PoolKey() string { return u.key }

// NetConn returns the socket.
func (u *upstream) NetConn() net.Conn { return u.socket }

// CloseWrite ends our direction.
func (u *upstream) CloseWrite() error { return closeWrite(u.Conn) }

// Close closes the connection.
func (u *upstream) Close() (err error) {
	u.closed.Do(func() {
		u.p.registry.remove(u.live)
		err = u.Conn.Close()
	})
	return err
}

// retire has new requests open new connections to the endpoint, and closes the
// old ones once what they carry has ended.
func (u *upstream) retire() {
	u.endpoint.epoch.Add(1)
	u.p.outboundEngine.DropUpstream(func(key string) bool { return key == u.key })
}

// dial opens a connection to first or, where that cannot be reached, to another
// endpoint of the port; only has it be first or none. An endpoint that is reached
// and is not who was expected fails the connection: another that happens to be
// right must not hide it.
func (out *outbound) dial(ctx context.Context, port *servicePort, first *endpoint, only bool, w wire) (*upstream, *engine.StatusError) {
	p := out.p
	st := p.store.load()
	want := out.wants(st)
	var tried []*endpoint
	e := first
	if e == nil {
		e = port.pick(p.now(), nil, want)
	}
	failure := port.noEndpoint(nil)
	for e != nil && len(tried) < maxAttempts {
		up, err := p.connect(ctx, st, port, e, w)
		if err == nil {
			p.metrics.connects.WithLabelValues("outbound", "ok").Inc()
			e.works()
			return up, nil
		}
		failure = p.connectFailure(ctx, port, e, err)
		p.metrics.connects.WithLabelValues("outbound", failure.Reason).Inc()
		if failure.Reason == failedIdentity || only || ctx.Err() != nil {
			break
		}
		e.failed(p.now())
		tried = append(tried, e)
		e = port.pick(p.now(), tried, want)
	}
	return nil, failure
}

// noEndpoint says why a port can be reached nowhere, or not at the one endpoint
// asked for.
func (p *servicePort) noEndpoint(only *endpoint) *engine.StatusError {
	if only != nil || p.outsideOnly() {
		return &engine.StatusError{Status: 502, Reason: failedOutside}
	}
	return &engine.StatusError{Status: 503, Reason: failedEmpty}
}

// connect opens one connection and registers it.
func (p *Proxy) connect(ctx context.Context, st *state, port *servicePort, e *endpoint, w wire) (*upstream, error) {
	switch {
	case e.outside && !st.plainAllowed():
		return nil, &engine.StatusError{Status: 502, Reason: failedOutside}
	case !e.outside && (st.svid == nil || st.trust == nil):
		return nil, &engine.StatusError{Status: 503, Reason: failedNoOwn}
	case p.captured.loops(e.address):
		return nil, &engine.StatusError{Status: 502, Reason: failedLoop}
	}
	conn, err := p.dialer.DialContext(ctx, "tcp", e.address)
	if err != nil {
		return nil, err
	}
	u := &upstream{Conn: conn, socket: conn, p: p, port: port, endpoint: e}
	u.live = &live{side: outboundSide, upstream: u}
	// The socket itself: a last word of TLS could wait for the peer to take it.
	u.live.closeNow = func() { conn.Close() }
	if w != wireTCP {
		u.key = e.pool(st.serial).key(w)
		u.live.gracefully = u.retire
		u.live.closeNow = func() {
			conn.Close()
			// No request is to find it in the pool.
			u.retire()
		}
	}
	if err := u.secure(ctx, w); err != nil {
		conn.Close()
		return nil, err
	}
	// Registered first and judged then, so that no change falls between.
	p.registry.add(u.live)
	if reason, err := p.stillAccepted(u.live, p.store.load()); reason != "" {
		_ = u.Close()
		return nil, errors.Join(errors.New(reason), err)
	}
	return u, nil
}

// secure shakes hands with who is expected at the endpoint; there is nobody to
// shake hands with outside the mesh.
func (u *upstream) secure(ctx context.Context, w wire) (err error) {
	if u.endpoint.outside {
		return nil
	}
	p := u.p
	secured := tls.Client(u.socket, tlsconf.ClientConfig(p.store.certificate, p.verifier, tlsconf.Expect(u.endpoint.allowed...),
		tlsconf.ClientOptions{ServerName: u.port.sni, NextProtos: w.alpns()}))
	if err := secured.HandshakeContext(ctx); err != nil {
		return err
	}
	u.Conn, u.live.chain = secured, secured.ConnectionState().PeerCertificates
	u.live.peer, err = p.verifier.Check(u.live.chain)
	return err
}

// connectFailure says what a failed connection answers. Who was there and who
// was expected stand in the log and nowhere else.
func (p *Proxy) connectFailure(ctx context.Context, port *servicePort, e *endpoint, err error) *engine.StatusError {
	f := &engine.StatusError{Status: 503, Reason: engine.ReasonDial, Err: err}
	unexpected := new(tlsconf.UnexpectedPeerError)
	refused := new(engine.StatusError)
	verification := new(tls.CertificateVerificationError)
	switch {
	case errors.As(err, &unexpected):
		f.Status, f.Reason = 502, failedIdentity
		if !p.naming.AllowN(p.now(), 1) {
			return f // the access log still says so for each
		}
		p.log.Error("destination is not who is expected there", "service", port.service, "port", port.number, "endpoint", e.address,
			"peer", unexpected.Got.String(), "expected", e.allowed, "service_expects", port.expected)
		return f
	case errors.As(err, &refused):
		f = refused
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		f.Status, f.Reason = 504, engine.ReasonDialTimeout
	case errors.As(err, &verification), isPeerError(err):
		f.Status, f.Reason = 502, failedPeer
	}
	if p.quiet.AllowN(p.now(), 1) {
		p.log.Warn("connecting to a destination failed", "service", port.service, "port", port.number, "endpoint", e.address, "reason", f.Reason, "error", err)
	}
	return f
}

// isPeerError: what is not of the network was the peer's certificate, or ours.
func isPeerError(err error) bool {
	var network net.Error
	return !errors.As(err, &network)
}

// stillExpected judges an outbound connection by the services known now.
func (p *Proxy) stillExpected(l *live, st *state) (string, error) {
	if l.passing.IsValid() && !st.passes(l.passing) {
		return closedOutbound, nil
	}
	u := l.upstream
	if u == nil {
		return "", nil // the application's own side
	}
	e := st.services[u.port.service].port(u.port.number).endpoint(u.endpoint.address)
	switch {
	case e == nil:
		// Not served there any more: what is under way may end.
		if l.gracefully != nil && !l.expired.Swap(true) {
			l.gracefully()
		}
	case u.endpoint.outside:
		if !e.outside || !st.plainAllowed() {
			return closedOutbound, nil
		}
	case !slices.Contains(e.allowed, l.peer.ID):
		return closedIdentity, &tlsconf.UnexpectedPeerError{Got: l.peer.ID, Want: e.allowed}
	}
	return "", nil
}
