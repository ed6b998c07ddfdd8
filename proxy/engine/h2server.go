package engine

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/http2"
)

// Flow-control windows: what a stream, and a connection as a whole, may have
// sent that was not yet passed on.
const (
	streamWindow = 256 << 10
	connWindow   = 1 << 20
)

// serveH2 serves an HTTP/2 connection. Each has a server of its own, as that is
// how one connection alone can be told to go away.
func (c *Conn) serveH2(ctx context.Context) {
	cfg := &c.engine.cfg
	base := &http.Server{
		Handler:        http.HandlerFunc(c.handle),
		MaxHeaderBytes: cfg.MaxHeaderBytes,
		IdleTimeout:    cfg.IdleTimeout,
		ErrorLog:       slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	server := &http2.Server{
		MaxConcurrentStreams:         uint32(cfg.MaxStreams),
		MaxReadFrameSize:             16 << 10,
		IdleTimeout:                  cfg.IdleTimeout,
		WriteByteTimeout:             cfg.StreamIdleTimeout,
		MaxUploadBufferPerConnection: connWindow,
		MaxUploadBufferPerStream:     streamWindow,
	}
	if err := http2.ConfigureServer(base, server); err != nil {
		cfg.Log.Error("cannot configure http/2", "error", err)
		return
	}
	c.mu.Lock()
	// Shutdown returns at once: the server has no listener and no HTTP/1 connection.
	c.goAway = func() { _ = base.Shutdown(ctx) }
	c.mu.Unlock()
	base.ConnState = func(_ net.Conn, state http.ConnState) {
		c.streams(state)
		if state == http.StateActive && c.closing.Load() {
			c.goAway() // CloseGracefully came before the library knew the connection
		}
	}
	if c.closing.Load() {
		return
	}
	server.ServeConn(c.conn, &http2.ServeConnOpts{Context: ctx, BaseConfig: base})
}

// handle serves one HTTP/2 request.
func (c *Conn) handle(w http.ResponseWriter, r *http.Request) {
	x := c.engine.newExchangeFor(c)
	x.outcome.Start = c.engine.cfg.Now()
	x.cost = c.costOf(r)
	c.begin(x.outcome.Start, x.cost)
	whole := x.serveStream(w, r)
	if r.Context().Err() != nil && !x.aborted.Load() {
		c.countReset(c.engine.cfg.Now())
	}
	c.endStream(x.outcome.Start.Add(x.outcome.Total), x.cost, x.unsent && r.Context().Err() == nil)
	x.free()
	clear(r.Header) // the library holds on to it for as long as the stream cannot end
	if !whole {
		// The library's only way to reset a stream; it recovers this value silently.
		panic(http.ErrAbortHandler)
	}
}

// serveStream serves one request; false: the stream is to be reset.
func (x *exchange) serveStream(w http.ResponseWriter, r *http.Request) bool {
	to := &h2Sink{x: x, w: w}
	defer to.release()
	defer x.report()
	if err := x.req.fromH2(r, &x.engine.cfg); err != nil {
		var rf *refusal
		if !errors.As(err, &rf) {
			rf = errRequestLine
		}
		x.note(fail(rf.status, rf.reason, err))
		return to.answer(rf.status, "", nil)
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	x.req.abort = func() {
		x.aborted.Store(true)
		cancel(errAborted)
		to.cut()
	}
	x.judge()
	if x.verdict.Status != 0 {
		return to.answer(x.verdict.Status, x.verdict.Body, x.verdict.Header)
	}
	from := &h2Body{x: x, r: r, done: x.req.ContentLength == 0}
	var f *failure
	if x.verdict.Upstream.H2 {
		f = x.forwardH2(ctx, from, to)
	} else {
		dog := x.watch(to, nil) // HTTP/1.1 upstreams have deadlines; a stalled stream has none
		dog.waiting.Store(false)
		f = x.forwardH1(ctx, from, to)
		dog.stop()
	}
	whole := f == nil
	if f != nil {
		switch {
		case x.aborted.Load():
			f = fail(0, ReasonClosed, errAborted)
		case r.Context().Err() != nil:
			f = clientGone(f.err)
		}
		x.note(f)
		whole = f.status != 0 && !to.headed && to.answer(f.status, "", nil)
	}
	if x.single != nil {
		_ = x.single.Close()
	}
	x.finish(from)
	x.outcome.RequestBytes, x.outcome.ResponseBytes = from.total, to.total
	return whole && to.send()
}

// errAborted is why a request ended that the session gave up (Request.Abort).
var errAborted = errors.New("engine: request aborted")

// countReset notes a stream that its client gave up. Who opens streams only to
// reset them costs more than a limit on open streams shows (CVE-2023-44487):
// past two full sets of streams within a second the connection is told to go
// away, and what it opens after that is not served.
func (c *Conn) countReset(now time.Time) {
	c.mu.Lock()
	if now.Sub(c.resetsFrom) > time.Second {
		c.resetsFrom, c.resets = now, 0
	}
	c.resets++
	over := c.resets == max(2*c.engine.cfg.MaxStreams, minResets)
	c.mu.Unlock()
	if over {
		c.engine.cfg.Log.Info("http/2 connection resets its streams too often, closing it", "peer", c.conn.RemoteAddr().String())
		c.CloseGracefully()
	}
}

// minResets is the least bound on resets within a second.
const minResets = 20

// fromH2 fills r from the library's request and holds it to the same rules as HTTP/1.
func (r *Request) fromH2(in *http.Request, cfg *Config) error {
	r.Proto = HTTP2
	r.framing.length = -1
	if err := r.setMethod(in.Method); err != nil {
		return err
	}
	if len(in.RequestURI) == 0 || in.RequestURI[0] != '/' && in.RequestURI != "*" {
		return errTarget
	}
	if _, err := r.setTarget(in.RequestURI, cfg); err != nil {
		return err
	}
	if !validHost(in.Host) {
		return errHost
	}
	r.Host = in.Host
	count := 0
	for name, values := range in.Header {
		if count += len(values); count > cfg.MaxHeaders {
			return errTooManyFields
		}
		if err := r.addAll(name, values); err != nil {
			return err
		}
	}
	if len(in.Trailer) > 0 {
		names := strings.Join(slices.Sorted(maps.Keys(in.Trailer)), ", ")
		r.fields = append(r.fields, Field{"Trailer", names})
	}
	if r.framing.codings > 0 || r.framing.length >= 0 && r.framing.length != in.ContentLength {
		return errLength
	}
	r.ContentLength = in.ContentLength
	return nil
}

func (r *Request) addAll(name string, values []string) error {
	if !all(&tokenChars, name) {
		return errFieldName
	}
	for _, v := range values {
		if !all(&valueChars, v) {
			return errFieldValue
		}
		if equalLower(name, "host") {
			if !equalFold(v, r.Host) {
				return errHostMismatch
			}
			continue
		}
		if err := r.add(Field{name, trimOWS(v)}); err != nil {
			return err
		}
	}
	return nil
}

// h2Body is an HTTP/2 request's body.
type h2Body struct {
	x      *exchange
	r      *http.Request
	done   bool
	total  int64
	fields []Field
}

func (b *h2Body) finished() bool   { return b.done }
func (b *h2Body) ready() bool      { return b.done }
func (b *h2Body) trailer() []Field { return b.fields }

// stop makes a read in progress return.
func (b *h2Body) stop() { _ = b.r.Body.Close() }

func (b *h2Body) read(p []byte) (int, error) {
	n, err := b.r.Body.Read(p)
	b.total += int64(n)
	b.x.act.touch(b.x.engine.cfg.Now())
	if err == io.EOF {
		b.done = true
		for name, values := range b.r.Trailer {
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

// h2Sink writes a response to an HTTP/2 stream.
type h2Sink struct {
	x      *exchange
	w      http.ResponseWriter
	buf    []byte
	headed bool
	dirty  bool // something is there to flush
	total  int64
}

func (s *h2Sink) begun() bool { return s.headed }

func (s *h2Sink) release() {
	s.x.engine.buffers.put(s.buf)
	s.buf = nil
}

// cut resets the stream, so that a write in progress returns.
func (s *h2Sink) cut() {
	_ = http.NewResponseController(s.w).SetWriteDeadline(time.Unix(1, 0))
}

func (s *h2Sink) inform(res *response) error {
	h := s.w.Header()
	for _, f := range res.fields {
		h.Add(strings.Clone(f.Name), strings.Clone(f.Value))
	}
	s.w.WriteHeader(res.status)
	clear(h)
	return nil
}

func (s *h2Sink) start(res *response) error {
	s.headed, s.dirty = true, true
	x := s.x
	x.outcome.Status = res.status
	h := s.w.Header()
	for _, f := range res.fields {
		h.Add(strings.Clone(f.Name), strings.Clone(f.Value))
	}
	if res.length >= 0 && res.status != http.StatusNoContent {
		h.Set("Content-Length", text(appendInt(res.length)))
	}
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // else the library guesses one
	}
	if x.verdict.Close || x.conn.closing.Load() {
		h.Set("Connection", "close") // the library sends GOAWAY
	}
	size := headBuffer
	if res.length < 0 || res.length > headBuffer {
		size = streamBuffer
		s.x.charge(streamBuffer)
	}
	s.buf = x.engine.buffers.get(size)
	s.w.WriteHeader(res.status)
	return nil
}

func (s *h2Sink) space() ([]byte, error) { return s.buf, nil }

func (s *h2Sink) wrote(n int) error {
	_, err := s.w.Write(s.buf[:n])
	s.total += int64(n)
	s.dirty = true
	s.x.act.touch(s.x.engine.cfg.Now())
	return err
}

func (s *h2Sink) flush() error {
	if !s.dirty {
		return nil
	}
	s.dirty = false
	return http.NewResponseController(s.w).Flush()
}

func (s *h2Sink) finish(trailer []Field) error {
	h := s.w.Header()
	for _, f := range responseTrailer(trailer) {
		h.Add(http.TrailerPrefix+strings.Clone(f.Name), strings.Clone(f.Value))
	}
	return nil // the rest goes out as the handler returns
}

// send sends what the library still has of a body, if it is to be sent before the stream
// ends; false: it cannot be. A head alone needs no window, and is to end the stream.
func (s *h2Sink) send() bool {
	if !s.dirty || s.total == 0 {
		return true
	}
	if !s.x.conn.mustSend() {
		s.x.unsent, s.dirty = true, false
		return true
	}
	err := s.flush()
	if err != nil {
		s.x.note(clientGone(err))
	}
	return err == nil
}

// answer sends an answer of our own; it reports that the stream ends whole.
func (s *h2Sink) answer(status int, body string, extra []Field) bool {
	s.headed = true
	s.x.outcome.Status = status
	if body == "" {
		body = http.StatusText(status)
	}
	h := s.w.Header()
	for _, f := range extra {
		if settable(&f) {
			h.Add(f.Name, f.Value)
		}
	}
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Content-Length", text(appendInt(int64(len(body)+1))))
	if s.x.verdict.Close {
		h.Set("Connection", "close")
	}
	s.w.WriteHeader(status)
	n, _ := io.WriteString(s.w, body+"\n")
	s.total, s.dirty = int64(n), true
	return s.send()
}
