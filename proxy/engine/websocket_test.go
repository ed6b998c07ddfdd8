package engine_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"castellan.dev/proxy/engine"
)

const wsHead = "GET /chat HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"

// wsApp accepts the upgrade and echoes until the client ends its direction,
// then sends "bye" and ends its own.
func wsApp(t *testing.T, heads chan<- http.Header) string {
	return rawApp(t, func(c net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		heads <- req.Header
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Accept: y\r\n\r\nhi")
		io.Copy(c, r)
		io.WriteString(c, "bye")
	})
}

func TestWebSocket(t *testing.T) {
	heads := make(chan http.Header, 1)
	s := &session{addr: wsApp(t, heads)}
	asked := false
	s.begin = func(r *engine.Request) engine.Verdict {
		asked = r.WebSocket && len(r.Values("upgrade")) == 1
		return engine.Verdict{Upstream: engine.Upstream{Key: s.addr}}
	}
	f := start(t, engine.Config{}, s, false)
	c := connect(t, f.addr)
	c.send("%s", wsHead+"early") // bytes sent before the 101 belong to the tunnel
	res, err := http.ReadResponse(c.r, nil)
	if err != nil || res.StatusCode != 101 || res.Header.Get("Upgrade") != "websocket" || res.Header.Get("Sec-WebSocket-Accept") != "y" {
		t.Fatalf("got %v, %v", res, err)
	}
	if h := <-heads; !asked || h.Get("Upgrade") != "websocket" || !strings.EqualFold(h.Get("Connection"), "upgrade") {
		t.Errorf("asked %v, upstream saw %v", asked, h)
	}
	got := make([]byte, 7)
	if _, err := io.ReadFull(c.r, got); err != nil || string(got) != "hiearly" {
		t.Fatalf("got %q, %v", got, err)
	}
	c.send("more")
	if _, err := io.ReadFull(c.r, got[:4]); err != nil || string(got[:4]) != "more" {
		t.Fatalf("got %q, %v", got, err)
	}
	c.Conn.(*net.TCPConn).CloseWrite() // one direction ends, the other goes on
	if rest, err := io.ReadAll(c.r); err != nil || string(rest) != "bye" {
		t.Errorf("after half close %q, %v", rest, err)
	}
	o := s.outcomes(t, 1)[0]
	if !o.Upgraded || o.Status != 101 || o.RequestBytes != 9 || o.ResponseBytes != 14 || o.Reason != "" {
		t.Errorf("outcome %+v", o)
	}
}

// TestOnlyWebSocket: every other upgrade is stripped, so that nothing tunnels
// past policy (golang #80416).
func TestOnlyWebSocket(t *testing.T) {
	tests := []struct{ name, request string }{
		{"pitfall: h2c", strings.Replace(wsHead, "websocket", "h2c", 1)},
		{"pitfall: list", strings.Replace(wsHead, "websocket", "websocket, h2c", 1)},
		{"no Connection option", strings.Replace(wsHead, "keep-alive, Upgrade", "keep-alive", 1)},
		{"not GET", strings.Replace(wsHead, "GET", "OPTIONS", 1)},
		{"HTTP/1.0", strings.Replace(wsHead, "HTTP/1.1", "HTTP/1.0", 1)},
		{"with a body", strings.Replace(wsHead, "Host: h\r\n", "Host: h\r\nContent-Length: 1\r\n", 1) + "x"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			heads := make(chan http.Header, 1)
			s := &session{addr: wsApp(t, heads)}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			c.send("%s", tt.request)
			// The upstream switches all the same; nobody asked, so it is an error.
			if res, _ := c.response("GET"); res.StatusCode != 502 {
				t.Errorf("got %d, want 502", res.StatusCode)
			}
			if h := <-heads; h.Get("Upgrade") != "" || h.Get("Connection") != "" {
				t.Errorf("upstream saw %v", h)
			}
		})
	}
}

// TestWebSocketRefused: an upstream that does not switch answers as usual.
func TestWebSocketRefused(t *testing.T) {
	f := start(t, engine.Config{}, &session{addr: app(t, echo)}, false)
	c := connect(t, f.addr)
	c.send("%s%s", wsHead, wsHead)
	for range 2 {
		if res, _ := c.response("GET"); res.StatusCode != 200 || res.Header.Get("X-Path") != "/chat" {
			t.Errorf("got %d %v", res.StatusCode, res.Header)
		}
	}
}

// TestWebSocketClientGone: a client that resets ends the upstream's side too.
func TestWebSocketClientGone(t *testing.T) {
	gone := make(chan struct{})
	s := &session{addr: rawApp(t, func(c net.Conn, r *bufio.Reader) {
		http.ReadRequest(r)
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
		io.Copy(io.Discard, r)
		close(gone)
	})}
	f := start(t, engine.Config{}, s, false)
	c := connect(t, f.addr)
	c.send("%s", wsHead)
	http.ReadResponse(c.r, nil)
	c.Conn.(*net.TCPConn).SetLinger(0)
	c.Close()
	<-gone
	if o := s.outcomes(t, 1)[0]; !o.Upgraded {
		t.Errorf("outcome %+v", o)
	}
}
