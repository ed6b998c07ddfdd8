package crowd_test

import (
	"fmt"
	"io"
	"net"
	"testing"

	"castellan.dev/internal/crowd"
)

// scene is a listener and its connections.
type scene struct {
	t *testing.T
	l net.Listener
}

type pair struct{ client, server net.Conn }

func newScene(t *testing.T, strangers, known crowd.Bounds) *scene {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inner.Close() })
	return &scene{t, crowd.Limit(inner, strangers, known)}
}

func (s *scene) from(source string) pair {
	s.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	client, err := d.Dial("tcp", s.l.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { client.Close() })
	server, err := s.l.Accept()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { server.Close() })
	return pair{client, server}
}

// are asks by a byte sent from the server.
func (s *scene) are(what string, want bool, pairs ...pair) {
	s.t.Helper()
	for i, p := range pairs {
		_, err := p.server.Write([]byte("x"))
		if err == nil {
			_, err = io.ReadFull(p.client, make([]byte, 1))
		}
		if (err == nil) != want {
			s.t.Errorf("%s: connection %d is alive: %t (%v)", what, i, !want, err)
		}
	}
}

// Whoever holds most connections loses the oldest of them to whoever comes: so a
// kubelet is served, though others sit on all places, and its source on all of its.
func TestLimit(t *testing.T) {
	s := newScene(t, crowd.Bounds{Total: 256, PerSource: 32}, crowd.Bounds{})
	from, are := s.from, s.are
	kubelet := from("127.0.0.1")
	var greedy []pair
	for range 32 {
		greedy = append(greedy, from("127.0.1.0"))
	}
	are("at its share", true, greedy...)
	greedy = append(greedy, from("127.0.1.0"))
	are("the oldest of a source above its share", false, greedy[0])
	are("the others of it", true, greedy[1:]...)
	greedy[1].server.Close()
	greedy[1].server.Close() // once counts
	greedy = append(greedy[2:], from("127.0.1.0"))
	are("what was given back is to be had again", true, greedy...)
	greedy = append(greedy, from("127.0.1.0"))
	are("but once", false, greedy[0])
	greedy = greedy[1:]
	are("of 32", true, greedy...)
	var singles []pair
	for i := range 256 - 1 - 32 {
		singles = append(singles, from(fmt.Sprintf("127.0.2.%d", i)))
	}
	are("below the bound of all", true, greedy...)
	for i := range len(greedy) - 1 {
		singles = append(singles, from(fmt.Sprintf("127.0.3.%d", i)))
		are("the oldest of who holds most", false, greedy[i])
	}
	are("who holds little", true, append(singles, kubelet, greedy[len(greedy)-1])...)
	from("127.0.4.0")
	are("the oldest where all hold one", false, kubelet)
	are("the rest", true, singles...)
}

// Who has proved itself is driven out by nobody, and takes no stranger's place; but
// that too has an end.
func TestKnown(t *testing.T) {
	s := newScene(t, crowd.Bounds{Total: 4, PerSource: 2}, crowd.Bounds{Total: 3, PerSource: 2})
	known := func(source string) pair {
		p := s.from(source)
		crowd.Known(p.server)
		crowd.Known(p.server) // once counts
		return p
	}
	agents := []pair{known("127.0.0.1"), known("127.0.0.1"), known("127.0.0.2")}
	var strangers []pair
	for _, source := range []string{"127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"} {
		strangers = append(strangers, s.from(source))
	}
	s.are("within the bounds", true, append(strangers, agents...)...)
	s.from("127.0.0.1")
	s.are("the oldest stranger of the source", false, strangers[0])
	s.from("127.0.0.3")
	s.are("the oldest of who holds most", false, strangers[1])
	s.are("the known", true, agents...)

	// Above the known's bounds, of a source and of all, one stays a stranger.
	third := known("127.0.0.1")
	s.from("127.0.0.1")
	s.from("127.0.0.1")
	s.are("a third of the source", false, third)
	fourth := known("127.0.0.4")
	s.from("127.0.0.4")
	s.from("127.0.0.4")
	s.are("a fourth in all", false, fourth)
	agents[0].server.Close()
	agents[0].server.Close() // once counts
	fifth, sixth := known("127.0.0.4"), known("127.0.0.4")
	s.from("127.0.0.4")
	s.from("127.0.0.4")
	s.are("in the place given back", true, fifth, agents[1], agents[2])
	s.are("where only one was given back", false, sixth)
	crowd.Known(fifth.client) // not of a listener of ours: nothing
	strangers[0].server.Close()
}
