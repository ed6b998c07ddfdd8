package health

import (
	"net"
	"net/netip"
	"sync"
)

// Bounds of connections to what answers in the clear. A node's kubelet and a
// collector or two need a handful.
const (
	maxConnections = 256
	maxPerSource   = 32
)

// Limit bounds the connections of l, in all and of each source: what is above is
// closed at once. So nobody takes the places of others, but for who has many
// addresses.
func Limit(l net.Listener) net.Listener {
	return &limited{Listener: l, sources: map[netip.Addr]int{}}
}

type limited struct {
	net.Listener
	mu      sync.Mutex
	all     int
	sources map[netip.Addr]int
}

// Accept returns the next connection for which there is room.
func (l *limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		var source netip.Addr
		if tcp, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
			source = tcp.AddrPort().Addr().Unmap()
		}
		if l.enter(source) {
			return &counted{Conn: conn, leave: sync.OnceFunc(func() { l.leave(source) })}, nil
		}
		conn.Close()
	}
}

func (l *limited) enter(source netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= maxConnections || l.sources[source] >= maxPerSource {
		return false
	}
	l.all++
	l.sources[source]++
	return true
}

func (l *limited) leave(source netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.sources[source]--; l.sources[source] == 0 {
		delete(l.sources, source)
	}
}

type counted struct {
	net.Conn
	leave func()
}

// Close gives the place up.
func (c *counted) Close() error {
	c.leave()
	return c.Conn.Close()
}
