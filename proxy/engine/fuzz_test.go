package engine

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"
	"testing"
	"time"
)

// bytesConn is a connection with fixed input.
type bytesConn struct {
	net.Conn
	in io.Reader
}

func (c *bytesConn) Read(p []byte) (int, error)       { return c.in.Read(p) }
func (c *bytesConn) SetReadDeadline(time.Time) error  { return nil }
func (c *bytesConn) SetWriteDeadline(time.Time) error { return nil }
func (c *bytesConn) Close() error                     { return nil }

// parseWhole reads a request from input, head and body, as serveOne does.
func parseWhole(e *Engine, input io.Reader) (x *exchange, body []byte, bodyErr, err error) {
	c := e.NewConn(&bytesConn{in: input}, false, nil)
	if !c.await() {
		return nil, nil, nil, io.EOF
	}
	x = e.newExchangeFor(c)
	if err := x.readRequest(); err != nil {
		return nil, nil, nil, err
	}
	x.startBody()
	x.held = c.wire.take(headBuffer)
	var out bytes.Buffer
	buf := make([]byte, 64)
	for !x.in.finished() {
		n, err := x.in.read(buf)
		out.Write(buf[:n])
		if err != nil && !errors.Is(err, io.EOF) {
			return x, out.Bytes(), err, nil
		}
	}
	return x, out.Bytes(), nil, nil
}

var fuzzSeeds = []string{
	"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
	"GET /a%2f?b#c HTTP/1.1\r\nHost: h:80\r\nX: y\r\nx:  z \r\n\r\n",
	"GET http://h/a HTTP/1.0\r\nHost: H\r\nConnection: close, x\r\nX: y\r\n\r\n",
	"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
	"POST //x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n",
	"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX-T: y\r\n\r\nrest",
	"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
	"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n",
	"GET / HTTP/1.1\nHost: h\n\n",
	"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}

// FuzzRequest: whatever we accept, net/http accepts and reads the same, to the
// last byte: method, target, authority, fields, body and where the next request begins.
func FuzzRequest(f *testing.F) {
	for _, s := range fuzzSeeds {
		f.Add([]byte(s))
	}
	e := New(Config{})
	f.Fuzz(func(t *testing.T, input []byte) {
		x, body, bodyErr, err := parseWhole(e, bytes.NewReader(input))
		if err != nil {
			return
		}
		defer x.free()
		r := &x.req
		reader := bufio.NewReader(bytes.NewReader(input))
		want, err := http.ReadRequest(reader)
		if err != nil && strings.Contains(r.Target, "#") {
			return // net/http knows no fragments in targets; we forward none
		}
		if err != nil {
			t.Fatalf("accepted what net/http refuses: %v", err)
		}
		checkHead(t, r, want)
		checkForwarded(t, x)
		theirs, theirErr := io.ReadAll(want.Body)
		switch {
		case bodyErr == nil && (theirErr != nil || !bytes.Equal(body, theirs)):
			t.Fatalf("body %q, net/http reads %q, %v", body, theirs, theirErr)
		case bodyErr == nil:
			rest := x.conn.wire.buf[x.conn.wire.r:x.conn.wire.w]
			more, _ := io.ReadAll(x.conn.conn)
			their, _ := io.ReadAll(reader)
			if ours := string(rest) + string(more); ours != string(their) {
				t.Fatalf("the next request begins at %q, for net/http at %q", ours, their)
			}
		}
	})
}

func checkHead(t *testing.T, r *Request, want *http.Request) {
	t.Helper()
	if r.Method != want.Method || !strings.EqualFold(r.Host, want.Host) {
		t.Fatalf("%q %q, net/http has %q %q", r.Method, r.Host, want.Method, want.Host)
	}
	// net/http keeps a fragment of a request target within the path or query.
	if !strings.Contains(r.Target, "#") {
		target := r.Path
		if r.HasQuery {
			target += "?" + r.RawQuery
		}
		u, err := url.ParseRequestURI(target)
		if err != nil || u.Path != want.URL.Path && want.URL.Path != "" || u.RawQuery != want.URL.RawQuery {
			t.Fatalf("target %q is %+v (%v), net/http has %+v", target, u, err, want.URL)
		}
	}
	if length := want.ContentLength; r.ContentLength != length {
		t.Fatalf("length %d, net/http has %d", r.ContentLength, length)
	}
	if r.Proto == HTTP10 != (want.ProtoMinor == 0) {
		t.Fatalf("version %v, net/http has %s", r.Proto, want.Proto)
	}
	if want.Close && !r.framing.close && r.Proto != HTTP10 {
		t.Fatal("net/http closes, we do not")
	}
	for _, f := range r.fields {
		found := false
		for _, v := range want.Header[textproto.CanonicalMIMEHeaderKey(f.Name)] {
			found = found || v == f.Value
		}
		if !found && !equalLower(f.Name, "trailer") {
			t.Fatalf("field %q, net/http has %q", f, want.Header)
		}
	}
}

// checkForwarded: the head we write is read by net/http as it was judged.
func checkForwarded(t *testing.T, x *exchange) {
	t.Helper()
	r := &x.req
	x.verdict = Verdict{Path: r.Path, Query: r.RawQuery, Host: r.Host, Set: []Field{{"X-Forwarded-Client-Cert", "ours"}}}
	x.uout.begin(&x.conn.wire, time.Second)
	x.requestHead()
	sent, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(x.uout.buf[:x.uout.n])))
	if err != nil {
		t.Fatalf("wrote %q: %v", x.uout.buf[:x.uout.n], err)
	}
	target := r.Path
	if r.HasQuery {
		target += "?" + r.RawQuery
	}
	if sent.Method != r.Method || sent.RequestURI != target || sent.Host != r.Host || sent.ContentLength != r.ContentLength {
		t.Fatalf("judged %+v, wrote %q", r, x.uout.buf[:x.uout.n])
	}
	if got := sent.Header["X-Forwarded-Client-Cert"]; len(got) != 1 || got[0] != "ours" {
		t.Fatalf("client certificate header is %q", got)
	}
	for _, name := range []string{"Te", "Keep-Alive", "Proxy-Connection", "Proxy-Authorization", "Http2-Settings"} {
		if sent.Header[name] != nil {
			t.Fatalf("forwarded %s", name)
		}
	}
}

// FuzzSplit: a request means the same however its bytes arrive.
func FuzzSplit(f *testing.F) {
	for _, s := range fuzzSeeds {
		f.Add([]byte(s), byte(3))
	}
	e := New(Config{})
	f.Fuzz(func(t *testing.T, input []byte, size byte) {
		x, body, bodyErr, err := parseWhole(e, bytes.NewReader(input))
		y, body2, bodyErr2, err2 := parseWhole(e, &smallReads{bytes.NewReader(input), int(size%16) + 1})
		if (err == nil) != (err2 == nil) || !errors.Is(err2, err) && !errors.Is(err, err2) {
			t.Fatalf("at once %v, piecemeal %v", err, err2)
		}
		if err != nil {
			return
		}
		defer x.free()
		defer y.free()
		if x.req.Target != y.req.Target || x.req.Host != y.req.Host || len(x.req.fields) != len(y.req.fields) {
			t.Fatalf("at once %+v, piecemeal %+v", x.req, y.req)
		}
		if !bytes.Equal(body, body2) || (bodyErr == nil) != (bodyErr2 == nil) {
			t.Fatalf("at once %q %v, piecemeal %q %v", body, bodyErr, body2, bodyErr2)
		}
	})
}

type smallReads struct {
	r io.Reader
	n int
}

func (s *smallReads) Read(p []byte) (int, error) { return s.r.Read(p[:min(len(p), s.n)]) }

// FuzzResponse: a response head that we accept is one that net/http accepts,
// with the same status and framing.
func FuzzResponse(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
		"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"HTTP/1.0 404 Not Found\r\nConnection: keep-alive\r\n\r\n",
		"HTTP/1.1 204 No Content\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		var scan headScan
		n, err := scan.scan(input, 200)
		if err != nil || n == 0 {
			return
		}
		var s response
		if s.parse(input[:n], &scan, "GET") != nil {
			return
		}
		want, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(input)), &http.Request{Method: "GET"})
		if err != nil {
			t.Fatalf("accepted what net/http refuses: %v", err)
		}
		if s.status != want.StatusCode {
			t.Fatalf("status %d, net/http has %d", s.status, want.StatusCode)
		}
		if chunked := len(want.TransferEncoding) > 0; chunked != (s.mode == byChunks) {
			t.Fatalf("mode %d, net/http chunked %v", s.mode, chunked)
		}
		if s.mode == byLength && s.length != want.ContentLength {
			t.Fatalf("length %d, net/http has %d", s.length, want.ContentLength)
		}
	})
}
