package server

import (
	"context"
	"net/netip"
	"sync"

	"google.golang.org/grpc/peer"
)

// Bounds of calls whose caller has not proved himself: each may hold a message of
// maxMessage. One source gets a quarter, so that it cannot shut the others out.
const (
	maxUnproved          = 2048
	maxUnprovedPerSource = maxUnproved / 4
)

// slots count the calls under way of callers who have not proved themselves.
type slots struct {
	total, perSource int

	mu     sync.Mutex
	all    int
	source map[netip.Prefix]int
}

func newSlots(total, perSource int) *slots {
	return &slots{total: total, perSource: perSource, source: map[netip.Prefix]int{}}
}

// enter returns what ends the slot, any number of times, or false when there is none.
func (s *slots) enter(from netip.Prefix) (leave func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= s.total || s.source[from] >= s.perSource {
		return nil, false
	}
	s.all++
	s.source[from]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.all--
		if s.source[from]--; s.source[from] == 0 {
			delete(s.source, from)
		}
	}), true
}

// addressSource is what counts as one source of connections: an IPv4 address, or the /64
// of an IPv6 address, which one host may have for itself. Zero if a has no address.
func addressSource(a string) netip.Prefix {
	ap, err := netip.ParseAddrPort(a)
	if err != nil {
		return netip.Prefix{}
	}
	addr := ap.Addr().Unmap().WithZone("")
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, err := addr.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

func sourceOf(ctx context.Context) netip.Prefix {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return addressSource(p.Addr.String())
	}
	return netip.Prefix{}
}

type unprovedKey struct{}

// withSlot remembers the slot of a call.
func withSlot(ctx context.Context, leave func()) context.Context {
	return context.WithValue(ctx, unprovedKey{}, leave)
}

// proved gives the slot back: the caller is known, and has limits of his own.
func proved(ctx context.Context) {
	if leave, ok := ctx.Value(unprovedKey{}).(func()); ok {
		leave()
	}
}
