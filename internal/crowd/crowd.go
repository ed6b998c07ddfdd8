// Package crowd bounds the connections of a listener that anybody can reach.
//
// A bound that turns the last away gives a port to whoever sits on all places first,
// and one that stops accepting leaves the kubelet's probe in the backlog until the
// kubelet kills the program. So who comes is let in always, and at a bound the oldest
// connection of the source that holds most goes. Those who mean it are through before
// they are the oldest, or show who they are and are counted apart.
package crowd

import (
	"net"
	"net/netip"
	"slices"
	"sync"
)

// Bounds are numbers of open connections.
type Bounds struct{ Total, PerSource int }

// Limit bounds the connections of l: of strangers, of which the next takes the place
// of another, and of those that were handed to Known, which nobody drives out; above
// known connections stay strangers'. Its connections are for one goroutine or many, as
// those of l are.
func Limit(l net.Listener, strangers, known Bounds) net.Listener {
	return &listener{Listener: l, bounds: strangers, strangers: map[netip.Addr][]*conn{}, known: known, knownOf: map[netip.Addr]int{}}
}

// Known says that the peer of a connection that a listener of Limit accepted has
// proved who it is.
func Known(c net.Conn) {
	if c, ok := c.(*conn); ok {
		c.in.settle(c)
	}
}

type listener struct {
	net.Listener
	bounds, known Bounds

	mu       sync.Mutex
	accepted uint64 // ever
	all      int    // strangers
	// strangers have a source's connections, the oldest first.
	strangers map[netip.Addr][]*conn
	allKnown  int
	knownOf   map[netip.Addr]int
}

// conn is a connection that holds a place. What is below in is under its lock.
type conn struct {
	net.Conn
	in     *listener
	source netip.Addr
	number uint64
	known  bool
}

// Accept returns the next connection, and makes room for it.
func (l *listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: raw, in: l}
	if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		c.source = tcp.AddrPort().Addr().Unmap()
	}
	if evicted := l.enter(c); evicted != nil {
		_ = evicted.Conn.Close() // it is lost anyway
	}
	return c, nil
}

// enter counts c, and returns who is to be closed for it.
func (l *listener) enter(c *conn) (evicted *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch own := l.strangers[c.source]; {
	case len(own) >= l.bounds.PerSource:
		evicted = own[0]
	case l.all >= l.bounds.Total:
		evicted = l.greediest()
	}
	if evicted != nil {
		l.remove(evicted)
	}
	l.all++
	l.accepted++
	c.number = l.accepted
	l.strangers[c.source] = append(l.strangers[c.source], c)
	return evicted
}

// greediest is the oldest connection of the source that holds most, or of all that do.
func (l *listener) greediest() *conn {
	var most []*conn
	for _, own := range l.strangers {
		if len(own) > len(most) || len(own) == len(most) && own[0].number < most[0].number {
			most = own
		}
	}
	return most[0]
}

// settle counts c among the known if there is room.
func (l *listener) settle(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.allKnown >= l.known.Total || l.knownOf[c.source] >= l.known.PerSource || !l.remove(c) {
		return
	}
	c.known = true
	l.allKnown++
	l.knownOf[c.source]++
}

// remove no longer counts c among the strangers, and reports whether it was there.
func (l *listener) remove(c *conn) bool {
	own := l.strangers[c.source]
	at := slices.Index(own, c)
	if at < 0 {
		return false
	}
	l.all--
	if own = slices.Delete(own, at, at+1); len(own) == 0 {
		delete(l.strangers, c.source)
	} else {
		l.strangers[c.source] = own
	}
	return true
}

// Close gives the place up.
func (c *conn) Close() error {
	c.in.leave(c)
	return c.Conn.Close()
}

func (l *listener) leave(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.remove(c); !c.known {
		return
	}
	c.known = false
	l.allKnown--
	if l.knownOf[c.source]--; l.knownOf[c.source] == 0 {
		delete(l.knownOf, c.source)
	}
}
