package proxy

import (
	"cmp"
	"container/list"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
)

// limits bounds connections in total and per source. Those that have not settled
// their transport, strangers, cost a peer nothing: they are bounded apart, and
// the oldest of them is dropped before anybody else is turned away. Who means it
// is a stranger for some milliseconds only. Where all places are taken, whoever
// holds most of them loses some that are idle or nobody's. What requests in flight hold
// is bounded too (held.go).
type limits struct {
	total, perSource int
	// budget is how many bytes requests in flight may hold.
	budget int64
	held   atomic.Int64

	mu        sync.Mutex
	open      int
	sources   map[netip.Addr]*sourceLimits
	strangers list.List // of *place, oldest first
}

// sourceLimits is what one source holds.
type sourceLimits struct {
	open      int
	strangers list.List // of *place, oldest first
	settled   list.List // the same
}

// place is one connection's place. Its fields are under the lock of limits.
type place struct {
	limits *limits
	source netip.Addr
	conn   net.Conn
	// inAll and inSource are its elements among the strangers; nil once settled.
	inAll, inSource *list.Element
	inSettled       *list.Element
	// proved: the peer has a certificate, or is the pod itself.
	proved bool
	// idle reports whether no request is in flight; nil where none can be told.
	idle     func() bool
	released bool

	// held is what its requests in flight hold; cut closes it at once, with them.
	held atomic.Int64
	cut  func()
}

// atOnce is the part of all places that is made free when there are none, so that
// looking for them costs each newcomer little.
const atOnce = 128

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

// admit takes a place for conn, or says why there is none. dropped are those that
// made room, to be closed.
func (l *limits) admit(source netip.Addr, conn net.Conn) (taken *place, dropped []net.Conn, reason string) {
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
	case l.strangers.Len() >= max(l.total/2, fewStrangers):
		dropped, reason = l.drop(&l.strangers), refusedTotal
	case l.open >= l.total:
		if dropped, reason = l.crowdOut(s), refusedTotal; dropped == nil {
			dropped = l.drop(l.strangersOfOthers(s))
		}
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

// crowdOut makes room for somebody of newcomer: of the sources that hold more, the one
// that holds most gives up connections with nothing in flight, the oldest first, and
// then those of peers without a certificate. Nil if nobody has such.
func (l *limits) crowdOut(newcomer *sourceLimits) (dropped []net.Conn) {
	want := max(l.total/atOnce, 1)
	greedy := slices.SortedFunc(maps.Values(l.sources), func(a, b *sourceLimits) int { return cmp.Compare(b.open, a.open) })
	for _, s := range greedy {
		if s.open <= newcomer.open {
			return nil
		}
		for _, gives := range []func(*place) bool{
			func(p *place) bool { return p.idle != nil && p.idle() },
			func(p *place) bool { return !p.proved },
		} {
			for e := s.settled.Front(); e != nil && len(dropped) < want && s.open > newcomer.open; {
				p, _ := e.Value.(*place)
				if e = e.Next(); gives(p) {
					p.leave()
					dropped = append(dropped, p.conn)
				}
			}
		}
		if dropped != nil {
			return dropped
		}
	}
	return nil
}

// strangersOfOthers are those of the oldest stranger's source that holds more than
// newcomer, or newcomer's own.
func (l *limits) strangersOfOthers(newcomer *sourceLimits) *list.List {
	for e := l.strangers.Front(); e != nil; e = e.Next() {
		p, _ := e.Value.(*place)
		if s := l.sources[p.source]; s.open > newcomer.open {
			return &s.strangers
		}
	}
	return &newcomer.strangers
}

// drop gives up the oldest of the strangers in from; nil when there is none.
func (l *limits) drop(from *list.List) []net.Conn {
	oldest := from.Front()
	if oldest == nil {
		return nil
	}
	p, _ := oldest.Value.(*place)
	p.leave()
	return []net.Conn{p.conn}
}

// forget drops what is kept of a source that holds nothing.
func (l *limits) forget(source netip.Addr, s *sourceLimits) {
	if s.open == 0 {
		delete(l.sources, source)
	}
}

// settle: the transport has been settled, so the connection is no stranger's.
func (p *place) settle() {
	p.limits.mu.Lock()
	defer p.limits.mu.Unlock()
	if p.known() {
		p.inSettled = p.limits.sources[p.source].settled.PushBack(p)
	}
}

// prove: the peer has proved who it is.
func (p *place) prove() {
	p.limits.mu.Lock()
	defer p.limits.mu.Unlock()
	p.proved = true
}

// idles says how to tell whether a request is in flight. idle is called under the lock.
func (p *place) idles(idle func() bool) {
	p.limits.mu.Lock()
	defer p.limits.mu.Unlock()
	p.idle = idle
}

// known takes p from among the strangers, and reports whether it was one. The caller
// holds the lock.
func (p *place) known() bool {
	if p.inAll == nil {
		return false
	}
	p.limits.strangers.Remove(p.inAll)
	p.limits.sources[p.source].strangers.Remove(p.inSource)
	p.inAll, p.inSource = nil, nil
	return true
}

// leave gives the place up, once. The caller holds the lock.
func (p *place) leave() {
	if p.released {
		return
	}
	p.released = true
	p.known()
	l, s := p.limits, p.limits.sources[p.source]
	l.held.Add(-p.held.Swap(left))
	if p.inSettled != nil {
		s.settled.Remove(p.inSettled)
		p.inSettled = nil
	}
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
