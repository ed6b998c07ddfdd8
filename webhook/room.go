package webhook

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
)

var (
	errTooMany = errors.New("too many reviews at once from one address")
)

// room is what bodies may take up. Nothing tells the API server from others who
// reach the port, so it goes by what each address holds: who holds less comes
// first, and bodies that are still on their way give place to his. A few addresses
// that announce much and send it slowly keep nobody out so.
type room struct {
	mu   sync.Mutex
	held int64
	// sources have what is held and waited for, by address.
	sources map[string]int64
	waiting []*place
	reading []*place // the oldest first
}

// place is one body's.
type place struct {
	room   *room
	source string
	size   int64
	// granted is closed when there is room for it, drop called once to end reading it.
	granted  chan struct{}
	drop     func()
	released bool
}

// take waits until n bytes may be held, or ctx ends. drop, unless nil, makes the
// reading of the body fail.
func (r *room) take(ctx context.Context, source string, n int64, drop func()) (*place, error) {
	p := &place{room: r, source: source, size: max(n, minCharge), granted: make(chan struct{}), drop: drop}
	if !r.queue(p) {
		return nil, errTooMany
	}
	select {
	case <-p.granted:
		return p, nil
	case <-ctx.Done():
	}
	p.release() // whether granted meanwhile or not
	return nil, ctx.Err()
}

// queue has p wait its turn; false if its address has too much already.
func (r *room) queue(p *place) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sources[p.source]+p.size > maxHeldBySource {
		return false
	}
	r.sources[p.source] += p.size
	r.waiting = append(r.waiting, p)
	r.grant()
	if slices.Contains(r.waiting, p) {
		r.makeRoom(p)
	}
	return true
}

// grant lets in who waits, the address that has least first. Who is next and finds
// too little room keeps the others waiting, or large ones would never get in.
func (r *room) grant() {
	slices.SortStableFunc(r.waiting, func(a, b *place) int { return cmp.Compare(r.sources[a.source], r.sources[b.source]) })
	for len(r.waiting) > 0 && r.held+r.waiting[0].size <= maxHeld {
		p := r.waiting[0]
		r.waiting = r.waiting[1:]
		r.held += p.size
		r.reading = append(r.reading, p)
		close(p.granted)
	}
}

// makeRoom ends the reading of others' bodies until p fits: of whoever has most,
// the oldest first, and only of those who have more than p's address.
func (r *room) makeRoom(p *place) {
	missing := r.held + p.size - maxHeld
	for missing > 0 {
		var most *place
		for _, q := range r.reading {
			if q.drop != nil && (most == nil || r.sources[q.source] > r.sources[most.source]) {
				most = q
			}
		}
		if most == nil || r.sources[most.source] <= r.sources[p.source] {
			return
		}
		missing -= most.size
		r.forget(most)
		most.drop()
	}
}

func (r *room) forget(p *place) {
	r.reading = slices.DeleteFunc(r.reading, func(q *place) bool { return q == p })
}

// read: the body is there whole, and is not dropped any more.
func (p *place) read() {
	p.room.mu.Lock()
	defer p.room.mu.Unlock()
	p.room.forget(p)
}

// release gives the room back, once.
func (p *place) release() {
	r := p.room
	r.mu.Lock()
	defer r.mu.Unlock()
	if p.released {
		return
	}
	p.released = true
	select {
	case <-p.granted:
		r.held -= p.size
		r.forget(p)
	default:
		r.waiting = slices.DeleteFunc(r.waiting, func(q *place) bool { return q == p })
	}
	if r.sources[p.source] -= p.size; r.sources[p.source] == 0 {
		delete(r.sources, p.source)
	}
	r.grant()
}
