package webhook

import (
	"context"
	"slices"
	"sync"
)

// turns are the places of what is computed at once. As with room, the address that
// holds least comes first, and none has more than its share.
type turns struct {
	mu      sync.Mutex
	taken   int
	held    map[string]int // by address
	waiting []*turn        // who came first is first
}

type turn struct {
	source  string
	granted chan struct{}
}

func newTurns() *turns { return &turns{held: map[string]int{}} }

// take waits for a place, until ctx ends; release gives it back.
func (t *turns) take(ctx context.Context, source string) (release func(), err error) {
	w := &turn{source: source, granted: make(chan struct{})}
	t.mu.Lock()
	t.waiting = append(t.waiting, w)
	t.grant()
	t.mu.Unlock()
	select {
	case <-w.granted:
		return func() { t.leave(w) }, nil
	case <-ctx.Done():
		t.leave(w) // whether granted meanwhile or not
		return nil, ctx.Err()
	}
}

func (t *turns) leave(w *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := slices.Index(t.waiting, w); i >= 0 {
		t.waiting = slices.Delete(t.waiting, i, i+1)
		return
	}
	t.taken--
	if t.held[w.source]--; t.held[w.source] == 0 {
		delete(t.held, w.source)
	}
	t.grant()
}

// grant gives out the places that are free. The caller holds mu.
func (t *turns) grant() {
	for t.taken < maxWorked {
		next := -1
		for i, w := range t.waiting {
			if n := t.held[w.source]; n < maxWorkedBySource && (next < 0 || n < t.held[t.waiting[next].source]) {
				next = i
			}
		}
		if next < 0 {
			return
		}
		w := t.waiting[next]
		t.waiting = slices.Delete(t.waiting, next, next+1)
		t.taken++
		t.held[w.source]++
		close(w.granted)
	}
}
