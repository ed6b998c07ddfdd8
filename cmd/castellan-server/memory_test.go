package main

import (
	"context"
	"runtime"
	"testing"
	"time"
)

func TestGCPercent(t *testing.T) {
	for _, c := range []struct {
		live uint64
		want int
	}{{0, 1600}, {8 << 20, 1200}, {48 << 20, 200}, {96 << 20, 100}, {1 << 30, 100}} {
		if got := gcPercent(c.live); got != c.want {
			t.Errorf("%d bytes alive: %d, want %d", c.live, got, c.want)
		}
	}
}

func TestAfterCollections(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	calls := make(chan struct{}, 100)
	afterCollections(ctx, func() { calls <- struct{}{} })
	for range 3 { // every time, not once
		runtime.GC()
		select {
		case <-calls:
		case <-time.After(20 * time.Second):
			t.Fatal("a collection passed unnoticed")
		}
	}
	cancel()
}
