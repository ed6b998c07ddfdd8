package engine

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// sink is where a response goes: an HTTP/1 client or an HTTP/2 stream.
type sink interface {
	dst
	// inform passes an informational response on.
	inform(s *response) error
	// start takes the final head; it may stay buffered until flush or finish.
	start(s *response) error
	// begun: the final head was taken, so no other answer is possible.
	begun() bool
}

// dst takes a message body.
type dst interface {
	space() ([]byte, error) // where the next bytes go
	wrote(n int) error      // they are there
	flush() error
	finish(trailer []Field) error
}

// exchange is one request and its response. It is pooled with everything it
// needs, so that an ordinary one allocates nothing.
type exchange struct {
	engine  *Engine
	conn    *Conn
	req     Request
	scan    headScan
	verdict Verdict
	outcome Outcome
	cost    int64  // what it has been charged with
	held    []byte // the buffer that req's strings point into, once the wire went on

	in   bodyIn     // HTTP/1 request body
	out  messageOut // HTTP/1 response
	res  response
	rscn headScan
	up   *upConn
	uout messageOut
	usnk requestSink
	h1   h1Sink
	// replay is the request's body when all of it was there at once.
	replay []byte
	// unguard ends the watch over an HTTP/2 client's stream.
	unguard func() bool

	act     activity
	aborted atomic.Bool // by Request.Abort, HTTP/2
	halted  atomic.Bool // reads of the client's body are to end
	pump    pump
	cancel  context.CancelCauseFunc // of an HTTP/2 upstream request
	upload  *upload                 // its body
	single  *http2.ClientConn       // its connection, if it is for this request only
	// got: a byte of a response came on this upstream connection.
	got bool
	// waiting: no final response head yet. Main goroutine only.
	waiting   bool
	continued bool // a 100 was passed on
	unsent    bool // HTTP/2: the stream ends before its answer was sent

	clientIdle, upIdle func() time.Duration // made once: method values allocate
	pumpRun            func()
}

func newExchange(e *Engine) *exchange {
	x := &exchange{engine: e}
	x.h1.x, x.usnk.x = x, x
	x.clientIdle = x.clientLimit
	x.upIdle = x.upLimit
	x.pumpRun = x.runPump
	return x
}

func (e *Engine) newExchangeFor(c *Conn) *exchange {
	x := e.exchanges.Get().(*exchange)
	x.conn = c
	x.req.reset(c)
	x.scan.reset()
	return x
}

// free puts x back; nothing refers to the request from here on.
func (x *exchange) free() {
	e := x.engine
	e.buffers.put(x.held)
	x.held = nil
	x.out.release()
	x.uout.release()
	x.req.reset(nil)
	x.res.reset()
	x.verdict, x.outcome = Verdict{}, Outcome{}
	x.in = bodyIn{}
	x.single, x.unguard = nil, nil
	x.cost, x.unsent = 0, false
	x.halted.Store(false)
	x.aborted.Store(false)
	x.conn, x.up, x.replay, x.cancel, x.upload = nil, nil, nil, nil, nil
	x.got, x.waiting, x.continued = false, false, false
	x.pump.reset()
	x.h1.reset()
	e.exchanges.Put(x)
}

// since is the time from the request's first byte.
func (x *exchange) since() time.Duration { return x.engine.cfg.Now().Sub(x.outcome.Start) }

// judge asks the session.
func (x *exchange) judge() {
	x.req.judged = true
	x.verdict = x.conn.session.Begin(&x.req)
	x.outcome.Judged = x.since()
	v := &x.verdict
	if v.Status != 0 {
		x.outcome.Reason = ReasonVerdict
		return
	}
	if v.Path == "" {
		v.Path = x.req.Path
	}
	if !v.SetQuery {
		v.Query = x.req.RawQuery
	}
	if v.Host == "" {
		v.Host = x.req.Host
	}
	if !v.writable() {
		// Fails closed: what a normalisation made of the target is no target.
		*v = Verdict{Status: http.StatusBadRequest}
		x.note(fail(0, ReasonMalformed, errTarget))
	}
}

// writable tells whether the verdict's target can be written without becoming another.
func (v *Verdict) writable() bool {
	if v.Path[0] != '/' && v.Path != "*" {
		return false
	}
	for i := range len(v.Path) {
		if c := v.Path[i]; !targetChars[c] || c == '?' || c == '#' {
			return false
		}
	}
	return all(&targetChars, v.Query) && strings.IndexByte(v.Query, '#') < 0 && validHost(v.Host)
}

// report tells the session how it ended.
func (x *exchange) report() {
	x.outcome.Total = x.since()
	x.conn.session.End(&x.req, &x.outcome)
}

// failure is why an exchange did not go as it should.
type failure struct {
	status int // to answer with, if nothing was sent yet
	reason string
	err    error
}

func fail(status int, reason string, err error) *failure { return &failure{status, reason, err} }

func clientGone(err error) *failure { return fail(0, ReasonClientGone, err) }

// note records a failure; the first is the cause.
func (x *exchange) note(f *failure) {
	if x.outcome.Reason == "" {
		x.outcome.Reason, x.outcome.Err = f.reason, f.err
	}
}

// upLimit is how long the upstream may be silent.
func (x *exchange) upLimit() time.Duration {
	if x.waiting && !x.pump.running() {
		return x.engine.cfg.ResponseTimeout
	}
	return x.engine.cfg.StreamIdleTimeout
}

// clientLimit is how long the client may be silent within a body.
func (x *exchange) clientLimit() time.Duration {
	if x.halted.Load() {
		return 0
	}
	if x.pump.discard.Load() {
		return lingerTime
	}
	return x.engine.cfg.StreamIdleTimeout
}

// stream turns on the clock that both directions share: from here on a wait
// ends only when neither moved.
func (x *exchange) stream() {
	if x.up != nil && x.up.wire.busy == nil {
		x.act.touch(x.engine.cfg.Now())
		x.up.wire.busy, x.up.wire.idle = &x.act, x.upIdle
	}
}

// relay copies a body and ends the message. What is buffered is flushed before
// a wait for more, so that streams flow.
func relay(to dst, from body) (readErr, writeErr error) {
	for !from.finished() {
		if !from.ready() {
			if err := to.flush(); err != nil {
				return nil, err
			}
		}
		p, err := to.space()
		if err != nil {
			return nil, err
		}
		n, err := from.read(p)
		if n > 0 {
			if err := to.wrote(n); err != nil {
				return nil, err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err, nil
		}
	}
	return nil, to.finish(from.trailer())
}

// dialFailure maps an error of Dial.
func dialFailure(err error) *failure {
	var se *StatusError
	switch {
	case errors.As(err, &se):
		status := se.Status
		if status < 500 || status > 599 {
			status = http.StatusServiceUnavailable
		}
		return fail(status, se.Reason, err)
	case isTimeout(err), errors.Is(err, context.DeadlineExceeded):
		return fail(http.StatusGatewayTimeout, ReasonDialTimeout, err)
	}
	return fail(http.StatusServiceUnavailable, ReasonDial, err)
}
