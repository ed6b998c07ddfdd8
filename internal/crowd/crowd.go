// Package crowd bounds what anybody can have who reaches a port: connections, calls
// under way, and answers that he does not read.
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
// known connections stay strangers'. All are Paced.
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

// Source is the address of a peer, the zero one if it has none. Of IPv6 too it is one
// address and not its /64: on Kubernetes that is all pods of a node, with the agent and
// the kubelet among them. Who has many addresses is met by the order in which places
// are lost.
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
	raw    net.Conn
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
	buffers(raw, strangerBuffer)
	c := &conn{Conn: Paced(raw), raw: raw, in: l, source: Source(raw.RemoteAddr())}
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
	buffers(c.raw, knownBuffer)
}

// What the kernel keeps of a connection in each direction, which counts as the
// program's memory and which it doubles. By itself it would keep megabytes.
const (
	strangerBuffer = 32 << 10
	knownBuffer    = 512 << 10
)

func buffers(c net.Conn, size int) {
	if tcp, ok := c.(*net.TCPConn); ok {
		// Where they stay as they were the connection works all the same.
		_ = tcp.SetReadBuffer(size)
		_ = tcp.SetWriteBuffer(size)
	}
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
