package engine_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"castellan.dev/proxy/engine"
)

// scripted serves each request of a connection with the next response; "" closes it.
func scripted(t testing.TB, responses ...string) string {
	return rawApp(t, func(c net.Conn, r *bufio.Reader) {
		for _, res := range responses {
			req, err := http.ReadRequest(r)
			if err != nil || res == "" {
				return
			}
			io.Copy(io.Discard, req.Body)
			io.WriteString(c, res)
		}
	})
}

func TestPipelining(t *testing.T) {
	f := start(t, engine.Config{}, &session{addr: app(t, echo)}, false)
	c := connect(t, f.addr)
	c.send("GET /1 HTTP/1.1\r\nHost: h\r\n\r\nPOST /2 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc" +
		"POST /3 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nxyz\r\n0\r\n\r\nGET /4 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\nGET /5")
	for i, want := range []string{"", "abc", "xyz", ""} {
		res, body := c.response("GET")
		if p := res.Header.Get("X-Path"); p != fmt.Sprintf("/%d", i+1) || body != want {
			t.Errorf("response %d is of %s with %q", i+1, p, body)
		}
	}
	c.closed()
}

func TestPiecemealHead(t *testing.T) {
	f := start(t, engine.Config{}, &session{addr: app(t, echo)}, false)
	c := connect(t, f.addr)
	for _, b := range []byte("POST /x HTTP/1.1\r\nHost: h\r\nX-Long: " + strings.Repeat("v", 3000) + "\r\nContent-Length: 2\r\n\r\nhi") {
		c.Write([]byte{b})
	}
	if res, body := c.response("POST"); res.StatusCode != 200 || body != "hi" {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
}

func TestBodylessResponses(t *testing.T) {
	tests := []struct{ name, method, response, length string }{
		{"HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "5"},
		{"HEAD, chunked", "HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ""},
		{"204", "GET", "HTTP/1.1 204 No Content\r\n\r\n", ""},
		{"204 with length", "GET", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", ""},
		{"304", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "5"},
		{"empty", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "0"},
		{"no reason", "GET", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := start(t, engine.Config{}, &session{addr: scripted(t, tt.response, tt.response)}, false)
			c := connect(t, f.addr)
			for range 2 {
				c.send("%s / HTTP/1.1\r\nHost: h\r\n\r\n", tt.method)
				res, body := c.response(tt.method)
				if body != "" || res.Header.Get("Content-Length") != tt.length || res.Close {
					t.Errorf("got %q %v close %v, want no body and length %q", body, res.Header, res.Close, tt.length)
				}
			}
		})
	}
}

func TestResponseUntilClose(t *testing.T) {
	addr := scripted(t, "HTTP/1.1 200 OK\r\n\r\nhello")
	f := start(t, engine.Config{}, &session{addr: addr}, false)
	c := connect(t, f.addr)
	c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	res, body := c.response("GET")
	if body != "hello" || len(res.TransferEncoding) != 1 || res.Close {
		t.Errorf("got %q, %v, close %v; want it chunked and the connection kept", body, res.TransferEncoding, res.Close)
	}
	c.send("GET / HTTP/1.0\r\nHost: h\r\n\r\n")
	if res, body := c.response("GET"); body != "hello" || len(res.TransferEncoding) != 0 {
		t.Errorf("HTTP/1.0 got %q, %v", body, res.TransferEncoding)
	}
	c.closed()
}

// TestCutResponse: a response the upstream cuts short is cut for the client too,
// never ended as if it were whole.
func TestCutResponse(t *testing.T) {
	for name, head := range map[string]string{"length": "Content-Length: 10\r\n\r\n", "chunked": "Transfer-Encoding: chunked\r\n\r\na\r\n"} {
		t.Run(name, func(t *testing.T) {
			s := &session{addr: scripted(t, "HTTP/1.1 200 OK\r\n"+head+"hello")}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
			res, err := http.ReadResponse(c.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if body, err := io.ReadAll(res.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("read %q, %v; want it cut", body, err)
			}
			if o := s.outcomes(t, 1)[0]; o.Reason != engine.ReasonReset || o.Status != 200 {
				t.Errorf("outcome %+v", o)
			}
		})
	}
}

func TestTrailers(t *testing.T) {
	mixes(t, engine.Config{}, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.Header().Set("Trailer", "X-Sum")
		io.Copy(w, r.Body)
		w.Header().Set("X-Sum", "got "+r.Trailer.Get("X-Req")+r.Trailer.Get("Authorization")+r.Trailer.Get("X-Forwarded-Client-Cert")+strings.Join(r.Trailer["X_forwarded_client_cert"], ""))
	}, func(t *testing.T, f *front, c *http.Client) {
		inner := f.session.begin
		f.session.begin = func(r *engine.Request) engine.Verdict {
			v := inner(r)
			v.Set = []engine.Field{{Name: "X-Forwarded-Client-Cert", Value: "ours"}}
			return v
		}
		req, _ := http.NewRequest("POST", "http://"+f.addr+"/", io.MultiReader(strings.NewReader("hello")))
		req.Trailer = http.Header{"X-Req": {"sum"}, "X-Forwarded-Client-Cert": {"spoofed"}, "X_forwarded_client_cert": {"spoofed"}}
		if strings.HasPrefix(t.Name(), "TestTrailers/h1") {
			req.Trailer.Set("Authorization", "no") // HTTP/2 libraries refuse it themselves
		}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || string(body) != "hello" || res.Trailer.Get("X-Sum") != "got sum" {
			t.Errorf("got %q, %v, trailers %v", body, err, res.Trailer)
		}
	})
}

func TestInformational(t *testing.T) {
	addr := scripted(t, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	f := start(t, engine.Config{}, &session{addr: addr}, false)
	c := connect(t, f.addr)
	c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	if res, _ := c.response("GET"); res.StatusCode != 103 || res.Header.Get("Link") == "" || res.Header.Get("X-Hop") != "" {
		t.Errorf("got %d %v, want the hint without fields of the hop", res.StatusCode, res.Header)
	}
	if res, _ := c.response("GET"); res.StatusCode != 200 {
		t.Errorf("then %d, want 200: nobody asked for a 100", res.StatusCode)
	}
	c.send("GET / HTTP/1.0\r\nHost: h\r\n\r\n")
	if res, _ := c.response("GET"); res.StatusCode != 200 {
		t.Errorf("HTTP/1.0 got %d", res.StatusCode)
	}
}

func TestExpectContinue(t *testing.T) {
	const head = "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("passed on, h2 upstream %v", h2), func(t *testing.T) {
			s := &session{}
			if s.addr = app(t, echo); h2 {
				s.addr = h2app(t, http.HandlerFunc(echo))
			}
			s.begin = func(*engine.Request) engine.Verdict {
				return engine.Verdict{Upstream: engine.Upstream{Key: s.addr, H2: h2}}
			}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			for range 2 {
				c.send(head)
				if res, _ := c.response("POST"); res.StatusCode != 100 {
					t.Fatalf("got %d, want 100", res.StatusCode)
				}
				c.send("hello")
				if res, body := c.response("POST"); res.StatusCode != 200 || body != "hello" {
					t.Fatalf("got %d %q", res.StatusCode, body)
				}
			}
		})
	}
	t.Run("policy is judged before continue", func(t *testing.T) {
		s := &session{begin: func(*engine.Request) engine.Verdict { return engine.Verdict{Status: 403} }}
		f := start(t, engine.Config{}, s, false)
		c := connect(t, f.addr)
		c.send(head)
		if res, body := c.response("POST"); res.StatusCode != 403 || !res.Close || body != "Forbidden\n" {
			t.Errorf("got %d close %v %q", res.StatusCode, res.Close, body)
		}
		c.closed()
	})
	t.Run("pitfall: final answer instead of continue (CVE-2024-24791)", func(t *testing.T) {
		s := &session{addr: rawApp(t, func(c net.Conn, r *bufio.Reader) {
			http.ReadRequest(r)
			io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
			r.ReadByte()
		})}
		f := start(t, engine.Config{}, s, false)
		c := connect(t, f.addr)
		c.send(head)
		// Whether five bytes of body follow is unknown, so the connection must end.
		if res, _ := c.response("POST"); res.StatusCode != 413 || !res.Close {
			t.Errorf("got %d close %v", res.StatusCode, res.Close)
		}
		c.closed()
	})
}

func TestDenied(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2 %v", h2), func(t *testing.T) {
			s := &session{begin: func(*engine.Request) engine.Verdict {
				return engine.Verdict{Status: 401, Body: "unauthorized", Header: []engine.Field{{"WWW-Authenticate", "Bearer"}, {"Bad", "a\nb"}}}
			}}
			f := start(t, engine.Config{}, s, h2)
			c := h1client(t)
			if h2 {
				c = h2client(t)
			}
			for _, size := range []int{0, 10, 5000, 60 << 10} {
				res, err := c.Post("http://"+f.addr+"/", "", strings.NewReader(strings.Repeat("x", size)))
				if err != nil {
					t.Fatalf("size %d: %v", size, err)
				}
				body, _ := io.ReadAll(res.Body)
				res.Body.Close()
				if res.StatusCode != 401 || string(body) != "unauthorized\n" || res.Header.Get("WWW-Authenticate") != "Bearer" || len(res.Header["Bad"]) != 0 || res.Close {
					t.Errorf("size %d: got %d %q %v close %v", size, res.StatusCode, body, res.Header, res.Close)
				}
			}
			if s.dials != 0 {
				t.Errorf("%d dials for denied requests", s.dials)
			}
		})
	}
}

// TestEarlyResponse: the answer comes while the body is still being sent; the
// client gets it whole, and the connection ends.
func TestEarlyResponse(t *testing.T) {
	for _, hangup := range []bool{false, true} {
		t.Run(fmt.Sprintf("upstream hangs up %v", hangup), func(t *testing.T) {
			s := &session{addr: rawApp(t, func(c net.Conn, r *bufio.Reader) {
				http.ReadRequest(r)
				if hangup {
					io.WriteString(c, "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 5\r\n\r\nlarge")
					return
				}
				io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge")
				io.Copy(io.Discard, r)
			})}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			c.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100000000\r\n\r\nabc")
			res, body := c.response("POST")
			if res.StatusCode != 413 || body != "large" {
				t.Errorf("got %d %q", res.StatusCode, body)
			}
			c.closed()
			if o := s.outcomes(t, 1)[0]; o.Status != 413 {
				t.Errorf("outcome %+v", o)
			}
		})
	}
}

// TestStreams: both directions flow at once, byte by byte.
func TestStreams(t *testing.T) {
	mixes(t, engine.Config{}, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		rc.EnableFullDuplex()
		rc.Flush()
		b := make([]byte, 1)
		for {
			if _, err := r.Body.Read(b); err != nil {
				return
			}
			w.Write(b)
			rc.Flush()
		}
	}, func(t *testing.T, f *front, c *http.Client) {
		pr, pw := io.Pipe()
		req, _ := http.NewRequest("POST", "http://"+f.addr+"/", pr)
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		for i := range 20 {
			if _, err := pw.Write([]byte{byte(i)}); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 1)
			if _, err := io.ReadFull(res.Body, got); err != nil || got[0] != byte(i) {
				t.Fatalf("echo %d: %v %v", i, got, err)
			}
		}
		pw.Close()
		if n, err := io.Copy(io.Discard, res.Body); n != 0 || err != nil {
			t.Errorf("after the end: %d bytes, %v", n, err)
		}
	})
}

// TestClientGoes: a client that goes away mid-stream ends the upstream's request.
func TestClientGoes(t *testing.T) {
	gone := make(chan struct{}, 4)
	mixes(t, engine.Config{}, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		rc.Flush()
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 1000)); err != nil || rc.Flush() != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		gone <- struct{}{}
	}, func(t *testing.T, f *front, c *http.Client) {
		ctx, cancel := context.WithCancel(context.Background())
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+f.addr+"/", nil)
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		io.ReadFull(res.Body, make([]byte, 10))
		cancel()
		res.Body.Close()
		select {
		case <-gone:
		case <-time.After(10 * time.Second):
			t.Fatal("the upstream still sends")
		}
		if o := f.session.outcomes(t, 1)[0]; o.Reason != engine.ReasonClientGone {
			t.Errorf("outcome %+v", o)
		}
	})
}

// TestRetry holds RFC 9110 9.2.2: what may have been applied is sent again only
// if applying it twice is the same.
func TestRetry(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	tests := []struct {
		name, request string
		status        int
	}{
		{"idempotent", "GET / HTTP/1.1\r\nHost: h\r\n\r\n", 200},
		{"idempotent with a body", "PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi", 200},
		{"not idempotent", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi", 502},
		{"streamed body", "PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", 502},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			// The first connection takes a second request and hangs up without a word.
			var conns atomic.Int32
			s := &session{addr: rawApp(t, func(c net.Conn, r *bufio.Reader) {
				first := conns.Add(1) == 1
				for i := 0; ; i++ {
					req, err := http.ReadRequest(r)
					if err != nil || first && i == 1 {
						return
					}
					io.Copy(io.Discard, req.Body)
					io.WriteString(c, ok)
				}
			})}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
			c.response("GET")
			c.send(tt.request)
			res, _ := c.response("GET")
			o := s.outcomes(t, 2)[1]
			if res.StatusCode != tt.status || o.Retried != (tt.status == 200) {
				t.Errorf("got %d, outcome %+v; want %d", res.StatusCode, o, tt.status)
			}
		})
	}
}

// TestClosedIdleUpstream: a connection that the upstream closed while it was
// idle is noticed before anything is sent on it, so that even a POST succeeds.
func TestClosedIdleUpstream(t *testing.T) {
	hungUp := make(chan struct{})
	s := &session{addr: rawApp(t, func(c net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		io.Copy(io.Discard, req.Body)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		hungUp <- struct{}{} // once the response was relayed
		c.Close()
		hungUp <- struct{}{}
	})}
	f := start(t, engine.Config{}, s, false)
	c := connect(t, f.addr)
	for i := range 4 {
		c.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi")
		if res, _ := c.response("POST"); res.StatusCode != 200 {
			t.Fatalf("got %d", res.StatusCode)
		}
		s.outcomes(t, i+1)
		<-hungUp
		<-hungUp
	}
}

// TestUnaskedBytes: bytes that an upstream sends after its response never
// become the answer to another request.
func TestUnaskedBytes(t *testing.T) {
	const evil = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
	s := &session{addr: scripted(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"+evil)}
	f := start(t, engine.Config{}, s, false)
	c := connect(t, f.addr)
	for range 3 {
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		if _, body := c.response("GET"); body != "ok" {
			t.Fatalf("got %q", body)
		}
	}
}

func TestDialFailures(t *testing.T) {
	tests := []struct {
		name   string
		err    error
		status int
		reason string
	}{
		{"refused", errors.New("connection refused at 10.1.2.3"), 503, engine.ReasonDial},
		{"timeout", context.DeadlineExceeded, 504, engine.ReasonDialTimeout},
		{"identity", fmt.Errorf("dial: %w", &engine.StatusError{Status: 502, Reason: "peer_identity", Err: errors.New("is spiffe://x/y")}), 502, "peer_identity"},
		{"odd status", &engine.StatusError{Status: 200, Reason: "odd"}, 503, "odd"},
	}
	for _, tt := range tests {
		for _, h2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, h2 %v", tt.name, h2), func(t *testing.T) {
				s := &session{dial: func(context.Context, *engine.Request) (net.Conn, error) { return nil, tt.err }}
				s.begin = func(*engine.Request) engine.Verdict {
					return engine.Verdict{Upstream: engine.Upstream{Key: "k", H2: h2}}
				}
				f := start(t, engine.Config{}, s, false)
				c := connect(t, f.addr)
				c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
				res, body := c.response("GET")
				if res.StatusCode != tt.status || body != http.StatusText(tt.status)+"\n" {
					t.Errorf("got %d %q, want %d", res.StatusCode, body, tt.status)
				}
				if o := s.outcomes(t, 1)[0]; o.Reason != tt.reason || !errors.Is(o.Err, tt.err) {
					t.Errorf("outcome %+v", o)
				}
			})
		}
	}
}

// TestUnwritableVerdict: a path that cannot be written as it was judged is refused.
func TestUnwritableVerdict(t *testing.T) {
	tests := []struct {
		name string
		v    engine.Verdict
	}{
		{"path: space", engine.Verdict{Path: "/a b"}},
		{"path: CR LF", engine.Verdict{Path: "/a\r\nX: y"}},
		{"path: question mark", engine.Verdict{Path: "/a?b"}},
		{"path: fragment", engine.Verdict{Path: "/a#b"}},
		{"path: relative", engine.Verdict{Path: "a"}},
		{"query: space", engine.Verdict{SetQuery: true, Query: "a b"}},
		{"query: fragment", engine.Verdict{SetQuery: true, Query: "a#b"}},
		{"host: list", engine.Verdict{Host: "a,b"}},
	}
	for _, tt := range tests {
		for _, h2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, h2 %v", tt.name, h2), func(t *testing.T) {
				s := &session{begin: func(*engine.Request) engine.Verdict { return tt.v }}
				f := start(t, engine.Config{}, s, h2)
				c := h1client(t)
				if h2 {
					c = h2client(t)
				}
				res, err := c.Get("http://" + f.addr + "/")
				if err != nil {
					t.Fatal(err)
				}
				res.Body.Close()
				if o := s.outcomes(t, 1)[0]; res.StatusCode != 400 || o.Reason != engine.ReasonMalformed || s.dials != 0 {
					t.Errorf("got %d, outcome %+v, %d dials", res.StatusCode, o, s.dials)
				}
			})
		}
	}
}

// TestEarlyResponseSlowClient: a client that trickles a body nobody wants does
// not hold the connection.
func TestEarlyResponseSlowClient(t *testing.T) {
	s := &session{addr: scripted(t, "")}
	f := start(t, engine.Config{}, s, false)
	c := connect(t, f.addr)
	c.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n")
	go func() {
		for {
			if _, err := c.Write([]byte("x")); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if res, _ := c.response("POST"); res.StatusCode != 502 || !res.Close {
		t.Errorf("got %d, close %v", res.StatusCode, res.Close)
	}
	s.outcomes(t, 1)
	c.closed()
}
