package engine

import (
	"net/http"
	"time"
)

// What a request in flight is taken to hold besides its head, which is held twice (as
// the library, or the wire, read it and as a Request): goroutines and small buffers.
const (
	holdsStream  = 24 << 10
	holdsRequest = 12 << 10
	// holdsField is what a field of HTTP/2 takes besides its bytes.
	holdsField = 48
)

// holdStep is what a connection's account is rounded up to, so that one ordinary
// request after the other is told of by two additions.
const holdStep = 16 << 10

// mayStayUnsent is how many streams may end with an answer still in the library since
// the connection was idle last. Those of a client that gives no window stay there, and
// nothing tells when they have gone but that all have: they count until then, and those
// after them are sent before they end.
const mayStayUnsent = 2

// account is what a connection's requests in flight hold, in bytes. It is under the
// connection's lock.
type account struct {
	report     func(delta int64) // nil: nobody asks
	held, told int64
	unsent     int64 // of held, that of streams that ended unsent
	unsentN    int
	quiet      bool // HTTP/2: no stream is open
}

// move adds n, and returns what is to be told once the lock is free.
func (a *account) move(n int64) (delta int64) {
	if a.report == nil {
		return 0
	}
	a.held += n
	now := (a.held + holdStep - 1) / holdStep * holdStep
	delta, a.told = now-a.told, now
	return delta
}

// Reports has report called with what the bytes that requests in flight hold change by,
// in steps and without a lock of the engine's held. Call it before Serve.
func (c *Conn) Reports(report func(delta int64)) { c.account.report = report }

func (c *Conn) tell(delta int64) {
	if delta != 0 {
		c.account.report(delta)
	}
}

// charge: the request in flight holds n bytes more.
func (x *exchange) charge(n int) {
	c := x.conn
	x.cost += int64(n)
	c.mu.Lock()
	delta := c.account.move(int64(n))
	c.mu.Unlock()
	c.tell(delta)
}

// costOf is what a stream holds from its beginning.
func (c *Conn) costOf(r *http.Request) int64 {
	if c.account.report == nil {
		return 0
	}
	n := len(r.RequestURI) + len(r.Host)
	for name, values := range r.Header {
		n += len(name)
		for _, v := range values {
			n += len(v) + holdsField
		}
	}
	return holdsStream + 2*int64(n)
}

// mustSend reports whether a stream may not end before its answer has been sent.
func (c *Conn) mustSend() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := &c.account
	if a.report == nil {
		return false
	}
	a.unsentN++
	return a.unsentN > mayStayUnsent
}

// endStream marks a request of HTTP/2 as done. What one holds whose answer is unsent
// goes on being counted.
func (c *Conn) endStream(now time.Time, cost int64, unsent bool) {
	if !unsent {
		c.end(now, cost)
		return
	}
	c.mu.Lock()
	if !c.account.quiet {
		c.account.unsent += cost
		cost = 0
	}
	c.mu.Unlock()
	c.end(now, cost)
}

// streams notes whether any stream is open.
func (c *Conn) streams(state http.ConnState) {
	c.mu.Lock()
	a := &c.account
	var delta int64
	switch state {
	case http.StateActive:
		a.quiet = false
	case http.StateIdle:
		a.quiet = true
		delta = a.move(-a.unsent)
		a.unsent, a.unsentN = 0, 0
	}
	c.mu.Unlock()
	c.tell(delta)
}
