package engine

import (
	"net/http"
	"slices"
	"strings"
)

// requestHead writes the head as judged: the verdict's path, query and
// authority, the fields that remain, framing of our own.
func (x *exchange) requestHead() {
	o, r, v := &x.uout, &x.req, &x.verdict
	o.str(r.Method)
	o.str(" ")
	o.str(v.Path)
	if v.Query != "" || r.HasQuery && !v.SetQuery {
		o.str("?")
		o.str(v.Query)
	}
	o.str(" HTTP/1.1\r\n")
	o.field("Host", v.Host)
	for i := range r.fields {
		if f := &r.fields[i]; !v.drops(f.Name) {
			o.field(f.Name, f.Value)
		}
	}
	for i := range v.Set {
		if f := &v.Set[i]; settable(f) {
			o.field(f.Name, f.Value)
		}
	}
	switch {
	case r.ContentLength > 0 || r.ContentLength == 0 && (r.framing.length == 0 || expectsLength(r.Method)):
		o.str("Content-Length: ")
		o.num(r.ContentLength)
		o.str("\r\n")
		o.frame(byLength, r.ContentLength)
	case r.ContentLength < 0:
		o.str("Transfer-Encoding: chunked\r\n")
		o.frame(byChunks, 0)
	}
	if r.expect {
		o.str("Expect: 100-continue\r\n")
	}
	if r.WebSocket {
		o.str("Connection: Upgrade\r\nUpgrade: websocket\r\n")
	}
	o.str("\r\n")
}

// expectsLength: a request of this method without a body says so (RFC 9110 8.6).
func expectsLength(method string) bool {
	return method == "POST" || method == "PUT" || method == "PATCH"
}

// drops tells whether the verdict removes or replaces a field.
func (v *Verdict) drops(name string) bool {
	for _, lower := range v.Remove {
		if equalLower(name, lower) {
			return true
		}
	}
	for i := range v.Set {
		if equalFold(name, v.Set[i].Name) {
			return true
		}
	}
	return false
}

// settable refuses what would change a message's framing or break its head.
// The Session is trusted, but it puts claims of tokens into values.
func settable(f *Field) bool {
	return f.Name != "" && kindOf(f.Name) == endToEnd && all(&tokenChars, f.Name) && all(&valueChars, f.Value)
}

// requestSink sends a request's body upstream.
type requestSink struct{ x *exchange }

func (s *requestSink) space() ([]byte, error) { return s.x.uout.space() }
func (s *requestSink) wrote(n int) error      { return s.x.uout.wrote(n) }
func (s *requestSink) flush() error           { return s.x.uout.flush() }

// finish keeps out of the trailers what the verdict keeps out of the head.
func (s *requestSink) finish(trailer []Field) error {
	return s.x.uout.finish(s.x.requestTrailer(trailer))
}

// underscored: CGI-style applications read "_" as "-", and so another field. A
// head is refused for it; a trailer comes when the request has been forwarded.
func underscored(name string) bool { return strings.IndexByte(name, '_') >= 0 }

func (x *exchange) requestTrailer(trailer []Field) []Field {
	return slices.DeleteFunc(trailer, func(f Field) bool {
		return forbiddenTrailer(f.Name) || underscored(f.Name) || x.verdict.drops(f.Name)
	})
}

func responseTrailer(trailer []Field) []Field {
	return slices.DeleteFunc(trailer, func(f Field) bool { return forbiddenTrailer(f.Name) })
}

// h1Sink writes a response to an HTTP/1 client.
type h1Sink struct {
	x      *exchange
	headed bool
	close  bool // the connection ends with this response
}

func (s *h1Sink) reset()      { s.headed, s.close = false, false }
func (s *h1Sink) begun() bool { return s.headed }

// inform writes an informational response; HTTP/1.0 clients know none.
func (s *h1Sink) inform(res *response) error {
	if s.x.req.Proto == HTTP10 {
		return nil
	}
	s.line(res)
	s.x.out.str("\r\n")
	return s.x.out.flush()
}

func (s *h1Sink) line(res *response) {
	o := &s.x.out
	o.str("HTTP/1.1 ")
	o.num(int64(res.status))
	o.str(" ")
	if res.reason != "" {
		o.str(res.reason)
	} else {
		o.str(http.StatusText(res.status))
	}
	o.str("\r\n")
	for i := range res.fields {
		o.field(res.fields[i].Name, res.fields[i].Value)
	}
}

// start writes the final head and decides framing and whether the connection goes on.
func (s *h1Sink) start(res *response) error {
	x, o := s.x, &s.x.out
	s.headed = true
	x.outcome.Status = res.status
	s.line(res)
	if res.length >= 0 && res.status >= 200 && res.status != http.StatusNoContent {
		o.str("Content-Length: ")
		o.num(res.length)
		o.str("\r\n")
	}
	switch {
	case bodyless(x.req.Method, res.status):
		o.frame(noBody, 0)
	case res.length >= 0:
		o.frame(byLength, res.length)
	case x.req.Proto == HTTP10:
		o.frame(untilClose, 0)
		s.close = true
	default:
		o.frame(byChunks, 0)
		o.str("Transfer-Encoding: chunked\r\n")
	}
	if s.close = s.close || x.lastResponse(res); s.close {
		o.str("Connection: close\r\n")
	}
	o.str("\r\n")
	return nil
}

// lastResponse tells whether the client connection ends with this response.
func (x *exchange) lastResponse(res *response) bool {
	f := &x.req.framing
	switch {
	case f.close, x.req.Proto == HTTP10, x.verdict.Close, x.conn.closing.Load():
		return true
	case !x.sending():
		return false
	case x.req.expect && !x.continued:
		return true // whether a body follows is unknown now
	}
	return !res.keep // an early answer by an upstream that hangs up
}

func (s *h1Sink) space() ([]byte, error) { return s.x.out.space() }
func (s *h1Sink) wrote(n int) error      { return s.x.out.wrote(n) }
func (s *h1Sink) flush() error           { return s.x.out.flush() }
func (s *h1Sink) finish(trailer []Field) error {
	return s.x.out.finish(responseTrailer(trailer))
}
