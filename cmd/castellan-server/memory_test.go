package main

import "testing"

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
