package engine

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"time"
)

// serveH1 serves an HTTP/1 connection: requests in order, until either side ends it.
func (c *Conn) serveH1(ctx context.Context) {
	for c.await() {
		x := c.engine.newExchangeFor(c)
		x.outcome.Start = c.engine.cfg.Now()
		x.cost = holdsRequest
		c.begin(x.outcome.Start, x.cost)
		keep, linger := c.serveOne(ctx, x)
		c.end(x.outcome.Start.Add(x.outcome.Total), x.cost)
		x.free()
		if linger {
			c.linger()
		}
		if !keep {
			break
		}
	}
	c.wire.drop()
}

// await waits for the first byte of a request. While it waits the connection
// holds a tiny buffer and nothing else.
func (c *Conn) await() bool {
	if c.wire.buffered() > 0 {
		return !c.closing.Load()
	}
	c.wire.drop()
	c.wire.buf = c.engine.buffers.get(tinyBuffer)
	c.wire.armRead(c.engine.cfg.Now(), c.engine.cfg.IdleTimeout)
	if c.closing.Load() { // after the deadline was set: CloseGracefully sets it again
		return false
	}
	return c.wire.fill() == nil
}

// serveOne serves one request, of which a byte is there. linger: the client may
// still be sending.
func (c *Conn) serveOne(ctx context.Context, x *exchange) (keep, linger bool) {
	x.out.begin(&c.wire, c.engine.cfg.StreamIdleTimeout)
	if err := x.readRequest(); err != nil {
		return c.refuse(x, err)
	}
	defer x.report()
	x.startBody()
	x.judge()
	if x.verdict.Status != 0 {
		keep, linger = x.answer(x.verdict.Status, x.verdict.Body, x.verdict.Header)
		x.count()
		return keep, linger
	}
	if _, whole := x.in.inline(); !whole {
		x.held = c.wire.take(headBuffer)
	}
	var f *failure
	if x.verdict.Upstream.H2 {
		f = x.throughH2(ctx)
	} else {
		f = x.forwardH1(ctx, &x.in, &x.h1)
	}
	if f == nil {
		return x.conclude()
	}
	if c.gone.Load() {
		f = clientGone(f.err)
	}
	x.note(f)
	if x.h1.headed || f.status == 0 {
		x.finish(&x.in)
		x.count()
		return false, false // the client sees the response cut off
	}
	keep, linger = x.answer(f.status, "", nil)
	x.finish(&x.in)
	x.count()
	return keep && x.in.finished(), linger
}

// throughH2 forwards an HTTP/1 request to an HTTP/2 upstream.
func (x *exchange) throughH2(ctx context.Context) *failure {
	if x.held == nil {
		x.held = x.conn.wire.take(headBuffer)
	}
	if x.req.WebSocket {
		// WebSocket over HTTP/2 (RFC 8441) is not served.
		return fail(http.StatusBadGateway, ReasonBadResponse, errNoTunnel)
	}
	x.act.touch(x.engine.cfg.Now())
	x.conn.wire.busy, x.conn.wire.idle = &x.act, x.clientIdle
	f := x.forwardH2(ctx, &x.in, &x.h1)
	if f != nil && x.upload != nil {
		x.upload.stop() // before an answer is written: it may be about to write "100 Continue"
	}
	x.conn.attachCancel(nil)
	if x.single != nil {
		_ = x.single.Close()
	}
	if x.upload == nil {
		x.conn.wire.busy, x.conn.wire.idle = nil, nil
	}
	return f
}

// conclude ends an exchange whose response was relayed whole.
func (x *exchange) conclude() (keep, linger bool) {
	x.finish(&x.in)
	x.count()
	switch {
	case x.outcome.Upgraded:
		return false, false
	case !x.in.finished():
		return false, true // an early response; the client may still send
	}
	return !x.h1.close, false
}

// count fills in the bytes of an HTTP/1 exchange.
func (x *exchange) count() {
	x.outcome.RequestBytes += x.in.total
	x.outcome.ResponseBytes += x.out.total
}

// readRequest reads and parses a head.
func (x *exchange) readRequest() error {
	w, cfg := &x.conn.wire, &x.engine.cfg
	armed := false
	for {
		in := w.buf[w.r:w.w]
		if !tokenChars[in[0]] {
			return errRequestLine // no HTTP: a TLS hello, a blank line
		}
		n, err := x.scan.scan(in, cfg.MaxHeaders)
		switch {
		case err != nil:
			return err
		case n > cfg.MaxHeaderBytes:
			return errHeadTooLarge
		case n > 0:
			w.r += n
			return x.req.parse(in[:n], &x.scan, cfg)
		case len(x.scan.starts) == 0 && len(in) > cfg.MaxTargetBytes+len("OPTIONS  HTTP/1.1\r\n"):
			return overlongLine(in)
		case len(in) >= cfg.MaxHeaderBytes:
			return errHeadTooLarge
		}
		if !armed {
			armed = true
			w.readBy = time.Time{}
			w.armRead(x.outcome.Start, cfg.HeaderTimeout)
		}
		if w.w == len(w.buf) {
			before := max(len(w.buf), headBuffer)
			w.room(max(headBuffer, min(2*len(w.buf), cfg.MaxHeaderBytes+1)))
			if more := len(w.buf) - before; more > 0 {
				x.charge(2 * more)
			}
		}
		if err := w.fill(); err != nil {
			if isTimeout(err) {
				return errHeadTimeout
			}
			return err
		}
	}
}

// overlongLine tells an overlong target from what is no request line at all.
func overlongLine(in []byte) error {
	if i := bytes.IndexByte(in, ' '); i > 0 && i <= 32 {
		return errTargetTooLong
	}
	return errRequestLine
}

// startBody readies the request's body; a pool of framing rules is not needed:
// parse has left exactly one reading.
func (x *exchange) startBody() {
	switch n := x.req.ContentLength; {
	case n < 0:
		x.in.begin(&x.conn.wire, byChunks, 0)
	case n > 0:
		x.in.begin(&x.conn.wire, byLength, n)
	default:
		x.in.begin(&x.conn.wire, noBody, 0)
	}
}

// refuse answers a head that could not be read. No later byte of the connection
// can be trusted to begin a request.
func (c *Conn) refuse(x *exchange, err error) (keep, linger bool) {
	var r *refusal
	if !errors.As(err, &r) {
		x.note(clientGone(err))
		x.report()
		return false, false
	}
	x.note(fail(r.status, r.reason, err))
	x.h1.close = true
	var extra []Field
	if r == errConnect {
		extra = []Field{{"Allow", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"}}
	}
	_ = x.writeAnswer(r.status, "", extra) // the connection ends either way
	x.report()
	return false, true
}

// drainable is the size up to which a body nobody wants is read, to keep the connection.
const drainable = 64 << 10

// answer sends an answer of our own. Begin's refusals and upstream failures
// both end here; the body is a constant line.
func (x *exchange) answer(status int, body string, extra []Field) (keep, linger bool) {
	unread := x.pump.done == nil && x.upload == nil && !x.in.finished() // those own the body
	if unread {
		if _, whole := x.in.inline(); whole {
			x.in.skipInline()
			unread = false
		}
	}
	drain := unread && !x.req.expect && x.req.ContentLength > 0 && x.req.ContentLength <= drainable
	x.h1.close = x.h1.close || unread && !drain || x.sending() || x.pump.broken.Load() ||
		x.req.framing.close || x.req.Proto == HTTP10 || x.verdict.Close || x.conn.closing.Load()
	err := x.writeAnswer(status, body, extra)
	if err == nil && drain && !x.h1.close {
		drain = x.drain()
		unread = !drain
	}
	if err != nil {
		return false, false
	}
	return !x.h1.close && !unread, unread || x.pump.done != nil || x.upload != nil
}

// drain reads the rest of a small body; false if the client takes too long.
func (x *exchange) drain() bool {
	w := &x.conn.wire
	if x.held == nil {
		x.held = w.take(headBuffer) // End still looks at the head
	}
	w.readBy = time.Time{}
	w.armRead(x.engine.cfg.Now(), lingerTime)
	buf := x.engine.buffers.get(headBuffer)
	defer x.engine.buffers.put(buf)
	for !x.in.finished() {
		if _, err := x.in.read(buf); err != nil {
			return false
		}
	}
	return true
}

// writeAnswer writes an answer of one line.
func (x *exchange) writeAnswer(status int, body string, extra []Field) error {
	o := &x.out
	x.h1.headed = true
	x.outcome.Status = status
	if body == "" {
		body = http.StatusText(status)
	}
	o.str("HTTP/1.1 ")
	o.num(int64(status))
	o.str(" ")
	o.str(http.StatusText(status))
	o.str("\r\nDate: ")
	var date [len(http.TimeFormat)]byte
	o.str(text(x.engine.cfg.Now().UTC().AppendFormat(date[:0], http.TimeFormat)))
	o.str("\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: ")
	o.num(int64(len(body) + 1))
	o.str("\r\n")
	for i := range extra {
		if f := &extra[i]; settable(f) || kindOf(f.Name) == hopByHop {
			o.field(f.Name, f.Value)
		}
	}
	if x.h1.close {
		o.str("Connection: close\r\n")
	}
	o.str("\r\n")
	if x.req.Method != "HEAD" {
		o.raw(append([]byte(body), '\n'))
	}
	return o.flush()
}
