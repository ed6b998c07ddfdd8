package main

import "testing"

func TestHeapOf(t *testing.T) {
	for text, want := range map[string]int64{
		"max\n": 0, "": 0, "-1": 0, "0\n": 0, "268435456\n": 268435456 / 20 * 17, "9223372036854775807": 9223372036854775807 / 20 * 17,
	} {
		if got := heapOf(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
