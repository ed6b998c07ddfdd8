package engine_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"testing"
	"time"

	"castellan.dev/proxy/engine"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// framer speaks HTTP/2 frame by frame.
type framer struct {
	*http2.Framer
	c   *client
	mu  sync.Mutex // writes
	buf bytes.Buffer
	enc *hpack.Encoder
}

func frames(t testing.TB, addr string) *framer {
	c := connect(t, addr)
	c.send(http2.ClientPreface)
	f := &framer{Framer: http2.NewFramer(c, c.r), c: c}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.enc = hpack.NewEncoder(&f.buf)
	f.WriteSettings()
	return f
}

// request sends a HEADERS frame of name, value pairs.
func (f *framer) request(id uint32, end bool, pairs ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.buf.Reset()
	for i := 0; i < len(pairs); i += 2 {
		f.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: f.buf.Bytes(), EndStream: end, EndHeaders: true})
}

// answer returns the status of a stream's response, or its reset, or the connection's end.
func (f *framer) answer(id uint32) string {
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return "closed"
		}
		switch fr := fr.(type) {
		case *http2.MetaHeadersFrame:
			if fr.StreamID == id {
				return fr.PseudoValue("status")
			}
		case *http2.RSTStreamFrame:
			if fr.StreamID == id {
				return "reset"
			}
		case *http2.GoAwayFrame:
			if fr.ErrCode != http2.ErrCodeNo {
				return "goaway"
			}
		case *http2.SettingsFrame:
			if !fr.IsAck() {
				f.mu.Lock()
				f.WriteSettingsAck()
				f.mu.Unlock()
			}
		}
	}
}

// TestStrictHTTP2: HTTP/2 requests are held to the same rules, so that none
// becomes another request when it is written as HTTP/1.1.
func TestStrictHTTP2(t *testing.T) {
	base := []string{":method", "GET", ":scheme", "http", ":authority", "h", ":path", "/"}
	with := func(name, value string) []string {
		pairs := append([]string(nil), base...)
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				pairs[i+1] = value
				return pairs
			}
		}
		return append(pairs, name, value)
	}
	tests := []struct {
		name  string
		pairs []string
		want  string
	}{
		{"plain", base, "200"},
		{"te: trailers", with("te", "trailers"), "200"},
		{"host equal to authority", with("host", "h"), "200"},
		{"smuggling: LF in value", with("x", "a\nb"), "reset"},
		{"smuggling: CR LF in value", with("x", "a\r\nb: c"), "reset"},
		{"smuggling: NUL in value", with("x", "a\x00b"), "reset"},
		{"smuggling: CR LF in name", with("x\r\ny", "a"), "reset"},
		{"smuggling: space in path", with(":path", "/a b"), "400"},
		{"smuggling: CR LF in path", with(":path", "/a HTTP/1.1\r\nx: y"), "reset"},
		{"smuggling: CR LF in authority", with(":authority", "h\r\nx: y"), "reset"},
		{"smuggling: CR LF in method", with(":method", "GET / HTTP/1.1\r\nx: y"), "reset"},
		{"smuggling: space in method", with(":method", "GET /x"), "400"},
		{"smuggling: transfer-encoding", with("transfer-encoding", "chunked"), "400"},
		{"smuggling: connection", with("connection", "x"), "400"},
		{"smuggling: upgrade", with("upgrade", "websocket"), "400"},
		{"smuggling: content-length on an ended stream", with("content-length", "5"), "400"},
		{"smuggling: content-length twice", append(with("content-length", "0"), "content-length", "0"), "400"},
		{"smuggling: host differs", with("host", "other"), "reset"},
		{"headers: underscore", with("x_y", "a"), "400"},
		{"headers: upper case", with("X-Y", "a"), "reset"},
		{"host: none", []string{":method", "GET", ":scheme", "http", ":path", "/"}, "400"},
		{"host: userinfo", with(":authority", "a@h"), "reset"},
		{"path: %00", with(":path", "/%00"), "400"},
		{"path: bad percent-encoding", with(":path", "/%zz"), "reset"},
		{"path: relative", with(":path", "x"), "reset"},
		{"path: absolute", with(":path", "http://h/"), "reset"},
		{"path: lower-case method", with(":method", "get"), "400"},
		{"path: CONNECT", []string{":method", "CONNECT", ":authority", "h:1"}, "405"},
		{"path: extended CONNECT", []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":authority", "h", ":path", "/"}, "reset"},
		{"dos: target too long", with(":path", "/"+strings.Repeat("a", 9000)), "414"},
		{"dos: head too large", with("x", strings.Repeat("a", 40<<10)), "goaway"},
		{"dos: too many fields", func() []string {
			p := base
			for i := range 101 {
				p = append(p[:len(p):len(p)], fmt.Sprint("x", i), "y")
			}
			return p
		}(), "431"},
	}
	addr := app(t, echo)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := frames(t, start(t, engine.Config{}, &session{addr: addr}, true).addr)
			f.request(1, true, tt.pairs...)
			if got := f.answer(1); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// TestHTTP2Budgets: what floods a connection ends it.
func TestHTTP2Budgets(t *testing.T) {
	addr, _, release := held(t, false)
	t.Cleanup(func() { close(release) })
	t.Run("dos: streams beyond the limit", func(t *testing.T) {
		f := frames(t, start(t, engine.Config{MaxStreams: 3}, &session{addr: addr}, true).addr)
		f.answerSettings()
		for id := uint32(1); id <= 7; id += 2 {
			f.request(id, true, ":method", "GET", ":scheme", "http", ":authority", "h", ":path", "/")
		}
		if got := f.answer(7); got != "reset" {
			t.Errorf("the fourth stream got %s", got)
		}
	})
	t.Run("dos: rapid reset (CVE-2023-39325)", func(t *testing.T) {
		f := frames(t, start(t, engine.Config{MaxStreams: 3}, &session{addr: addr}, true).addr)
		f.answerSettings()
		go func() {
			for id := uint32(1); id < 2000; id += 2 {
				f.request(id, true, ":method", "GET", ":scheme", "http", ":authority", "h", ":path", "/")
				f.mu.Lock()
				err := f.WriteRSTStream(id, http2.ErrCodeCancel)
				f.mu.Unlock()
				if err != nil {
					return
				}
			}
		}()
		if got := f.answer(1 << 30); got != "goaway" && got != "closed" {
			t.Errorf("got %s", got)
		}
	})
	t.Run("dos: streams opened to be reset, no more than are allowed at once", func(t *testing.T) {
		now := time.Now()
		still := func() time.Time { return now } // all within a second
		s := &session{addr: addr}
		f := frames(t, start(t, engine.Config{MaxStreams: 10, Now: still}, s, true).addr)
		f.answerSettings()
		id := uint32(1)
		for ; id < 2*20; id += 2 {
			f.request(id, true, ":method", "GET", ":scheme", "http", ":authority", "h", ":path", "/")
			if err := f.WriteRSTStream(id, http2.ErrCodeCancel); err != nil {
				t.Fatal(err)
			}
			s.outcomes(t, int(id+1)/2) // so that the library has no reason of its own
		}
		_ = f.c.SetReadDeadline(time.Now().Add(10 * time.Second))
		for {
			fr, err := f.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if away, ok := fr.(*http2.GoAwayFrame); ok {
				if away.ErrCode != http2.ErrCodeNo {
					t.Fatalf("got %s", away.ErrCode)
				}
				return
			}
		}
	})
	t.Run("streams that end whole do not count", func(t *testing.T) {
		now := time.Now()
		s := &session{addr: app(t, echo)}
		f := start(t, engine.Config{MaxStreams: 10, Now: func() time.Time { return now }}, s, true)
		c := h2client(t)
		for i := range 60 {
			ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(g httptrace.GotConnInfo) {
				if !g.Reused && i > 0 {
					t.Errorf("request %d needed a new connection", i)
				}
			}})
			req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+f.addr+"/", nil)
			res, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, res.Body)
			res.Body.Close()
		}
	})
	t.Run("dos: endless CONTINUATION (CVE-2023-45288)", func(t *testing.T) {
		f := frames(t, start(t, engine.Config{}, &session{addr: addr}, true).addr)
		f.answerSettings()
		go func() {
			f.mu.Lock() // nothing may come between these frames
			defer f.mu.Unlock()
			f.buf.Reset()
			f.enc.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("a", 8000)})
			if f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.buf.Bytes()}) != nil {
				return
			}
			for range 1000 {
				if f.WriteContinuation(1, false, f.buf.Bytes()) != nil {
					return
				}
			}
		}()
		if got := f.answer(1 << 30); got != "goaway" && got != "closed" {
			t.Errorf("got %s", got)
		}
	})
}

// answerSettings waits for the server's SETTINGS and acknowledges them.
func (f *framer) answerSettings() {
	for range 3 { // SETTINGS, WINDOW_UPDATE, the acknowledgement of ours
		fr, err := f.ReadFrame()
		if err != nil {
			return
		}
		if s, ok := fr.(*http2.SettingsFrame); ok && !s.IsAck() {
			f.WriteSettingsAck()
		}
	}
}

// TestHTTP2Early: a response whole before the request's body ends the stream cleanly.
func TestHTTP2Early(t *testing.T) {
	for _, out := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2 upstream %v", out), func(t *testing.T) {
			h := func(w http.ResponseWriter, r *http.Request) {
				http.NewResponseController(w).EnableFullDuplex()
				w.WriteHeader(418)
			}
			s := &session{}
			if s.addr = app(t, h); out {
				s.addr = h2app(t, http.HandlerFunc(h))
			}
			s.begin = func(*engine.Request) engine.Verdict {
				return engine.Verdict{Upstream: engine.Upstream{Key: s.addr, H2: out}}
			}
			f := frames(t, start(t, engine.Config{}, s, true).addr)
			f.request(1, false, ":method", "POST", ":scheme", "http", ":authority", "h", ":path", "/")
			f.WriteData(1, false, []byte("x"))
			if got := f.answer(1); got != "418" {
				t.Errorf("got %s", got)
			}
			if o := s.outcomes(t, 1)[0]; o.Status != 418 {
				t.Errorf("outcome %+v", o)
			}
		})
	}
}
