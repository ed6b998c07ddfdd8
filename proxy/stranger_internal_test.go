package proxy

import (
	"net"
	"net/netip"
	"testing"
)

// A source cannot take the places of others by being many strangers, and places
// are given back however a connection ends.
func TestStrangersOfOneSource(t *testing.T) {
	l := limits{total: 200, perSource: 50}
	attacker, honest := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	pipe := func() net.Conn { a, b := net.Pipe(); b.Close(); return a }

	waits, dropped, reason := l.admit(honest, pipe())
	if dropped != nil || reason != "" {
		t.Fatal("the first was not let in", reason)
	}
	var places []*place
	for i := range 1000 {
		p, gone, reason := l.admit(attacker, pipe())
		if reason != "" && p == nil {
			t.Fatalf("%d: %s", i, reason)
		}
		if i >= 37 && (len(gone) != 1 || gone[0] != places[i-37].conn) {
			t.Fatalf("%d: it was not the oldest that went", i)
		}
		places = append(places, p)
	}
	if l.open != 38 || l.sources[attacker].open != 37 || l.strangers.Len() != 38 {
		t.Fatalf("%d open, %d of the attacker's, %d strangers", l.open, l.sources[attacker].open, l.strangers.Len())
	}
	if waits.released {
		t.Fatal("another source's stranger gave way")
	}
	// Those who proved who they are never give way.
	for range 50 {
		p, _, reason := l.admit(honest, pipe())
		if p == nil {
			t.Fatal(reason)
		}
		p.settle()
	}
	if !waits.released {
		t.Fatal("at its source's limit the stranger stayed")
	}
	if p, gone, reason := l.admit(honest, pipe()); p != nil || gone != nil || reason != refusedSource {
		t.Fatalf("past the limit: %v %q", gone, reason)
	}
	for _, p := range places {
		p.release()
		p.release()
	}
	waits.release()
	if l.open != 50 || l.strangers.Len() != 0 || len(l.sources) != 1 {
		t.Fatalf("%d open, %d strangers, %d sources", l.open, l.strangers.Len(), len(l.sources))
	}
}

// Where all places are taken, whoever holds most gives up what is idle or nobody's, and
// who holds little loses nothing.
func TestGreedyGiveWay(t *testing.T) {
	l := limits{total: 256, perSource: 100}
	pipe := func() net.Conn { a, b := net.Pipe(); b.Close(); return a }
	take := func(source string, idle, proved bool) *place {
		t.Helper()
		p, _, reason := l.admit(netip.MustParseAddr(source), pipe())
		if p == nil {
			t.Fatal(reason)
		}
		p.settle()
		if proved {
			p.prove()
		}
		p.idles(func() bool { return idle })
		return p
	}
	var mesh, busy []*place
	for range 30 { // a gateway's
		mesh = append(mesh, take("10.0.0.1", false, true))
	}
	for range 80 {
		busy = append(busy, take("10.0.0.2", false, true))
	}
	anonymous := []*place{take("10.0.0.3", false, false)}
	idle := []*place{take("10.0.0.3", true, true)}
	for range 70 {
		anonymous = append(anonymous, take("10.0.0.3", false, false))
	}
	for range 74 {
		take("10.0.0.4", false, false)
	}
	if l.open != 256 {
		t.Fatalf("%d open", l.open)
	}
	released := func(what string, want int, places []*place) {
		t.Helper()
		got := 0
		for i, p := range places {
			if p.released {
				if got++; i >= want {
					t.Errorf("%s: %d went before an older one", what, i)
				}
			}
		}
		if got != want {
			t.Errorf("%s: %d gave way, want %d", what, got, want)
		}
	}
	// The busiest peer with a certificate keeps its own; the next greedy one pays, and
	// more than one at once, as looking costs.
	newcomer, gone, reason := l.admit(netip.MustParseAddr("10.0.0.5"), pipe())
	if newcomer == nil || len(gone) != 2 {
		t.Fatalf("%d made room, %q", len(gone), reason)
	}
	if l.sources[netip.MustParseAddr("10.0.0.4")].open != 72 || l.open != 255 {
		t.Errorf("%d open", l.open)
	}
	for range 4 { // one that is free, then from who holds most now
		take("10.0.0.5", false, true)
	}
	released("nothing in flight", 1, idle)
	released("nobody's", 1, anonymous)
	for l.open < 256 {
		take("10.0.0.5", false, true)
	}
	// Who holds most of all drives nobody out, not even a stranger.
	if p, gone, reason := l.admit(netip.MustParseAddr("10.0.0.2"), pipe()); p != nil || len(gone) > 0 || reason != refusedTotal {
		t.Errorf("let in: %d gone, %q", len(gone), reason)
	}
	if newcomer.released {
		t.Error("a stranger of another was driven out")
	}
	released("who proved himself and is busy", 0, busy)
	released("who holds little", 0, mesh)
}
