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
		if i >= 37 && gone != places[i-37].conn {
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
