package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"time"

	"castellan.dev/internal/tlsconf"
)

// Protocols negotiated inside the mesh are Istio's.
const (
	alpnIstio        = "istio"
	alpnPeerExchange = "istio-peer-exchange"
	alpnIstioHTTP10  = "istio-http/1.0"
	alpnIstioHTTP11  = "istio-http/1.1"
	alpnIstioH2      = "istio-h2"
	alpnH2           = "h2"
	alpnHTTP11       = "http/1.1"
)

// meshALPNs mark a ClientHello as the mesh's own under PERMISSIVE (authz 32).
func meshALPN(p string) bool {
	switch p {
	case alpnIstio, alpnPeerExchange, alpnIstioHTTP10, alpnIstioHTTP11, alpnIstioH2:
		return true
	}
	return false
}

// errNotMesh says that a ClientHello is not of the mesh: under PERMISSIVE it
// belongs to the application, which terminates TLS itself.
var errNotMesh = errors.New("TLS without an ALPN of the mesh")

// serverTLS holds one immutable configuration per protocol that may be
// negotiated. Certificate and trust are asked for at each handshake, so neither
// a new certificate nor a new bundle needs a new configuration.
type serverTLS struct {
	byALPN map[string]*tls.Config
	none   *tls.Config
}

func newServerTLS(cert tlsconf.Certificate, v *tlsconf.Verifier) *serverTLS {
	s := &serverTLS{byALPN: map[string]*tls.Config{}, none: tlsconf.ServerConfig(cert, v, tlsconf.ServerOptions{})}
	// istio-peer-exchange is recognised and never chosen: it promises a
	// preamble on the connection, which this proxy does not send.
	for _, p := range []string{alpnIstio, alpnIstioHTTP10, alpnIstioHTTP11, alpnIstioH2, alpnH2, alpnHTTP11} {
		s.byALPN[p] = tlsconf.ServerConfig(cert, v, tlsconf.ServerOptions{NextProtos: []string{p}})
	}
	return s
}

// choose picks the client's first protocol that fits what the port speaks; any
// ALPN or none is taken, and then none is negotiated. What is served is decided
// by the receiver's port, not by this.
func (s *serverTLS) choose(hello *tls.ClientHelloInfo, speaks protocol) *tls.Config {
	for _, p := range hello.SupportedProtos {
		if speaks == speaksTCP && p != alpnIstio {
			continue
		}
		if cfg := s.byALPN[p]; cfg != nil {
			return cfg
		}
	}
	return s.none
}

// base returns a configuration whose choice is made when the ClientHello is
// there; admit may refuse it.
func (s *serverTLS) base(speaks protocol, admit func(*tls.ClientHelloInfo) error) *tls.Config {
	cfg := s.none.Clone()
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if admit != nil {
			if err := admit(hello); err != nil {
				return nil, err
			}
		}
		return s.choose(hello, speaks), nil
	}
	return cfg
}

// strict holds a prepared configuration per kind of port.
type strictTLS [speaksTCP + 1]*tls.Config

func (s *serverTLS) strict() (out strictTLS) {
	for speaks := range out {
		out[speaks] = s.base(protocol(speaks), nil)
	}
	return out
}

// handshake performs a TLS handshake on what was wrapped by slotted, under the
// limits on time and on how many are computed at once.
func (p *Proxy) handshake(ctx context.Context, conn *tls.Conn, slot *slotted) error {
	timeout := p.cfg.Proxy.Limits.HandshakeTimeout.Or(5 * time.Second)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	slot.giveUp = ctx.Done()
	err := conn.HandshakeContext(ctx)
	slot.end()
	if err != nil {
		return err
	}
	p.metrics.handshake.Observe(p.now().Sub(slot.began).Seconds())
	return nil
}

var errBusy = errors.New("too many handshakes in flight")

// slotted is a connection under handshake. A slot bounds what handshakes compute
// at the same time, so one is held only from when bytes of the peer are there to
// when more are waited for: who sends none, or stops halfway, holds no one up.
type slotted struct {
	net.Conn
	slots  chan struct{}
	giveUp <-chan struct{}
	now    func() time.Time
	// began is when the first bytes came.
	began      time.Time
	held, over bool
}

func (p *Proxy) slotted(conn net.Conn) *slotted {
	return &slotted{Conn: conn, slots: p.handshakes, now: p.now}
}

// Read waits for bytes without a slot, and then for a slot.
func (c *slotted) Read(b []byte) (int, error) {
	if c.over {
		return c.Conn.Read(b)
	}
	c.free()
	n, err := c.Conn.Read(b)
	if n == 0 {
		return n, err
	}
	if c.began.IsZero() {
		c.began = c.now()
	}
	select {
	case c.slots <- struct{}{}:
		c.held = true
	default:
		select {
		case c.slots <- struct{}{}:
			c.held = true
		case <-c.giveUp:
			return 0, errBusy
		}
	}
	return n, err
}

func (c *slotted) free() {
	if c.held {
		c.held = false
		<-c.slots
	}
}

// end: the handshake is over, one way or the other.
func (c *slotted) end() {
	c.free()
	c.over, c.slots, c.giveUp, c.now = true, nil, nil, nil
}

// NetConn returns the connection underneath.
func (c *slotted) NetConn() net.Conn { return c.Conn }

// CloseWrite ends our direction.
func (c *slotted) CloseWrite() error { return closeWrite(c.Conn) }

// refusalOf names why a handshake failed.
func refusalOf(err error) string {
	var record tls.RecordHeaderError
	switch {
	case errors.Is(err, errBusy):
		return refusedBusy
	case errors.As(err, &record):
		return refusedPlaintext
	default:
		return refusedHandshake
	}
}

// helloConn remembers what it reads until the ClientHello has been judged, and
// swallows what the refusing handshake would write, so that a connection that is
// not the mesh's can be handed on from its first byte.
type helloConn struct {
	net.Conn
	seen    []byte
	decided bool
	replay  []byte
}

func (c *helloConn) Read(b []byte) (int, error) {
	if len(c.replay) > 0 {
		n := copy(b, c.replay)
		c.replay = c.replay[n:]
		return n, nil
	}
	n, err := c.Conn.Read(b)
	if !c.decided {
		// crypto/tls bounds a ClientHello at 64 KiB, and with it this.
		c.seen = append(c.seen, b[:n]...)
	}
	return n, err
}

func (c *helloConn) Write(b []byte) (int, error) {
	if !c.decided {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// mesh: the connection is ours, from here on it is only passed through.
func (c *helloConn) mesh() { c.decided, c.seen = true, nil }

// foreign: everything is read again from the start.
func (c *helloConn) foreign() { c.decided, c.replay, c.seen = true, c.seen, nil }

// NetConn returns the connection underneath.
func (c *helloConn) NetConn() net.Conn { return c.Conn }

// CloseWrite ends our direction.
func (c *helloConn) CloseWrite() error { return closeWrite(c.Conn) }

// permissive performs the handshake if the ClientHello is the mesh's; else it
// returns errNotMesh, the name asked for, and the connection to read afresh.
func (p *Proxy) permissive(ctx context.Context, conn net.Conn, speaks protocol) (secured *tls.Conn, plain net.Conn, sni string, err error) {
	slot := p.slotted(conn)
	hello := &helloConn{Conn: slot}
	cfg := p.serverTLS.base(speaks, func(h *tls.ClientHelloInfo) error {
		sni = h.ServerName
		if !slices.ContainsFunc(h.SupportedProtos, meshALPN) {
			return errNotMesh
		}
		hello.mesh()
		return nil
	})
	secured = tls.Server(hello, cfg)
	err = p.handshake(ctx, secured, slot)
	if errors.Is(err, errNotMesh) {
		hello.foreign()
		return nil, hello, sni, errNotMesh
	}
	return secured, nil, "", err
}
