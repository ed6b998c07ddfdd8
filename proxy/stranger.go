package proxy

import (
	"container/list"
	"net"
	"net/netip"
	"sync"
)

// limits bounds connections in total and per source. Those that have not settled
// their transport, strangers, cost a peer nothing: they are bounded apart, and
// the oldest of them is dropped before anybody else is turned away. Who means it
// is a stranger for some milliseconds only.
type limits struct {
	total, perSource int

	mu        sync.Mutex
	open      int
	sources   map[netip.Addr]*sourceLimits
	strangers list.List // of *place, oldest first
}

// sourceLimits is what one source holds.
type sourceLimits struct {
	open      int
	strangers list.List // of *place, oldest first
}

// place is one connection's place. Its fields are under the lock of limits.
type place struct {
	limits *limits
	source netip.Addr
	conn   net.Conn
	// inAll and inSource are its elements among the strangers; nil once settled.
	inAll, inSource *list.Element
	released        bool
}

// fewStrangers are let wait at the same time however small the limits are.
const fewStrangers = 16

// Reasons a connection is refused at the door.
const (
	refusedTotal     = "connection_limit"
	refusedSource    = "source_limit"
	refusedHandshake = "handshake_failed"
	refusedBusy      = "handshake_limit"
	refusedPlaintext = "plaintext"
	refusedIdentity  = "peer_not_accepted"
	refusedTimeout   = "first_byte_timeout"
	refusedLate      = "http_late"
	refusedNotHTTP   = "not_http"
	refusedPanic     = "internal_error"
)

// admit takes a place for conn, or says why there is none. dropped is the
// stranger that made room, to be closed.
func (l *limits) admit(source netip.Addr, conn net.Conn) (taken *place, dropped net.Conn, reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sources[source]
	if s == nil {
		if l.sources == nil {
			l.sources = map[netip.Addr]*sourceLimits{}
		}
		s = &sourceLimits{}
		l.sources[source] = s
	}
	// Three quarters of a source's share, half of the whole: what is left is for
	// those who have proved who they are.
	switch {
	case s.open >= l.perSource || s.strangers.Len() >= max(l.perSource*3/4, fewStrangers):
		dropped, reason = l.drop(&s.strangers), refusedSource
	case l.open >= l.total || l.strangers.Len() >= max(l.total/2, fewStrangers):
		dropped, reason = l.drop(&l.strangers), refusedTotal
	}
	if reason != "" && dropped == nil {
		l.forget(source, s)
		return nil, nil, reason
	}
	p := &place{limits: l, source: source, conn: conn}
	l.sources[source] = s // dropping its last may have forgotten it
	l.open++
	s.open++
	p.inAll, p.inSource = l.strangers.PushBack(p), s.strangers.PushBack(p)
	return p, dropped, ""
}

// drop gives up the oldest of the strangers in from; nil when there is none.
func (l *limits) drop(from *list.List) net.Conn {
	oldest := from.Front()
	if oldest == nil {
		return nil
	}
	p, _ := oldest.Value.(*place)
	p.leave()
	return p.conn
}

// forget drops what is kept of a source that holds nothing.
func (l *limits) forget(source netip.Addr, s *sourceLimits) {
	if s.open == 0 {
		delete(l.sources, source)
	}
}

// settle: who is there has been settled, so the connection is no stranger's.
func (p *place) settle() {
	p.limits.mu.Lock()
	defer p.limits.mu.Unlock()
	p.known()
}

// known takes p from among the strangers. The caller holds the lock.
func (p *place) known() {
	if p.inAll == nil {
		return
	}
	p.limits.strangers.Remove(p.inAll)
	p.limits.sources[p.source].strangers.Remove(p.inSource)
	p.inAll, p.inSource = nil, nil
}

// leave gives the place up, once. The caller holds the lock.
func (p *place) leave() {
	if p.released {
		return
	}
	p.released = true
	p.known()
	l, s := p.limits, p.limits.sources[p.source]
	l.open--
	s.open--
	l.forget(p.source, s)
}

// release gives the place up.
func (p *place) release() {
	p.limits.mu.Lock()
	defer p.limits.mu.Unlock()
	p.leave()
}
