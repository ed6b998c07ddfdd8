package svid_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
	"castellan.dev/identity"
)

// minter mints tokens that are none, without a network.
type minter struct {
	mu       sync.Mutex
	err      error
	delay    time.Duration
	ttl      time.Duration
	asked    [][]string
	inFlight atomic.Int32
	most     atomic.Int32
}

func (m *minter) MintJWT(_ context.Context, w identity.Workload, _ caclient.Credential, audience []string) (*caclient.JWT, error) {
	m.most.Store(max(m.most.Load(), m.inFlight.Add(1)))
	defer m.inFlight.Add(-1)
	m.mu.Lock()
	m.asked = append(m.asked, audience)
	err, delay, ttl := m.err, m.delay, m.ttl
	m.mu.Unlock()
	time.Sleep(delay)
	if err != nil {
		return nil, err
	}
	return &caclient.JWT{ID: w.ID(), Received: time.Now(), Expires: time.Now().Add(ttl)}, nil
}

func (m *minter) set(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

func (m *minter) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.asked)
}

func TestJWTs(t *testing.T) {
	bubble := func(name string, f func(t *testing.T, m *minter, j *svid.JWTs)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, source := rotate(t, newIssuer(t, time.Hour), nil)
				m := &minter{ttl: 5 * time.Minute}
				f(t, m, r.JWTs(source, m))
			})
		})
	}
	fetch := func(t *testing.T, j *svid.JWTs, audience ...string) *caclient.JWT {
		t.Helper()
		jwt, err := j.Fetch(t.Context(), audience)
		if err != nil {
			t.Fatal(err)
		}
		return jwt
	}
	bubble("are cached by audience until half of their life", func(t *testing.T, m *minter, j *svid.JWTs) {
		first := fetch(t, j, "a", "b")
		if fetch(t, j, "b", "a", "b") != first {
			t.Error("the same audience was minted twice")
		}
		if fetch(t, j, "a") == first || fetch(t, j, "a\x00b") == first {
			t.Error("another audience was answered with this one's")
		}
		if !slices.Equal(m.asked[0], []string{"a", "b"}) {
			t.Errorf("asked %q", m.asked[0])
		}
		time.Sleep(149 * time.Second)
		if fetch(t, j, "a", "b") != first {
			t.Error("minted again before half of its life")
		}
		time.Sleep(2 * time.Second)
		if fetch(t, j, "a", "b") == first {
			t.Error("not minted again after half of its life")
		}
	})
	bubble("last good is served until it expires", func(t *testing.T, m *minter, j *svid.JWTs) {
		first := fetch(t, j, "a")
		m.set(errors.New("away"))
		time.Sleep(4 * time.Minute)
		for range 10 {
			if fetch(t, j, "a") != first {
				t.Fatal("another token")
			}
		}
		if m.count() != 2 {
			t.Errorf("%d requests: the server that is away was asked for every call", m.count())
		}
		time.Sleep(time.Minute)
		if _, err := j.Fetch(t.Context(), []string{"a"}); err == nil || err.Error() != "away" {
			t.Errorf("an expired token is answered: %v", err)
		}
		m.set(nil)
		time.Sleep(2 * time.Second)
		fetch(t, j, "a")
	})
	bubble("one request is in flight", func(t *testing.T, m *minter, j *svid.JWTs) {
		m.delay = time.Second
		var wg sync.WaitGroup
		for n := range 20 {
			wg.Go(func() { fetch(t, j, fmt.Sprint("aud-", n%4)) })
		}
		wg.Wait()
		if m.count() != 4 || m.most.Load() != 1 {
			t.Errorf("%d requests, %d at once; want 4 and 1", m.count(), m.most.Load())
		}
	})
	bubble("a caller who leaves does not end it for the others", func(t *testing.T, m *minter, j *svid.JWTs) {
		m.delay = time.Second
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := j.Fetch(ctx, []string{"a"}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
		})
		synctest.Wait()
		fetch(t, j, "a")
		wg.Wait()
		if m.count() != 1 {
			t.Errorf("%d requests", m.count())
		}
	})
	bubble("are bounded", func(t *testing.T, m *minter, j *svid.JWTs) {
		for n := range 300 {
			fetch(t, j, fmt.Sprint(n))
			time.Sleep(time.Millisecond)
		}
		before := m.count()
		fetch(t, j, "299")
		if m.count() != before {
			t.Error("the newest was evicted")
		}
		fetch(t, j, "0")
		if m.count() != before+1 {
			t.Error("the oldest was kept")
		}
	})
}
