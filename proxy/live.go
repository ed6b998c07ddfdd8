package proxy

import (
	"crypto/x509"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"castellan.dev/authz"
	"castellan.dev/internal/tlsconf"
)

// Why a live connection is closed, constant for logs and metrics.
const (
	closedUntrusted = "peer_not_trusted"
	closedRevoked   = "peer_revoked"
	closedPolicy    = "policy"
	closedMode      = "mtls_mode"
	closedIdentity  = "identity_not_expected"
	closedExpired   = "peer_certificate_expired"
	closedIdle      = "idle"
	closedDrain     = "drain"
	closedOutbound  = "outbound_policy"
	closedCrowded   = "crowded_out"
	closedMemory    = "memory"
)

// live is one open connection that has to be judged again when what it was
// judged by changes. All but the atomics is set before it is registered.
type live struct {
	side direction
	port uint16
	// chain and peer are what a TLS peer proved; both are empty for plaintext.
	chain []*x509.Certificate
	peer  tlsconf.Peer
	// subject is what inbound policy judges.
	subject authz.Peer
	// tcp: judged as a whole; HTTP is judged request by request.
	tcp bool
	// opaque: TLS of the application's own.
	opaque bool
	// requests judges the requests in flight of an HTTP connection, and ends those
	// that would be refused; nil where policy does not judge them.
	requests func(*state)
	// upstream names the endpoint an outbound connection went to.
	upstream *upstream
	// passing is where bytes are passed on to in the clear, outside the mesh.
	passing netip.AddrPort

	closeNow func()
	// gracefully closes once nothing is in flight; nil means closeNow.
	gracefully func()
	// active is when bytes last went either way, in Unix nanoseconds; TCP only.
	active  atomic.Int64
	reason  atomic.Pointer[string]
	expired atomic.Bool
}

// anew is the same connection before it is registered.
func (l *live) anew() *live {
	return &live{side: l.side, port: l.port, chain: l.chain, peer: l.peer, subject: l.subject, opaque: l.opaque}
}

// because records why the connection is being closed; the first reason stays.
func (l *live) because(reason string) bool { return l.reason.CompareAndSwap(nil, &reason) }

// why is the reason recorded, or "".
func (l *live) why() string {
	if r := l.reason.Load(); r != nil {
		return *r
	}
	return ""
}

// registry holds the live connections.
type registry struct {
	mu   sync.Mutex
	live map[*live]struct{}
}

func (r *registry) add(l *live) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.live == nil {
		r.live = map[*live]struct{}{}
	}
	r.live[l] = struct{}{}
}

func (r *registry) remove(l *live) {
	r.mu.Lock()
	delete(r.live, l)
	r.mu.Unlock()
}

// each visits the connections of now, outside the lock.
func (r *registry) each(visit func(*live)) {
	r.mu.Lock()
	all := make([]*live, 0, len(r.live))
	for l := range r.live {
		all = append(all, l)
	}
	r.mu.Unlock()
	for _, l := range all {
		visit(l)
	}
}

// rejudge judges every live connection by the new state (trust rule 9). A
// connection registers before it reads the state it is first judged by, so
// none falls between.
func (p *Proxy) rejudge() {
	st := p.store.load()
	p.registry.each(func(l *live) {
		if reason, err := p.stillAccepted(l, st); reason != "" {
			p.end(l, reason, err)
		} else if l.requests != nil {
			l.requests(st)
		}
	})
}

// stillAccepted returns why l would not be accepted now, or "".
func (p *Proxy) stillAccepted(l *live, st *state) (string, error) {
	if len(l.chain) > 0 {
		if err := p.verifier.Again(l.chain, l.peer); err != nil {
			if revoked := new(tlsconf.DeniedError); errors.As(err, &revoked) {
				return closedRevoked, err
			}
			return closedUntrusted, err
		}
	}
	if l.side == outboundSide {
		return p.stillExpected(l, st)
	}
	if len(l.chain) == 0 && st.mode(l.port) == authz.ModeStrict {
		return closedMode, nil
	}
	if l.tcp && (!p.authorizeTCP(st, l.subject).Allowed || !l.opaque && st.wantsHTTP(l.port)) {
		return closedPolicy, nil
	}
	return "", nil
}

// end closes a connection and says so once.
func (p *Proxy) end(l *live, reason string, err error) {
	if !l.because(reason) {
		return
	}
	p.metrics.closed.WithLabelValues(l.side.String(), reason).Inc()
	p.log.Info("live connection closed", "direction", l.side.String(), "reason", reason,
		"peer", l.peer.ID.String(), "source", l.subject.SourceIP.String(), "error", err)
	l.closeNow()
}

// sweep looks once a second for what only time brings.
func (p *Proxy) sweep(now time.Time) {
	idle := p.cfg.Proxy.Limits.StreamIdleTimeout.Or(5 * time.Minute)
	p.registry.each(func(l *live) {
		if len(l.chain) > 0 && now.After(l.peer.NotAfter) && l.gracefully != nil && !l.expired.Swap(true) {
			// The decision: HTTP/1 closes after the response, HTTP/2 gets GOAWAY;
			// TCP, which has no gracefully, stays.
			p.metrics.closed.WithLabelValues(l.side.String(), closedExpired).Inc()
			l.gracefully()
		}
		if l.tcp && now.UnixNano()-l.active.Load() > int64(idle) {
			p.end(l, closedIdle, nil)
		}
	})
}
