// Package crowd bounds what anybody can have who reaches a port: connections, and calls
// under way.
//
// A bound that turns the last away gives a port to whoever sits on all places first,
// and one that stops accepting leaves the kubelet's probe in the backlog until the
// kubelet kills the program. So who comes is let in always, and at a bound the oldest
// one of the source that has most goes. Those who mean it are through before
// they are the oldest, or show who they are and are counted apart.
package crowd

import (
	"net"
	"net/netip"
	"sync"
)

// Limit bounds the connections of l: of strangers, of which the next takes the place
// of another, and of those that were handed to Known, which nobody drives out; above
// known connections stay strangers'.
func Limit(l net.Listener, strangers, known Bounds) net.Listener {
	return &listener{Listener: l, strangers: NewPlaces(strangers), known: known, of: map[netip.Addr]int{}}
}

// Known says that the peer of a connection that a listener of Limit accepted has
// proved who it is.
func Known(c net.Conn) {
	if c, ok := c.(*conn); ok {
		c.in.settle(c)
	}
}

// Source is the address of a peer, the zero one if it has none.
func Source(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

type listener struct {
	net.Listener
	strangers *Places
	known     Bounds

	mu  sync.Mutex // over known connections
	all int
	of  map[netip.Addr]int
}

// conn is a connection that holds a place.
type conn struct {
	net.Conn
	in     *listener
	source netip.Addr
	place  *Place
	known  bool // under in's lock
}

// Accept returns the next connection, and makes room for it.
func (l *listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: raw, in: l, source: Source(raw.RemoteAddr())}
	c.place = l.strangers.Enter(c.source, func() { _ = raw.Close() }) // it is lost anyway
	return c, nil
}

// settle counts c among the known if there is room.
func (l *listener) settle(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= l.known.Total || l.of[c.source] >= l.known.PerSource || !c.place.Leave() {
		return
	}
	c.known = true
	l.all++
	l.of[c.source]++
}

// Close gives the place up.
func (c *conn) Close() error {
	c.in.leave(c)
	return c.Conn.Close()
}

func (l *listener) leave(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.place.Leave(); !c.known {
		return
	}
	c.known = false
	l.all--
	if l.of[c.source]--; l.of[c.source] == 0 {
		delete(l.of, c.source)
	}
}
