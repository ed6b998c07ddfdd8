package health

import (
	"net"
	"net/netip"
	"slices"
	"sync"
)

// Bounds of connections to what answers in the clear. A node's kubelet and a
// collector or two need a handful.
const (
	maxConnections = 256
	maxPerSource   = 32
)

// Limit bounds the connections of l, in all and of each source. At a bound the oldest
// connection of whoever holds most makes way for the newest: a kubelet that is refused
// would have a healthy pod killed, and its probes last milliseconds, so that those who
// sit on connections lose them and never it.
func Limit(l net.Listener) net.Listener {
	return &limited{Listener: l, sources: map[netip.Addr][]*counted{}}
}

type limited struct {
	net.Listener
	mu       sync.Mutex
	all      int
	accepted uint64 // ever
	// sources have their connections, the oldest first.
	sources map[netip.Addr][]*counted
}

// Accept returns the next connection, and makes room for it.
func (l *limited) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &counted{Conn: conn, in: l}
	if tcp, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		c.source = tcp.AddrPort().Addr().Unmap()
	}
	if evicted := l.enter(c); evicted != nil {
		_ = evicted.Close() // it is lost anyway
	}
	return c, nil
}

// enter counts c, and returns who is to be closed for it.
func (l *limited) enter(c *counted) (evicted *counted) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch own := l.sources[c.source]; {
	case len(own) >= maxPerSource:
		evicted = own[0]
	case l.all >= maxConnections:
		evicted = l.greediest()
	}
	if evicted != nil {
		l.remove(evicted)
	}
	l.all++
	l.accepted++
	c.number = l.accepted
	l.sources[c.source] = append(l.sources[c.source], c)
	return evicted
}

// greediest is the oldest connection of a source of which none holds more.
func (l *limited) greediest() *counted {
	var most []*counted
	for _, own := range l.sources {
		if len(own) > len(most) || len(own) == len(most) && own[0].number < most[0].number {
			most = own
		}
	}
	return most[0]
}

// remove no longer counts c; further calls do nothing.
func (l *limited) remove(c *counted) {
	own := l.sources[c.source]
	at := slices.Index(own, c)
	if at < 0 {
		return
	}
	l.all--
	if own = slices.Delete(own, at, at+1); len(own) == 0 {
		delete(l.sources, c.source)
		return
	}
	l.sources[c.source] = own
}

// counted is a connection that holds a place.
type counted struct {
	net.Conn
	in     *limited
	source netip.Addr
	number uint64
}

// Close gives the place up.
func (c *counted) Close() error {
	c.in.mu.Lock()
	c.in.remove(c)
	c.in.mu.Unlock()
	return c.Conn.Close()
}
