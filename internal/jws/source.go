package jws

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// refetchEvery bounds how often an unknown kid makes a source fetch.
const refetchEvery = 10 * time.Second

// source is what remote sources and files share: the last good key set, who
// waits for the next, and at most one load at a time.
type source struct {
	name string
	load func(ctx context.Context) (*KeySet, error)
	now  func() time.Time

	state atomic.Pointer[sourceState]

	mu       sync.Mutex
	flight   chan struct{} // closed when the load under way ends; nil: none is
	changed  chan struct{}
	lastLoad time.Time
}

// sourceState is immutable.
type sourceState struct {
	keys *KeySet // last good
	err  error   // of the last load
}

// newSource returns a source that has loaded nothing. load must end by itself.
func newSource(name string, now func() time.Time, load func(context.Context) (*KeySet, error)) *source {
	if now == nil {
		now = time.Now
	}
	s := &source{name: name, load: load, now: now, changed: make(chan struct{})}
	s.state.Store(&sourceState{err: errors.New("jws: " + name + ": not fetched yet")})
	return s
}

// Keys returns the last good set, or why there is none.
func (s *source) Keys() (*KeySet, error) {
	st := s.state.Load()
	if st.keys == nil {
		return nil, st.err
	}
	return st.keys, nil
}

// Err returns why the last fetch failed, nil after a good one.
func (s *source) Err() error { return s.state.Load().err }

// Changed returns a channel that is closed at the next change of Keys or Err.
func (s *source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Refetch fetches now, for a token of an unknown key. Callers at the same time
// share one fetch, and one that comes too soon after the last returns at once:
// forged kids must not turn into load on the issuer. A caller that gives up does
// not end the fetch, because others may wait for it.
func (s *source) Refetch(ctx context.Context) error {
	flight, mine := s.enter(refetchEvery)
	if flight == nil {
		return s.Err()
	}
	if mine {
		go s.fly(context.WithoutCancel(ctx), flight)
	}
	select {
	case <-flight:
		return s.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// refresh loads now, or waits for the load under way.
func (s *source) refresh(ctx context.Context) error {
	flight, mine := s.enter(0)
	if mine {
		s.fly(ctx, flight)
	}
	select {
	case <-flight:
		return s.Err()
	case <-ctx.Done(): // a Refetch's goes on without us
		return ctx.Err()
	}
}

// enter joins the load under way or begins one, which the caller must then fly.
// It returns nil when a load ended less than `within` ago.
func (s *source) enter(within time.Duration) (flight chan struct{}, mine bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flight != nil {
		return s.flight, false
	}
	if within > 0 && !s.lastLoad.IsZero() {
		// A clock that stepped back must not stop refetching.
		if since := s.now().Sub(s.lastLoad); since >= 0 && since < within {
			return nil, false
		}
	}
	s.flight = make(chan struct{})
	return s.flight, true
}

func (s *source) fly(ctx context.Context, flight chan struct{}) {
	keys, err := s.load(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastLoad = s.now()
	s.publish(keys, err)
	s.flight = nil
	close(flight)
}

// publish keeps the last good set when err is set. The set's identity changes
// only with its content, so that what was verified with it stays remembered.
func (s *source) publish(keys *KeySet, err error) {
	old := s.state.Load()
	next := &sourceState{keys: keys, err: err}
	if err != nil || old.keys != nil && keys.Version() == old.keys.Version() {
		next.keys = old.keys
	}
	s.state.Store(next)
	if next.keys != old.keys || (next.err == nil) != (old.err == nil) || next.err != nil && next.err.Error() != old.err.Error() {
		close(s.changed)
		s.changed = make(chan struct{})
	}
}
