package server

import (
	"fmt"
	"testing"
	"time"
)

func mustLimiter(t *testing.T, l Limits) *limiter {
	t.Helper()
	li, err := newLimiter(l)
	if err != nil {
		t.Fatal(err)
	}
	return li
}

// TestDefaultBuckets: a burst of 100 per pod, then 2 per second.
func TestDefaultBuckets(t *testing.T) {
	l := mustLimiter(t, Limits{})
	now := time.Unix(1_800_000_000, 0)
	for i := range 100 {
		if _, scope := l.take("pod", kindX509, now); scope != "" {
			t.Fatalf("request %d of the burst refused", i)
		}
	}
	wait, scope := l.take("pod", kindX509, now)
	if scope != "pod" || wait != 500*time.Millisecond {
		t.Fatalf("%q, wait %v", scope, wait)
	}
	if _, scope := l.take("other", kindX509, now); scope != "" {
		t.Fatal("another pod is refused")
	}
	passed := 0
	for i := range 1000 {
		if _, scope := l.take("pod", kindX509, now.Add(time.Duration(i)*10*time.Millisecond)); scope == "" {
			passed++
		}
	}
	if passed != 19 { // 9.99 s at 2/s
		t.Errorf("%d passed in 10 s, want 19", passed)
	}
	if _, scope := l.take("pod", kindX509, now.Add(time.Hour)); scope != "" {
		t.Error("a rested pod is refused")
	}
}

func TestOverallRefusalCountsNothing(t *testing.T) {
	l := mustLimiter(t, Limits{PodBurst: 2, PodPerSecond: 0.001, TotalBurst: 1, TotalPerSecond: 1})
	now := time.Unix(1_800_000_000, 0)
	l.take("a", kindX509, now)
	for range 10 {
		if _, scope := l.take("b", kindX509, now); scope != "total" {
			t.Fatalf("scope %q", scope)
		}
	}
	for i := range 2 {
		if _, scope := l.take("b", kindX509, now.Add(time.Duration(i+1)*time.Second)); scope != "" {
			t.Fatalf("b paid for refusals: %q", scope)
		}
	}
}

func TestBucketsAreBounded(t *testing.T) {
	l := mustLimiter(t, Limits{TotalBurst: 1 << 30, TotalPerSecond: 1e9})
	now := time.Unix(1_800_000_000, 0)
	for i := range 300_000 {
		// A thousand pods per second, each once: all but the last are full again.
		l.take(fmt.Sprint("pod-", i), kindX509, now.Add(time.Duration(i)*time.Millisecond))
	}
	if n := len(l.podFull); n > 4096 {
		t.Errorf("%d buckets kept", n)
	}
	l = mustLimiter(t, Limits{PodPerSecond: 0.0001, TotalBurst: 1 << 30, TotalPerSecond: 1e9})
	refused := 0
	for i := range maxBuckets + 10 {
		if _, scope := l.take(fmt.Sprint("pod-", i), kindX509, now); scope != "" {
			refused++
		}
	}
	if refused != 10 || len(l.podFull) != maxBuckets {
		t.Errorf("%d refused, %d buckets kept", refused, len(l.podFull))
	}
	if _, scope := l.take("pod-0", kindX509, now); scope != "" {
		t.Error("a known pod is refused because of others")
	}
}

func TestClockStepsBack(t *testing.T) {
	l := mustLimiter(t, Limits{})
	now := time.Unix(1_800_000_000, 0)
	l.take("pod", kindX509, now)
	for i := range 100 {
		if _, scope := l.take("pod", kindX509, now.Add(-24*time.Hour)); scope != "" {
			t.Fatalf("request %d refused after the clock stepped back", i)
		}
	}
}

// TestTokensDoNotStarveCertificates: each kind of identity has a bucket of its own.
func TestTokensDoNotStarveCertificates(t *testing.T) {
	l := mustLimiter(t, Limits{PodBurst: 3, PodPerSecond: 0.01})
	now := time.Unix(1_800_000_000, 0)
	for range 10 {
		l.take("pod", kindJWT, now)
	}
	if _, scope := l.take("pod", kindJWT, now); scope != "pod" {
		t.Fatalf("tokens: scope %q", scope)
	}
	if wait, scope := l.take("pod", kindX509, now); scope != "" {
		t.Fatalf("a certificate waits %v (%s) for tokens", wait, scope)
	}
}
