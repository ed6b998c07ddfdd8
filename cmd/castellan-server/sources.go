package main

import (
	"net"
	"net/netip"
	"sync"

	"castellan.dev/ca/server"
)

// sourceListener closes at once the connections of a source that has its share.
type sourceListener struct {
	net.Listener
	limit int

	mu   sync.Mutex
	open map[netip.Prefix]int
}

func limitSources(l net.Listener, limit int) *sourceListener {
	return &sourceListener{Listener: l, limit: limit, open: map[netip.Prefix]int{}}
}

// Accept implements net.Listener.
func (l *sourceListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		source := server.Source(conn.RemoteAddr().String())
		if !l.enter(source) {
			_ = conn.Close() // nobody waits for an answer
			continue
		}
		return &sourceConn{Conn: conn, leave: sync.OnceFunc(func() { l.leave(source) })}, nil
	}
}

func (l *sourceListener) enter(source netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[source] >= l.limit {
		return false
	}
	l.open[source]++
	return true
}

func (l *sourceListener) leave(source netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[source]--; l.open[source] == 0 {
		delete(l.open, source)
	}
}

type sourceConn struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *sourceConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
