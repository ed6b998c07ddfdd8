package engine

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// forwardH2 sends the request to an HTTP/2 upstream and relays the answer.
// Informational responses of the upstream are not passed on; "100 Continue" is
// the engine's own there, sent when the upstream's flow control first takes the body.
func (x *exchange) forwardH2(ctx context.Context, from body, to sink) *failure {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	x.cancel = cancel
	if !x.conn.h2 && !x.conn.attachCancel(cancel) {
		return fail(0, ReasonClosed, io.ErrClosedPipe)
	}
	req := x.h2Request(context.WithValue(ctx, exchangeKey{}, x), from, to)
	w := x.watch(to, cancel)
	defer w.stop()
	res, err := x.engine.h2.transport.RoundTrip(req)
	if err != nil {
		return x.h2Failure(w, err)
	}
	w.waiting.Store(false)
	defer func() {
		// Close waits for the request's body unless the request has been given up:
		// a server may end a stream whose client has not.
		cancel(nil)
		_ = res.Body.Close()
	}()
	x.outcome.FirstByte = x.since()
	x.h2Head(res)
	if err := x.startLocked(to); err != nil {
		return clientGone(err)
	}
	in := &h2Response{x: x, res: res, done: x.res.mode == noBody}
	readErr, writeErr := relay(to, in)
	x.trailerStatus(in.fields)
	switch {
	case writeErr != nil && w.expired.Load():
		return fail(0, ReasonBodyTimeout, writeErr)
	case writeErr != nil:
		return clientGone(writeErr)
	case readErr != nil:
		return x.h2Failure(w, readErr)
	}
	return nil
}

// startLocked hands the final head over; from then on the upload writes no "100 Continue".
func (x *exchange) startLocked(to sink) error {
	if x.upload != nil {
		x.upload.client.Lock()
		defer x.upload.client.Unlock()
	}
	return to.start(&x.res)
}

// h2Failure maps what went wrong on the upstream's side.
func (x *exchange) h2Failure(w *watchdog, err error) *failure {
	var de *dialError
	var se *StatusError
	if x.upload != nil {
		if f := x.upload.failure(); f != nil {
			return f
		}
	}
	switch {
	case errors.As(err, &de):
		return de.f
	case errors.As(err, &se):
		return dialFailure(se)
	case w.expired.Load() && w.waiting.Load():
		return fail(http.StatusGatewayTimeout, ReasonResponseTimeout, err)
	case w.expired.Load():
		return fail(http.StatusGatewayTimeout, ReasonBodyTimeout, err)
	case errors.Is(err, context.Canceled):
		return clientGone(err)
	}
	return fail(http.StatusBadGateway, ReasonReset, err)
}

// h2Request builds the upstream request as judged.
func (x *exchange) h2Request(ctx context.Context, from body, to sink) *http.Request {
	r, v := &x.req, &x.verdict
	scheme := v.Upstream.Scheme
	if scheme == "" {
		scheme = "http"
	}
	header := make(http.Header, len(r.fields)+len(v.Set))
	for _, f := range r.fields {
		if !v.drops(f.Name) && !equalLower(f.Name, "trailer") {
			header.Add(strings.Clone(f.Name), strings.Clone(f.Value))
		}
	}
	for _, f := range v.Set {
		if settable(&f) {
			header.Add(strings.Clone(f.Name), strings.Clone(f.Value))
		}
	}
	if r.framing.trailers {
		header.Set("Te", "trailers")
	}
	if header["User-Agent"] == nil {
		header["User-Agent"] = []string{""} // else the transport names itself
	}
	// Opaque is sent as it is. Where it would be read as an authority, it is
	// given one, which the transport takes off again.
	opaque, host := strings.Clone(v.Path), strings.Clone(v.Host)
	if strings.HasPrefix(opaque, "//") {
		opaque = scheme + "://" + host + opaque
	}
	u := &url.URL{Scheme: scheme, Host: host, Opaque: opaque, RawQuery: strings.Clone(v.Query)}
	u.ForceQuery = v.Query == "" && r.HasQuery && !v.SetQuery
	req := (&http.Request{
		Method: strings.Clone(r.Method), URL: u, Host: host, Header: header,
		Proto: "HTTP/2.0", ProtoMajor: 2, ContentLength: r.ContentLength,
	}).WithContext(ctx)
	if r.ContentLength != 0 {
		x.upload = &upload{x: x, from: from, to: to, req: req}
		req.Body = x.upload
		req.Trailer = x.declaredTrailers()
	}
	return req
}

// declaredTrailers are the trailer fields the client announced and that may
// pass: HTTP/2's client sends no others.
func (x *exchange) declaredTrailers() http.Header {
	var declared http.Header
	for _, list := range x.req.Values("trailer") {
		for list != "" {
			var name string
			name, list = cutOption(list)
			if name == "" || !all(&tokenChars, name) || forbiddenTrailer(name) || underscored(name) || x.verdict.drops(name) || len(declared) == maxTrailers {
				continue
			}
			if declared == nil {
				declared = http.Header{}
			}
			declared[http.CanonicalHeaderKey(strings.Clone(name))] = nil
		}
	}
	return declared
}

// h2Head makes an HTTP/2 response's head look like any other.
func (x *exchange) h2Head(res *http.Response) {
	s := &x.res
	s.reset()
	s.status, s.length, s.keep = res.StatusCode, res.ContentLength, true
	s.mode = untilClose
	if bodyless(x.req.Method, res.StatusCode) {
		s.mode = noBody
	} else if len(res.Trailer) > 0 {
		s.length = -1 // HTTP/1 has trailers only after chunks
	}
	for name, values := range res.Header {
		if kindOf(name) != endToEnd {
			continue
		}
		for _, v := range values {
			s.fields = append(s.fields, Field{name, v})
		}
	}
	x.trailerStatus(s.fields) // trailers-only
}

// h2Response is the body of an HTTP/2 upstream's response.
type h2Response struct {
	x      *exchange
	res    *http.Response
	done   bool
	fields []Field
}

func (b *h2Response) finished() bool   { return b.done }
func (b *h2Response) trailer() []Field { return b.fields }

// ready is true of an empty body, so that the head and the stream's end (a
// gRPC trailers-only response) stay one frame.
func (b *h2Response) ready() bool { return b.done || b.res.ContentLength == 0 }

func (b *h2Response) read(p []byte) (int, error) {
	n, err := b.res.Body.Read(p)
	b.x.act.touch(b.x.engine.cfg.Now())
	if err == io.EOF {
		b.done = true
		for name, values := range b.res.Trailer {
			for _, v := range values {
				b.fields = append(b.fields, Field{name, v})
			}
		}
	}
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

// upload is the request's body as the HTTP/2 client reads it, from a goroutine
// of its own that may outlive the response.
type upload struct {
	x    *exchange
	from body
	to   sink
	req  *http.Request

	client sync.Mutex // who writes to an HTTP/1 client: "100 Continue" or the head
	ended  atomic.Bool

	mu      sync.Mutex // held while reading
	stopped bool
	err     error
}

// Read implements io.Reader for the transport.
func (u *upload) Read(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.stopped {
		return 0, errCut
	}
	u.proceed()
	n, err := u.from.read(p)
	u.x.act.touch(u.x.engine.cfg.Now())
	if u.from.finished() {
		u.ended.Store(true)
		for _, f := range u.from.trailer() {
			name := http.CanonicalHeaderKey(f.Name)
			if _, declared := u.req.Trailer[name]; declared {
				u.req.Trailer[name] = append(u.req.Trailer[name], f.Value)
			}
		}
		if err == nil {
			err = io.EOF
		}
	} else if err != nil {
		u.err = err
	}
	return n, err
}

// proceed tells an HTTP/1 client that waits for it to send its body.
func (u *upload) proceed() {
	x := u.x
	if !x.req.expect || x.continued {
		return
	}
	u.client.Lock()
	defer u.client.Unlock()
	if x.continued || u.to.begun() {
		return
	}
	x.continued = true
	_ = u.to.inform(&response{status: http.StatusContinue}) // the body's read fails too
}

// Close implements io.Closer for the transport, which may call it during Read.
func (u *upload) Close() error { return nil }

// failure is the client's own fault in its body, or nil.
func (u *upload) failure() *failure {
	u.mu.Lock()
	defer u.mu.Unlock()
	return bodyFailure(u.err)
}

// stop ends reading and waits until nobody does.
func (u *upload) stop() {
	c := u.x.conn
	u.x.cutUpstream()
	u.x.halted.Store(true)
	if b, ok := u.from.(*h2Body); ok {
		b.stop()
	} else if !u.ended.Load() {
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.stopped = true
	if !c.h2 {
		c.wire.readBy = time.Time{}
		c.wire.busy, c.wire.idle = nil, nil
	}
}

// watchdog ends an exchange of which neither side moves, where no read deadline
// can: HTTP/2 streams.
type watchdog struct {
	x       *exchange
	to      sink
	cancel  context.CancelCauseFunc // of the upstream request; nil for HTTP/1.1
	waiting atomic.Bool             // for the response's head
	expired atomic.Bool

	mu      sync.Mutex
	timer   *time.Timer
	stopped bool
}

func (x *exchange) watch(to sink, cancel context.CancelCauseFunc) *watchdog {
	w := &watchdog{x: x, to: to, cancel: cancel}
	w.waiting.Store(true)
	x.act.touch(x.engine.cfg.Now())
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(min(x.engine.cfg.ResponseTimeout, x.engine.cfg.StreamIdleTimeout), w.look)
	return w
}

func (w *watchdog) limit() time.Duration {
	if w.waiting.Load() && !w.x.sending() {
		return w.x.engine.cfg.ResponseTimeout
	}
	return w.x.engine.cfg.StreamIdleTimeout
}

func (w *watchdog) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return
	}
	limit, idle := w.limit(), w.x.act.since(w.x.engine.cfg.Now())
	if idle < limit {
		w.timer.Reset(limit - idle)
		return
	}
	w.expired.Store(true)
	if w.cancel != nil {
		w.cancel(errCut)
	}
	if s, ok := w.to.(*h2Sink); ok {
		s.cut()
	}
}

// stop returns once the watchdog cannot touch the exchange any more.
func (w *watchdog) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	w.timer.Stop()
}

var _ http2.ClientConnPool = (*h2Pool)(nil)
