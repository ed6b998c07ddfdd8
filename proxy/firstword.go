package proxy

import (
	"context"
	"time"
)

// quiet is how long a client on an undeclared port may say nothing until the
// server is given a chance to speak first. It only puts off a connection: who
// speaks HTTP later than that is heard all the same.
const quiet = 200 * time.Millisecond

// past is a deadline that ends a read at once.
var past = time.Unix(1, 0)

// firstWord waits until either side of a connection has spoken, and tells by that
// what is spoken: bytes where the server spoke first, and else what the client's
// look like. Nothing is passed on meanwhile, so that a request is judged before
// anybody has seen it. When ctx ends both connections are closed.
func (p *Proxy) firstWord(ctx context.Context, client, server *prefixConn) protocol {
	stop := closeWith(ctx, client, server)
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		// An end or an error is a word too: what follows finds it again.
		n, _ := server.Conn.Read(server.prefix[:])
		server.length = n
		_ = client.Conn.SetReadDeadline(past)
	}()
	for client.length < len(client.prefix) && sniff(client.prefix[:client.length]) == sniffedNothing {
		n, err := client.Conn.Read(client.prefix[client.length:])
		client.length += n
		if err != nil {
			break
		}
	}
	_ = server.Conn.SetReadDeadline(past)
	<-heard
	// Fails on closed connections only, as reading them will.
	_ = client.Conn.SetReadDeadline(time.Time{})
	_ = server.Conn.SetReadDeadline(time.Time{})
	switch {
	case !stop() || server.length > 0:
		return speaksTCP
	case client.mayBeTLS && client.length > 0 && client.prefix[0] == recordHandshake:
		return speaksTLS
	}
	return client.sounds()
}

// sounds is what the bytes read ahead are: TCP where they do not tell.
func (c *prefixConn) sounds() protocol {
	switch sniff(c.prefix[:c.length]) {
	case sniffedHTTP1:
		return speaksHTTP
	case sniffedHTTP2:
		return speaksHTTP2
	}
	return speaksTCP
}
