package crowd

import (
	"net/netip"
	"slices"
	"sync"
)

// Bounds are numbers of what is there at a time.
type Bounds struct{ Total, PerSource int }

// Places are for those of whom nobody knows yet who they are. Safe for concurrent use.
type Places struct {
	bounds Bounds

	mu    sync.Mutex
	all   int
	taken uint64 // ever
	// of has a source's places, the oldest first.
	of map[netip.Addr][]*Place
}

// Place is one's; it is given back by Leave.
type Place struct {
	in     *Places
	source netip.Addr
	number uint64
	evict  func()
}

// NewPlaces returns empty ones.
func NewPlaces(b Bounds) *Places { return &Places{bounds: b, of: map[netip.Addr][]*Place{}} }

// Enter takes a place. At a bound it is that of the oldest of the source, or of the
// source that has most, whose evict is called before Enter returns.
func (p *Places) Enter(source netip.Addr, evict func()) *Place {
	place := &Place{in: p, source: source, evict: evict}
	if evicted := p.enter(place); evicted != nil {
		evicted.evict()
	}
	return place
}

func (p *Places) enter(place *Place) (evicted *Place) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch own := p.of[place.source]; {
	case len(own) >= p.bounds.PerSource:
		evicted = own[0]
	case p.all >= p.bounds.Total:
		evicted = p.greediest()
	}
	if evicted != nil {
		p.remove(evicted)
	}
	p.all++
	p.taken++
	place.number = p.taken
	p.of[place.source] = append(p.of[place.source], place)
	return evicted
}

// greediest is the oldest place of the source that has most, or of all that do.
func (p *Places) greediest() *Place {
	var most []*Place
	for _, own := range p.of {
		if len(own) > len(most) || len(own) == len(most) && own[0].number < most[0].number {
			most = own
		}
	}
	return most[0]
}

// remove reports whether the place was held.
func (p *Places) remove(place *Place) bool {
	own := p.of[place.source]
	at := slices.Index(own, place)
	if at < 0 {
		return false
	}
	p.all--
	if own = slices.Delete(own, at, at+1); len(own) == 0 {
		delete(p.of, place.source)
	} else {
		p.of[place.source] = own
	}
	return true
}

// Leave gives the place back, and reports whether it was still held: false the second
// time, and after it was taken away.
func (p *Place) Leave() bool {
	p.in.mu.Lock()
	defer p.in.mu.Unlock()
	return p.in.remove(p)
}
