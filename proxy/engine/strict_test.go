package engine_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"castellan.dev/proxy/engine"
)

// TestStrictRequests holds the rows of the hardening rules: each request is
// refused with the status given, nothing of it reaches the application, and the
// connection is closed, as no later byte can be trusted to begin a request.
func TestStrictRequests(t *testing.T) {
	const tail = "\r\n\r\n"
	long := strings.Repeat("a", 9000)
	tests := []struct {
		name, request string
		status        int
		text          string
	}{
		{"smuggling: CL and TE", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "Content-Length and Transfer-Encoding"},
		{"smuggling: TE and CL", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400, "Content-Length and Transfer-Encoding"},
		{"smuggling: duplicate CL, equal", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", 400, "more than one Content-Length"},
		{"smuggling: duplicate CL, different", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\ncontent-length: 2\r\n\r\nab", 400, "more than one Content-Length"},
		{"smuggling: list of CL", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1, 1\r\n\r\na", 400, "malformed Content-Length"},
		{"smuggling: CL with sign", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +1\r\n\r\na", 400, "malformed Content-Length"},
		{"smuggling: CL negative", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\na", 400, "malformed Content-Length"},
		{"smuggling: CL hexadecimal", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x1\r\n\r\na", 400, "malformed Content-Length"},
		{"smuggling: CL empty", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length:\r\n\r\na", 400, "malformed Content-Length"},
		{"smuggling: CL overflow", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 18446744073709551617\r\n\r\na", 400, "malformed Content-Length"},
		{"smuggling: bare LF in request line", "GET / HTTP/1.1\nHost: h" + tail, 400, "bare line feed"},
		{"smuggling: bare LF in field", "GET / HTTP/1.1\r\nHost: h\nX: y" + tail, 400, "bare line feed"},
		{"smuggling: bare LF at the end", "GET / HTTP/1.1\r\nHost: h\r\n\n", 400, "bare line feed"},
		{"smuggling: bare CR in value", "GET / HTTP/1.1\r\nHost: h\r\nX: a\rb" + tail, 400, "malformed field value"},
		{"smuggling: bare CR in request line", "GET /\r HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"smuggling: NUL in value", "GET / HTTP/1.1\r\nHost: h\r\nX: a\x00b" + tail, 400, "malformed field value"},
		{"smuggling: NUL in name", "GET / HTTP/1.1\r\nHost: h\r\nX\x00: ab" + tail, 400, "malformed field name"},
		{"smuggling: obs-fold", "GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b" + tail, 400, "folded field line"},
		{"smuggling: obs-fold with tab", "GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n\tb" + tail, 400, "folded field line"},
		{"smuggling: space first in head", "GET / HTTP/1.1\r\n Host: h" + tail, 400, "folded field line"},
		{"smuggling: unknown TE", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "not just chunked"},
		{"smuggling: unknown TE before chunked", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "unknown transfer coding"},
		{"smuggling: TE not ending in chunked", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400, "not just chunked"},
		{"smuggling: TE xchunked", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501, "unknown transfer coding"},
		{"smuggling: TE twice", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "more than one Transfer-Encoding"},
		{"smuggling: TE with vertical tab", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400, "malformed field value"},
		{"smuggling: TE empty", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:\r\n\r\n0\r\n\r\n", 400, "not just chunked"},
		{"smuggling: TE in HTTP/1.0", "POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "in HTTP/1.0"},
		{"smuggling: Connection names Content-Length", "POST / HTTP/1.1\r\nHost: h\r\nConnection: content-length\r\nContent-Length: 1\r\n\r\na", 400, "Connection names"},
		{"smuggling: Connection names Host", "GET / HTTP/1.1\r\nHost: h\r\nConnection: close, Host" + tail, 400, "Connection names"},
		{"smuggling: leading blank line", "\r\nGET / HTTP/1.1\r\nHost: h" + tail, 400, "malformed request line"},
		{"smuggling: space before colon", "GET / HTTP/1.1\r\nHost: h\r\nX : y" + tail, 400, "malformed field name"},
		{"headers: space in name", "GET / HTTP/1.1\r\nHost: h\r\nX Y: z" + tail, 400, "malformed field name"},
		{"headers: underscore in name", "GET / HTTP/1.1\r\nHost: h\r\nx_forwarded_client_cert: z" + tail, 400, "underscore"},
		{"headers: empty name", "GET / HTTP/1.1\r\nHost: h\r\n: z" + tail, 400, "malformed field name"},
		{"headers: no colon", "GET / HTTP/1.1\r\nHost: h\r\nXY" + tail, 400, "malformed field name"},
		{"headers: high byte in name", "GET / HTTP/1.1\r\nHost: h\r\nX\xff: y" + tail, 400, "malformed field name"},
		{"headers: DEL in value", "GET / HTTP/1.1\r\nHost: h\r\nX: \x7f" + tail, 400, "malformed field value"},
		{"headers: unknown expectation", "GET / HTTP/1.1\r\nHost: h\r\nExpect: 200-ok" + tail, 417, "unknown expectation"},
		{"host: missing", "GET / HTTP/1.1\r\nX: h" + tail, 400, "no Host"},
		{"host: missing in HTTP/1.0", "GET / HTTP/1.0\r\nX: h" + tail, 400, "no Host"},
		{"host: twice", "GET / HTTP/1.1\r\nHost: h\r\nHost: h" + tail, 400, "more than one Host"},
		{"host: empty", "GET / HTTP/1.1\r\nHost:" + tail, 400, "malformed Host"},
		{"host: with userinfo", "GET / HTTP/1.1\r\nHost: a@h" + tail, 400, "malformed Host"},
		{"host: list", "GET / HTTP/1.1\r\nHost: a,h" + tail, 400, "malformed Host"},
		{"host: with path", "GET / HTTP/1.1\r\nHost: h/x" + tail, 400, "malformed Host"},
		{"host: absolute target differs", "GET http://other/ HTTP/1.1\r\nHost: h" + tail, 400, "Host differs"},
		{"host: absolute target with userinfo", "GET http://u@h/ HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: lower-case method", "get / HTTP/1.1\r\nHost: h" + tail, 400, "upper-case token"},
		{"path: mixed-case method", "Get / HTTP/1.1\r\nHost: h" + tail, 400, "upper-case token"},
		{"path: method with bad character", "G@T / HTTP/1.1\r\nHost: h" + tail, 400, "upper-case token"},
		{"path: CONNECT", "CONNECT h:443 HTTP/1.1\r\nHost: h:443" + tail, 405, "CONNECT"},
		{"path: relative target", "GET x HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: asterisk for GET", "GET * HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: other scheme", "GET ftp://h/ HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: only a fragment", "GET #x HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: two spaces", "GET  / HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: space in target", "GET /a b HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: tab in target", "GET /a\tb HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: bytes above ASCII", "GET /\xc3\xa9 HTTP/1.1\r\nHost: h" + tail, 400, "malformed request target"},
		{"path: %00", "GET /a%00b HTTP/1.1\r\nHost: h" + tail, 400, "%00"},
		{"path: bad percent-encoding", "GET /a%zz HTTP/1.1\r\nHost: h" + tail, 400, "percent-encoding"},
		{"path: cut percent-encoding", "GET /a%4 HTTP/1.1\r\nHost: h" + tail, 400, "percent-encoding"},
		{"version: HTTP/0.9", "GET /\r\n\r\n", 400, "malformed request line"},
		{"version: HTTP/2.0", "GET / HTTP/2.0\r\nHost: h" + tail, 505, "version"},
		{"version: HTTP/1.2", "GET / HTTP/1.2\r\nHost: h" + tail, 505, "version"},
		{"version: lower case", "GET / http/1.1\r\nHost: h" + tail, 400, "malformed request line"},
		{"version: TLS hello", "\x16\x03\x01\x02\x00\x01\x00", 400, "malformed request line"},
		{"dos: target too long", "GET /" + long + " HTTP/1.1\r\nHost: h" + tail, 414, "target too long"},
		{"dos: target without end", "GET /" + long, 414, "target too long"},
		{"dos: head too large", "GET / HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: "+long+"\r\n", 4) + "\r\n", 431, "head too large"},
		{"dos: field without end", "GET / HTTP/1.1\r\nX: " + strings.Repeat(long, 4), 431, "head too large"},
		{"dos: too many fields", "GET / HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: y\r\n", 101) + "\r\n", 431, "too many fields"},
	}
	reached := make(chan string, 100)
	addr := app(t, func(w http.ResponseWriter, r *http.Request) { reached <- r.RequestURI })
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &session{addr: addr}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			c.send("%s", tt.request)
			res, body := c.response("GET")
			if res.StatusCode != tt.status || !res.Close {
				t.Errorf("status %d, close %v; want %d and close", res.StatusCode, res.Close, tt.status)
			}
			if want := http.StatusText(tt.status) + "\n"; body != want {
				t.Errorf("body %q, want the constant %q", body, want)
			}
			c.closed()
			o := s.outcomes(t, 1)[0]
			if o.Judged || o.Err == nil || !strings.Contains(o.Err.Error(), tt.text) || o.Status != tt.status {
				t.Errorf("outcome %+v, want an unjudged refusal with %q", o, tt.text)
			}
			select {
			case uri := <-reached:
				t.Errorf("the application saw %q", uri)
			default:
			}
		})
	}
}

// TestHopByHop: fields of the hop and those that Connection nominates are gone
// before the session judges, and cannot take away what it sets.
func TestHopByHop(t *testing.T) {
	got := make(chan http.Header, 1)
	s := &session{addr: app(t, func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Clone()
		w.Header().Set("Connection", "x-hop")
		w.Header().Set("X-Hop", "1")
		w.Header().Set("Keep-Alive", "timeout=5")
		w.Header().Set("Proxy-Authenticate", "Basic")
		w.Header().Set("X-End", "1")
	})}
	var judged []string
	s.begin = func(r *engine.Request) engine.Verdict {
		for _, f := range r.Fields() {
			judged = append(judged, strings.Clone(f.Name))
		}
		return engine.Verdict{
			Upstream: engine.Upstream{Key: s.addr},
			Remove:   []string{"x-removed", "content-length"},
			Set: []engine.Field{{"x-forwarded-client-cert", "By=me"}, {"X-Nominated", "ours"},
				{"Transfer-Encoding", "chunked"}, {"Bad", "a\r\nb: c"}},
		}
	}
	f := start(t, engine.Config{}, s, false)
	c := connect(t, f.addr)
	c.send("POST / HTTP/1.1\r\nHost: h\r\nConnection: x-nominated, close, x-other\r\nConnection: X-Third\r\n" +
		"X-Nominated: theirs\r\nX-Other: 1\r\nx-third: 1\r\nKeep-Alive: 1\r\nProxy-Connection: 1\r\nTE: trailers\r\n" +
		"Upgrade: h2c\r\nHTTP2-Settings: x\r\nProxy-Authorization: secret\r\nX-Forwarded-Client-Cert: spoofed\r\n" +
		"X-Removed: 1\r\nX-Kept: 1\r\nContent-Length: 2\r\n\r\nhi")
	res, _ := c.response("POST")
	if want := "X-Forwarded-Client-Cert X-Removed X-Kept"; strings.Join(judged, " ") != want {
		t.Errorf("judged fields %q, want %q", judged, want)
	}
	h := <-got
	want := http.Header{"X-Forwarded-Client-Cert": {"By=me"}, "X-Nominated": {"ours"}, "X-Kept": {"1"}, "Content-Length": {"2"}}
	for name := range h {
		if len(want[name]) != 1 || h.Get(name) != want.Get(name) {
			t.Errorf("upstream saw %s: %q", name, h[name])
		}
	}
	for name := range want {
		if h.Get(name) != want.Get(name) {
			t.Errorf("upstream saw %s: %q, want %q", name, h[name], want[name])
		}
	}
	for _, name := range []string{"X-Hop", "Keep-Alive", "Proxy-Authenticate"} {
		if res.Header.Get(name) != "" {
			t.Errorf("client saw %s", name)
		}
	}
	if res.Header.Get("X-End") != "1" || !res.Close {
		t.Errorf("client got %v, close %v", res.Header, res.Close)
	}
	c.closed()
}

// TestTargets: what is forwarded is what was judged, byte for byte.
func TestTargets(t *testing.T) {
	s := &session{addr: app(t, echo)}
	var path, query, host string
	s.begin = func(r *engine.Request) engine.Verdict {
		path, query, host = strings.Clone(r.Path), strings.Clone(r.RawQuery), strings.Clone(r.Host)
		return engine.Verdict{Upstream: engine.Upstream{Key: s.addr}}
	}
	f := start(t, engine.Config{}, s, false)
	c := connect(t, f.addr)
	tests := []struct{ name, line, host, path, query, sent string }{
		{"path: exact bytes", "GET /a%2fb//..%5C{x}|\"? HTTP/1.1", "h", `/a%2fb//..%5C{x}|"`, "", `/a%2fb//..%5C{x}|"?`},
		{"path: backslash", `GET /a\..\b HTTP/1.1`, "h", `/a\..\b`, "", `/a\..\b`},
		{"path: double slash is no authority", "GET //evil/x?a=b HTTP/1.1", "h", "//evil/x", "a=b", "//evil/x?a=b"},
		{"path: fragment dropped", "GET /a?b#c?d HTTP/1.1", "h", "/a", "b", "/a?b"},
		{"path: fragment before query", "GET /a#c?d HTTP/1.1", "h", "/a", "", "/a"},
		{"path: question marks", "GET /a?b?c HTTP/1.1", "h", "/a", "b?c", "/a?b?c"},
		{"host: absolute form", "GET http://H:80/a?b HTTP/1.1", "h:80", "/a", "b", "/a?b"},
		{"host: absolute form without path", "GET http://h?b HTTP/1.1", "h", "/", "b", "/?b"},
		{"host: absolute form, nothing more", "GET https://h HTTP/1.1", "h", "/", "", "/"},
		{"path: asterisk", "OPTIONS * HTTP/1.1", "h", "*", "", "*"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c.send("%s\r\nHost: %s\r\n\r\n", tt.line, tt.host)
			res, _ := c.response("GET")
			if path != tt.path || query != tt.query || host != tt.host {
				t.Errorf("judged %q ? %q on %q, want %q ? %q on %q", path, query, host, tt.path, tt.query, tt.host)
			}
			if got := res.Header.Get("X-Path"); got != tt.sent && tt.sent != "*" {
				t.Errorf("upstream saw %q, want %q", got, tt.sent)
			}
		})
	}
}

// TestVerdictRewrites: path, query and authority of the verdict are what is sent.
func TestVerdictRewrites(t *testing.T) {
	mixes(t, engine.Config{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Seen", r.Host+" "+r.RequestURI)
	}, func(t *testing.T, f *front, c *http.Client) {
		inner := f.session.begin
		f.session.begin = func(r *engine.Request) engine.Verdict {
			v := inner(r)
			v.Path, v.Query, v.SetQuery, v.Host = "/judged%2F", "q=1", true, "other:81"
			return v
		}
		res, err := c.Get("http://" + f.addr + "/x?y")
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if got, want := res.Header.Get("X-Seen"), "other:81 /judged%2F?q=1"; got != want {
			t.Errorf("upstream saw %q, want %q", got, want)
		}
	})
}

// TestStrictChunks: the framing of a chunked body is held to the grammar; the
// application never sees the end of a body that was refused.
func TestStrictChunks(t *testing.T) {
	tests := []struct {
		name, body string
		ok         bool
	}{
		{"plain", "3\r\nabc\r\n0\r\n\r\n", true},
		{"upper and lower case, leading zeros", "00A\r\n0123456789\r\n00b\r\n0123456789a\r\n0\r\n\r\n", true},
		{"extension", "3;a=b;c=\"d\"\r\nabc\r\n0;last\r\n\r\n", true},
		{"trailer", "3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n", true},
		{"smuggling: bare LF after size", "3\nabc\r\n0\r\n\r\n", false},
		{"smuggling: bare LF in extension", "3;a\nb\r\nabc\r\n0\r\n\r\n", false},
		{"smuggling: bare LF after data", "3\r\nabc\n0\r\n\r\n", false},
		{"smuggling: bare LF at the end", "3\r\nabc\r\n0\r\n\n", false},
		{"smuggling: bare LF in trailer", "3\r\nabc\r\n0\r\nX: y\n\r\n", false},
		{"smuggling: bare CR in extension", "3;a\rb\r\nabc\r\n0\r\n\r\n", false},
		{"smuggling: data longer than its size", "2\r\nabc\r\n0\r\n\r\n", false},
		{"smuggling: no size", "\r\nabc\r\n0\r\n\r\n", false},
		{"smuggling: size with sign", "+3\r\nabc\r\n0\r\n\r\n", false},
		{"smuggling: size with 0x", "0x3\r\nabc\r\n0\r\n\r\n", false},
		{"smuggling: size with space", "3 \r\nabc\r\n0\r\n\r\n", false},
		{"smuggling: size overflow", "fffffffffffffffff3\r\nabc\r\n0\r\n\r\n", false},
		{"smuggling: obs-fold in trailer", "3\r\nabc\r\n0\r\nX: y\r\n z\r\n\r\n", false},
		{"dos: endless extension", "3;" + strings.Repeat("a", 1000) + "\r\nabc\r\n0\r\n\r\n", false},
		{"dos: mostly extensions", strings.Repeat("1;"+strings.Repeat("a", 400)+"\r\na\r\n", 60) + "0\r\n\r\n", false},
		{"dos: endless trailers", "3\r\nabc\r\n0\r\n" + strings.Repeat("X: y\r\n", 70) + "\r\n", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			whole := make(chan bool, 1)
			s := &session{addr: app(t, func(w http.ResponseWriter, r *http.Request) {
				_, err := io.ReadAll(r.Body)
				whole <- err == nil
			})}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			c.send("%s", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"+tt.body)
			res, _ := c.response("POST")
			if tt.ok != (res.StatusCode == 200) || !tt.ok && res.StatusCode != 400 {
				t.Errorf("status %d", res.StatusCode)
			}
			if !tt.ok {
				c.closed()
				if o := s.outcomes(t, 1)[0]; o.Reason != engine.ReasonRequestBody {
					t.Errorf("outcome %+v", o)
				}
			}
			select { // a refused request may never have come to it
			case got := <-whole:
				if got != tt.ok {
					t.Errorf("the application saw a whole body: %v", got)
				}
			default:
				if tt.ok {
					t.Error("the application saw nothing")
				}
			}
		})
	}
}

// TestStrictResponses: an upstream's malformed response is answered with 502,
// and nothing of the upstream's text reaches the client.
func TestStrictResponses(t *testing.T) {
	tests := []struct{ name, response string }{
		{"smuggling: CL and TE", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"smuggling: duplicate CL", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello"},
		{"smuggling: unknown TE", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello"},
		{"smuggling: bare LF", "HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\nhello"},
		{"smuggling: obs-fold", "HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 5\r\n\r\nhello"},
		{"smuggling: space before colon", "HTTP/1.1 200 OK\r\nX : y\r\nContent-Length: 0\r\n\r\n"},
		{"smuggling: NUL", "HTTP/1.1 200 OK\r\nX: \x00\r\nContent-Length: 0\r\n\r\n"},
		{"status line", "HTTP/1.1 2000 OK\r\n\r\n"},
		{"status line, HTTP/2", "HTTP/2 200 OK\r\n\r\n"},
		{"status line, none", "hello\r\n\r\n"},
		{"pitfall: switching protocols unasked", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"},
		{"dos: endless informational responses", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 20)},
		{"dos: head too large", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("a", 70<<10)},
		{"closed at once", ""},
		{"closed within the head", "HTTP/1.1 200 OK\r\nX: y"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &session{addr: rawApp(t, func(c net.Conn, r *bufio.Reader) {
				http.ReadRequest(r)
				io.WriteString(c, tt.response)
			})}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
			var res *http.Response
			var body string
			for res == nil || res.StatusCode == 103 {
				res, body = c.response("GET")
			}
			if res.StatusCode != 502 || body != "Bad Gateway\n" {
				t.Errorf("got %d %q", res.StatusCode, body)
			}
			// The client did nothing wrong: its connection goes on.
			c.send("GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
			for res = nil; res == nil || res.StatusCode == 103; {
				res, _ = c.response("GET")
			}
			if res.StatusCode != 502 {
				t.Errorf("then got %d", res.StatusCode)
			}
		})
	}
}

// rawApp is an application of bytes: serve gets each connection, which is closed after it.
func rawApp(t testing.TB, serve func(net.Conn, *bufio.Reader)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(20 * time.Second))
				serve(c, bufio.NewReader(c))
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}
