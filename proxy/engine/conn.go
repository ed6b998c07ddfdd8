package engine

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Conn is one client connection.
type Conn struct {
	engine  *Engine
	conn    net.Conn
	session Session
	h2      bool
	wire    wire // HTTP/1

	// home is the upstream pool used last.
	home atomic.Pointer[keyPool]
	// closing: no request is taken after those in flight.
	closing atomic.Bool
	// gone: the client has hung up.
	gone atomic.Bool

	mu       sync.Mutex
	account  account
	closed   bool
	active   int                     // requests in flight
	activeAt time.Time               // since when the one of HTTP/1 is
	tunnel   bool                    // it has become a tunnel
	idleAt   time.Time               // since when there is none
	upstream *upConn                 // HTTP/1: that of the exchange in flight, closed with the connection
	cancel   context.CancelCauseFunc // or that of its HTTP/2 stream
	goAway   func()                  // HTTP/2
	// resets counts streams the client gave up, in the second from resetsFrom on.
	resets     int
	resetsFrom time.Time
}

// NewConn prepares to serve an accepted connection; h2: it speaks HTTP/2 (by
// ALPN or prior knowledge). The connection's owner may close it through the Conn.
func (e *Engine) NewConn(conn net.Conn, h2 bool, s Session) *Conn {
	c := &Conn{engine: e, conn: conn, session: s, h2: h2, idleAt: e.cfg.Now()}
	c.wire = wire{conn: conn, pool: &e.buffers, now: e.cfg.Now}
	return c
}

// Serve serves the connection until it ends, and closes it. When ctx ends it is closed at once.
func (c *Conn) Serve(ctx context.Context) {
	defer c.conn.Close()
	if !c.engine.enter(c) {
		return
	}
	defer c.engine.leave(c)
	stop := context.AfterFunc(ctx, c.CloseNow)
	defer stop()
	if c.h2 {
		c.serveH2(ctx)
		return
	}
	c.serveH1(ctx)
}

// CloseGracefully closes the connection once nothing is in flight: HTTP/1 after
// the current response, HTTP/2 by GOAWAY. It does not wait.
func (c *Conn) CloseGracefully() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closing.Store(true)
	switch {
	case c.h2:
		if c.goAway != nil {
			c.goAway()
		}
	case c.active == 0:
		// Ends the wait for a request. begin renews the deadline if one came just now.
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// CloseNow closes the connection at once. It does not wait.
func (c *Conn) CloseNow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closing.Store(true)
	if c.closed {
		return
	}
	c.closed = true
	abort(c.conn)
	if c.upstream != nil {
		abort(c.upstream.wire.conn)
	}
	if c.cancel != nil {
		c.cancel(errCut)
	}
}

// abort closes a connection without a TLS farewell, which could wait for the peer.
func abort(conn net.Conn) {
	_ = socket(conn).Close()
}

// IdleSince says since when no request is in flight; false when one is.
func (c *Conn) IdleSince() (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.idleAt, c.active == 0
}

// begin marks a request as in flight, which holds cost bytes.
func (c *Conn) begin(now time.Time, cost int64) {
	c.mu.Lock()
	c.active++
	c.activeAt = now
	if c.closing.Load() {
		c.wire.readBy = time.Time{} // CloseGracefully may have set the deadline to the past
	}
	delta := c.account.move(cost)
	c.mu.Unlock()
	c.tell(delta)
}

// end marks a request as done, which held cost bytes.
func (c *Conn) end(now time.Time, cost int64) {
	c.mu.Lock()
	c.active--
	c.idleAt = now
	delta := c.account.move(-cost)
	c.mu.Unlock()
	c.tell(delta)
}

// attach remembers the upstream connection of the HTTP/1 exchange in flight;
// false: the connection was closed meanwhile.
func (c *Conn) attach(u *upConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed && u != nil {
		return false
	}
	c.upstream = u
	return true
}

// attachCancel does the same for an HTTP/2 upstream.
func (c *Conn) attachCancel(cancel context.CancelCauseFunc) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel = cancel
	return !c.closed
}

// Bounds of the farewell to a client that may still be sending.
const (
	lingerTime  = time.Second
	lingerBytes = 256 << 10
)

// linger ends the sending direction and discards what the client still sends,
// so that it can read the answer before the connection is reset.
func (c *Conn) linger() {
	if !closeWrite(c.conn) {
		return
	}
	_ = c.conn.SetReadDeadline(c.engine.cfg.Now().Add(lingerTime))
	buf := c.engine.buffers.get(headBuffer)
	defer c.engine.buffers.put(buf)
	_, _ = io.CopyBuffer(io.Discard, &io.LimitedReader{R: c.conn, N: lingerBytes}, buf)
}
