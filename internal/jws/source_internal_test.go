package jws

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func someKeys(t *testing.T, mark int) *KeySet {
	t.Helper()
	set, err := ParseJWKS(fmt.Appendf(nil, `{"keys":[],"mark":%d}`, mark))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func testRemote(load func(context.Context) (*KeySet, error)) *Remote {
	r := &Remote{log: slog.New(slog.DiscardHandler)}
	r.source = newSource("jwks:https://x.test", nil, load)
	return r
}

// TestSchedule holds rule 28 of docs/conformance.md: every 20 minutes; after a failure 1
// minute, doubling to 60.
func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var mu sync.Mutex
		var at []time.Duration
		var failing atomic.Bool
		r := testRemote(func(context.Context) (*KeySet, error) {
			mu.Lock()
			defer mu.Unlock()
			at = append(at, time.Since(start))
			if failing.Load() {
				return nil, errors.New("down")
			}
			return someKeys(t, 1), nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		check := func(what string, want ...time.Duration) {
			t.Helper()
			mu.Lock()
			defer mu.Unlock()
			if fmt.Sprint(at) != fmt.Sprint(want) {
				t.Errorf("%s: loads at %v, want %v", what, at, want)
			}
			at = nil
		}
		const m = time.Minute
		time.Sleep(41 * m)
		synctest.Wait()
		check("authz-28 good", 0, 20*m, 40*m)
		failing.Store(true)
		time.Sleep(5 * time.Hour)
		synctest.Wait()
		check("authz-28 failing", 60*m, 61*m, 63*m, 67*m, 75*m, 91*m, 123*m, 183*m, 243*m, 303*m)
		if keys, err := r.Keys(); err != nil || keys == nil {
			t.Errorf("the last good set is gone: %v", err)
		}
		if r.Err() == nil {
			t.Error("the failure does not show")
		}
		failing.Store(false)
		time.Sleep(85 * m)
		synctest.Wait()
		check("authz-28 good again", 363*m, 383*m, 403*m, 423*m)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// TestRefetch: callers share one fetch, and forged kids do not become load.
func TestRefetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var loads atomic.Int32
		r := testRemote(func(context.Context) (*KeySet, error) {
			loads.Add(1)
			time.Sleep(time.Second)
			return someKeys(t, 1), nil
		})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if err := r.Refetch(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := loads.Load(); n != 1 {
			t.Fatalf("50 callers at once: %d fetches", n)
		}
		for range 600 { // a minute of forged kids
			if err := r.Refetch(t.Context()); err != nil {
				t.Error(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := loads.Load(); n > 8 {
			t.Errorf("a minute of forged kids: %d fetches", n)
		}
	})
}

func TestRefetchCallerGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := testRemote(func(ctx context.Context) (*KeySet, error) {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(3 * time.Second):
				return someKeys(t, 1), nil
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.Refetch(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		if err := r.Refetch(t.Context()); err != nil {
			t.Fatalf("another caller's fetch ended with the first one: %v", err)
		}
	})
}

func TestChanges(t *testing.T) {
	mark, failure := 1, error(nil)
	r := testRemote(func(context.Context) (*KeySet, error) { return someKeys(t, mark), failure })
	if _, err := r.Keys(); err == nil || !strings.Contains(err.Error(), "not fetched yet") {
		t.Fatalf("before the first fetch: %v", err)
	}
	step := func(what string, want bool) *KeySet {
		t.Helper()
		changed := r.Changed()
		_ = r.refresh(t.Context())
		select {
		case <-changed:
			if !want {
				t.Errorf("%s: a change was announced", what)
			}
		default:
			if want {
				t.Errorf("%s: no change was announced", what)
			}
		}
		keys, _ := r.Keys()
		return keys
	}
	first := step("first", true)
	if again := step("the same", false); again != first {
		t.Error("the same content is another set: what was verified is forgotten for nothing")
	}
	failure = errors.New("down")
	if kept := step("failure", true); kept != first {
		t.Error("the last good set is gone")
	}
	step("the same failure", false)
	failure, mark = nil, 2
	if next := step("another set", true); next == first || r.Err() != nil {
		t.Error("the new set does not count")
	}
}
