package engine

import (
	"errors"
	"net/http"
	"sync/atomic"
	"time"
)

// pump copies a request's body to the upstream while the response is awaited.
type pump struct {
	src               body
	dst               dst
	done              chan struct{} // nil: there was none
	active            atomic.Bool
	discard           atomic.Bool // the upstream wants no more
	broken            atomic.Bool // the client's body cannot be had to its end
	readErr, writeErr error       // of the client's and of the upstream's side
}

func (p *pump) reset() {
	p.src, p.dst, p.done = nil, nil, nil
	p.readErr, p.writeErr = nil, nil
	p.discard.Store(false)
	p.broken.Store(false)
}

func (p *pump) running() bool { return p.active.Load() }

// start runs the pump in a goroutine.
func (x *exchange) startPump(to dst, from body) {
	p := &x.pump
	p.src, p.dst, p.done = from, to, make(chan struct{})
	p.active.Store(true)
	x.stream()
	if !x.conn.h2 {
		x.conn.wire.busy, x.conn.wire.idle = &x.act, x.clientIdle
	}
	go x.pumpRun()
}

func (x *exchange) runPump() {
	p := &x.pump
	defer close(p.done)
	defer p.active.Store(false)
	p.readErr, p.writeErr = relay(p.dst, p.src)
	x.act.touch(x.engine.cfg.Now())
	if p.readErr != nil {
		// Half a request must not look like a whole one.
		p.broken.Store(true)
		x.cutUpstream()
		return
	}
	if p.writeErr == nil {
		return
	}
	// The upstream answered early, or is gone: the rest is read and dropped, within
	// bounds, so that the client gets to read the answer.
	buf := x.engine.buffers.get(headBuffer)
	defer x.engine.buffers.put(buf)
	for left := lingerBytes; left > 0 && !p.src.finished(); {
		n, err := p.src.read(buf)
		left -= n
		if err != nil {
			p.readErr = err
			return
		}
	}
}

// errCut is why an upstream HTTP/2 request is cancelled.
var errCut = errors.New("engine: exchange ended")

// earlyGrace is how long a pump may take to notice that it is done, once the
// response is there whole; after that the response was an early one.
const earlyGrace = 100 * time.Millisecond

// endPump waits for the pump after a whole response; false: the body was not
// sent to its end.
func (x *exchange) endPump() bool {
	p := &x.pump
	if p.done == nil {
		return true
	}
	if p.running() {
		timer := time.NewTimer(earlyGrace)
		defer timer.Stop()
		select {
		case <-p.done:
		case <-timer.C:
			return false
		}
	}
	<-p.done
	return p.readErr == nil && p.writeErr == nil
}

// stopPump ends the pump, after the answer was written: the upstream is gone or
// wants no more. The client gets a moment to end its body.
func (x *exchange) stopPump(from body) {
	p := &x.pump
	if p.done == nil {
		return
	}
	if p.running() {
		p.discard.Store(true)
		x.cutUpstream()
		if x.conn.h2 {
			from.(*h2Body).stop()
		} else {
			x.lastMoment()
		}
	}
	<-p.done
	if !x.conn.h2 {
		x.conn.wire.busy, x.conn.wire.idle = nil, nil
		x.conn.wire.readBy = time.Time{}
	}
}

// lastMoment lets the client end its body, however slowly it sends, for a
// bounded time.
func (x *exchange) lastMoment() {
	timer := time.NewTimer(lingerTime)
	defer timer.Stop()
	select {
	case <-x.pump.done:
	case <-timer.C:
		x.halted.Store(true)
		_ = x.conn.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// cutUpstream ends the exchange on the upstream's side. x.up does not change
// while the pump runs.
func (x *exchange) cutUpstream() {
	if x.up != nil {
		abort(x.up.wire.conn)
	}
	if x.cancel != nil {
		x.cancel(errCut)
	}
}

// sending: the request's body is still on its way.
func (x *exchange) sending() bool {
	return x.pump.running() || x.upload != nil && !x.upload.ended.Load()
}

// failure is the client's own fault in its body, or nil.
func (p *pump) failure() *failure {
	if p.done == nil || !p.broken.Load() {
		return nil
	}
	<-p.done
	return bodyFailure(p.readErr)
}

// bodyFailure maps an error of reading the client's body.
func bodyFailure(err error) *failure {
	var r *refusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &r):
		return fail(http.StatusBadRequest, ReasonRequestBody, err)
	case isTimeout(err):
		return fail(http.StatusRequestTimeout, ReasonBodyTimeout, err)
	}
	return clientGone(err)
}
