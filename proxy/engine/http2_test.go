package engine_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"testing"

	"castellan.dev/proxy/engine"
	"golang.org/x/net/http2"
)

// h2client speaks HTTP/2 by prior knowledge.
func h2client(t testing.TB) *http.Client {
	tr := &http2.Transport{AllowHTTP: true, DialTLSContext: func(ctx context.Context, network, addr string, _ *tls.Config) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, addr)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// h1client speaks HTTP/1.1.
func h1client(t testing.TB) *http.Client {
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// h2app is an application that speaks HTTP/2 by prior knowledge.
func h2app(t testing.TB, h http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: h, Protocols: &p}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// mixes runs f for every pair of client and upstream protocols.
func mixes(t *testing.T, cfg engine.Config, h http.HandlerFunc, f func(t *testing.T, fr *front, c *http.Client)) {
	for _, in := range []string{"h1", "h2"} {
		for _, out := range []string{"h1", "h2"} {
			t.Run(in+" to "+out, func(t *testing.T) {
				s := &session{}
				if out == "h2" {
					s.addr = h2app(t, h)
				} else {
					s.addr = app(t, h)
				}
				s.begin = func(*engine.Request) engine.Verdict {
					return engine.Verdict{Upstream: engine.Upstream{Key: s.addr, H2: out == "h2"}}
				}
				fr := start(t, cfg, s, in == "h2")
				c := h1client(t)
				if in == "h2" {
					c = h2client(t)
				}
				f(t, fr, c)
			})
		}
	}
}

func TestMixedBodies(t *testing.T) {
	mixes(t, engine.Config{}, echo, func(t *testing.T, f *front, c *http.Client) {
		for _, size := range []int{0, 1, 1000, 4095, 4096, 4097, 16 << 10, 70 << 10, 1 << 20} {
			for _, chunked := range []bool{false, true} {
				body := bytes.Repeat([]byte("abcdefg"), size/7+1)[:size]
				var r io.Reader = bytes.NewReader(body)
				if chunked {
					r = io.MultiReader(r)
				}
				req, _ := http.NewRequest("POST", "http://"+f.addr+"//a%2Fb?x", r)
				req.URL.Opaque = "//" + f.addr + "//a%2Fb"
				res, err := c.Do(req)
				if err != nil {
					t.Fatalf("size %d chunked %v: %v", size, chunked, err)
				}
				got, err := io.ReadAll(res.Body)
				res.Body.Close()
				if err != nil || !bytes.Equal(got, body) {
					t.Fatalf("size %d chunked %v: got %d bytes, %v", size, chunked, len(got), err)
				}
				if p := res.Header.Get("X-Path"); p != "//a%2Fb?x" {
					t.Fatalf("upstream saw %q", p)
				}
			}
		}
	})
}
