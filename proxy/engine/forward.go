package engine

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"time"
)

// maxInforms bounds the informational responses of one exchange.
const maxInforms = 16

// connGrace is how old an idle connection may be to be used without a look at its socket.
const connGrace = 5 * time.Millisecond

// forwardH1 sends the request to an HTTP/1.1 upstream and relays the answer.
// The caller answers for a failure if to has not begun.
func (x *exchange) forwardH1(ctx context.Context, from body, to sink) *failure {
	fresh := false
	for {
		if f := x.connect(ctx, fresh); f != nil {
			return f
		}
		x.unguard = x.guard(ctx)
		again, f := x.attempt(from, to)
		x.unguard()
		if !again {
			return f
		}
		x.discardUpstream()
		fresh = true
		x.outcome.Retried = true
	}
}

// guard closes the upstream connection when the client goes away (HTTP/2; an
// HTTP/1 connection closes it itself).
func (x *exchange) guard(ctx context.Context) (stop func() bool) {
	if !x.conn.h2 {
		return func() bool { return true }
	}
	conn := x.up.wire.conn
	return context.AfterFunc(ctx, func() { abort(conn) })
}

// connect finds an upstream connection: a pooled one, unless fresh is asked for.
func (x *exchange) connect(ctx context.Context, fresh bool) *failure {
	e, key := x.engine, x.verdict.Upstream.Key
	x.up = nil
	var home *keyPool
	if key != "" {
		if home = x.conn.home.Load(); home == nil || home.key != key || home.gone.Load() {
			home = e.upstreams.find(key)
			x.conn.home.Store(home)
		}
		if !fresh && home != nil {
			x.up = home.usable(e.cfg.Now(), !x.replayable())
		}
	}
	x.outcome.Reused = x.up != nil
	if x.up == nil {
		conn, f := x.dial(ctx)
		if f != nil {
			return f
		}
		if k, ok := conn.(Keyed); ok && key != "" {
			home = e.upstreams.pool(k.PoolKey())
		} else if home == nil && key != "" {
			// Not before: a key that leads nowhere is not to be kept.
			home = e.upstreams.pool(key)
			x.conn.home.Store(home)
		}
		x.up = e.newUpConn(conn, home)
	}
	x.outcome.Connected = x.since()
	x.got = false
	if !x.conn.h2 && !x.conn.attach(x.up) {
		x.up.close()
		x.up = nil
		return fail(0, ReasonClosed, io.ErrClosedPipe)
	}
	return nil
}

// usable returns an idle connection that is not known to be dead.
func (k *keyPool) usable(now time.Time, careful bool) *upConn {
	for {
		u := k.get()
		if u == nil {
			return nil
		}
		u.wire.armRead(now, k.parent.engine.cfg.ResponseTimeout)
		if !careful && u.exact && now.Sub(u.idleAt) < connGrace || u.alive() {
			return u
		}
		u.close()
	}
}

func (x *exchange) dial(ctx context.Context) (conn net.Conn, f *failure) {
	ctx, cancel := context.WithTimeout(ctx, x.engine.cfg.ConnectTimeout)
	defer cancel()
	conn, err := x.conn.session.Dial(ctx, &x.req)
	if err != nil {
		return nil, dialFailure(err)
	}
	return conn, nil
}

// replayable: the request may be sent again after a pooled connection turned out dead.
func (x *exchange) replayable() bool { return idempotent(x.req.Method) && x.req.ContentLength == 0 }

// attempt is one try on the connection at hand; again: nothing of it was
// applied, or applying it twice is the same, so another may follow.
func (x *exchange) attempt(from body, to sink) (again bool, f *failure) {
	up := x.up
	again, f = x.send(from)
	if again || f != nil {
		return again, f
	}
	x.waiting = true
	err := x.awaitHead(to)
	x.waiting = false
	if err != nil {
		if x.mayRetry() && !x.got && !isTimeout(err) && idempotent(x.req.Method) {
			return true, nil
		}
		return false, x.responseFailure(err)
	}
	x.outcome.FirstByte = x.since()
	if x.res.status == http.StatusSwitchingProtocols {
		return false, x.tunnel(to)
	}
	length := x.res.length
	up.in.begin(&up.wire, x.res.mode, length)
	if _, whole := up.in.inline(); !whole {
		x.stream()
	}
	if err := to.start(&x.res); err != nil {
		return false, clientGone(err)
	}
	readErr, writeErr := relay(to, &x.up.in)
	x.trailerStatus(up.in.trailer())
	switch {
	case writeErr != nil:
		return false, clientGone(writeErr)
	case readErr != nil:
		return false, x.responseFailure(readErr)
	}
	return false, x.settle(from)
}

// mayRetry: the connection was pooled, so the upstream may have closed it
// unseen, and the whole request is still at hand.
func (x *exchange) mayRetry() bool { return x.up.reused && x.pump.done == nil && !x.outcome.Retried }

// send writes the request: at once when all of it is there, else by a pump
// beside the response.
func (x *exchange) send(from body) (again bool, f *failure) {
	up, e := x.up, x.engine
	now := x.outcome.Start.Add(x.outcome.Connected)
	up.wire.armRead(now, e.cfg.ResponseTimeout)
	x.uout.release()
	x.uout.begin(&up.wire, e.cfg.StreamIdleTimeout)
	x.requestHead()
	inline, whole := x.inline(from)
	if !whole {
		x.startPump(&x.usnk, from)
		return false, nil
	}
	x.uout.raw(inline)
	if err := x.uout.flush(); err != nil {
		// RFC 9110 9.2.2: known not to have been applied, or safe to apply twice.
		if x.mayRetry() && (!x.uout.sent || idempotent(x.req.Method)) {
			return true, nil
		}
		if isTimeout(err) {
			return false, fail(http.StatusGatewayTimeout, ReasonResponseTimeout, err)
		}
		// The upstream may have answered before it closed: the response decides.
	}
	return false, nil
}

// inline returns the request's body if it is all there.
func (x *exchange) inline(from body) ([]byte, bool) {
	if from.finished() && x.req.ContentLength >= 0 {
		return x.replay, true
	}
	in, ok := from.(*bodyIn)
	if !ok {
		return nil, false
	}
	b, whole := in.inline()
	if whole {
		in.skipInline()
		x.replay = b
	}
	return b, whole
}

// awaitHead reads heads until the final one, passing informational ones on.
func (x *exchange) awaitHead(to sink) error {
	for range maxInforms {
		if err := x.readHead(); err != nil {
			return err
		}
		switch {
		case x.res.status == http.StatusSwitchingProtocols:
			if !x.req.WebSocket || !x.res.framing.upgrade || !x.res.framing.websocket {
				return errSwitch
			}
			return nil
		case !x.res.informational():
			return nil
		case x.res.status == http.StatusContinue && !x.req.expect:
			continue
		}
		x.continued = x.continued || x.res.status == http.StatusContinue
		if err := to.inform(&x.res); err != nil {
			return &writeError{err}
		}
	}
	return errTooManyInforms
}

// writeError marks an error of the client's side.
type writeError struct{ error }

// readHead reads one head of the upstream into x.res.
func (x *exchange) readHead() error {
	w, cfg := &x.up.wire, &x.engine.cfg
	x.rscn.reset()
	for {
		if w.buffered() > 0 {
			x.got = true
			n, err := x.rscn.scan(w.buf[w.r:w.w], cfg.MaxHeaders*2)
			if err != nil {
				return err
			}
			if n > 0 {
				head := w.buf[w.r : w.r+n]
				w.r += n
				return x.res.parse(head, &x.rscn, x.req.Method)
			}
			if w.buffered() >= cfg.MaxResponseHeaderBytes {
				return errHeadTooLarge
			}
			if w.w == len(w.buf) {
				w.room(min(2*len(w.buf), cfg.MaxResponseHeaderBytes+1))
			}
		}
		if err := w.fill(); err != nil {
			return err
		}
	}
}

// responseFailure maps what went wrong on the upstream's side.
func (x *exchange) responseFailure(err error) *failure {
	var r *refusal
	var we *writeError
	if broken := x.pump.failure(); broken != nil {
		return broken
	}
	switch {
	case errors.As(err, &we):
		return clientGone(we.error)
	case errors.As(err, &r):
		return fail(http.StatusBadGateway, ReasonBadResponse, err)
	case isTimeout(err) && x.pump.running():
		return fail(http.StatusRequestTimeout, ReasonBodyTimeout, err)
	case isTimeout(err) && !x.got:
		return fail(http.StatusGatewayTimeout, ReasonResponseTimeout, err)
	case isTimeout(err):
		return fail(http.StatusGatewayTimeout, ReasonBodyTimeout, err)
	}
	return fail(http.StatusBadGateway, ReasonReset, err)
}

// settle ends a relayed exchange: the connection goes back to the pool when both
// messages ended cleanly, else finish closes it.
func (x *exchange) settle(from body) *failure {
	up := x.up
	sent := x.endPump()
	if !sent || !x.res.keep || !from.finished() || up.wire.buffered() > 0 || up.home == nil {
		return nil
	}
	if !x.conn.h2 {
		x.conn.attach(nil)
	} else if !x.unguard() {
		return nil // the client's end of the stream is closing the connection
	}
	x.up = nil
	up.wire.busy, up.wire.idle = nil, nil
	up.wire.release()
	up.exact = x.res.mode == byLength || x.res.mode == byChunks
	up.home.put(up, x.engine.cfg.Now())
	return nil
}

// finish ends what an exchange started: the pump, and a connection that cannot
// be used again. The answer has been written.
func (x *exchange) finish(from body) {
	x.stopPump(from)
	if x.upload != nil {
		x.upload.stop()
	}
	x.discardUpstream()
}

// discardUpstream closes the connection at hand.
func (x *exchange) discardUpstream() {
	if x.up == nil {
		return
	}
	if !x.conn.h2 {
		x.conn.attach(nil)
	}
	x.up.close()
	x.up = nil
}

// trailerStatus keeps grpc-status for the log.
func (x *exchange) trailerStatus(fields []Field) {
	for _, f := range fields {
		if equalLower(f.Name, "grpc-status") && len(f.Value) <= 3 {
			x.outcome.GRPCStatus = f.Value
		}
	}
}
