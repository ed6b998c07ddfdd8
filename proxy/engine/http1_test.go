package engine_test

import (
	"bytes"
	"io"
	"net/http"
	"testing"

	"castellan.dev/proxy/engine"
)

func TestKeepAlive(t *testing.T) {
	f := start(t, engine.Config{}, &session{addr: app(t, echo)}, false)
	c := connect(t, f.addr)
	for range 3 {
		c.send("GET /a%2Fb?x=1 HTTP/1.1\r\nHost: h\r\n\r\n")
		res, _ := c.response("GET")
		if res.StatusCode != 200 || res.Header.Get("X-Path") != "/a%2Fb?x=1" {
			t.Fatalf("got %d %v", res.StatusCode, res.Header)
		}
	}
	if got := f.session.outcomes(t, 3); f.session.dials != 1 || !got[2].Reused {
		t.Errorf("%d dials for three requests of one connection, last outcome %+v", f.session.dials, got[2])
	}
}

func TestBodies(t *testing.T) {
	f := start(t, engine.Config{}, &session{addr: app(t, echo)}, false)
	hc := &http.Client{Transport: &http.Transport{}}
	defer hc.CloseIdleConnections()
	for _, size := range []int{0, 1, 1000, 4095, 4096, 4097, 16 << 10, 70 << 10, 1 << 20} {
		for _, chunked := range []bool{false, true} {
			body := bytes.Repeat([]byte("abcdefg"), size/7+1)[:size]
			var r io.Reader = bytes.NewReader(body)
			if chunked {
				r = io.MultiReader(r)
			}
			req, _ := http.NewRequest("POST", "http://"+f.addr+"/", r)
			res, err := hc.Do(req)
			if err != nil {
				t.Fatalf("size %d chunked %v: %v", size, chunked, err)
			}
			got, err := io.ReadAll(res.Body)
			res.Body.Close()
			if err != nil || !bytes.Equal(got, body) {
				t.Fatalf("size %d chunked %v: got %d bytes, %v", size, chunked, len(got), err)
			}
		}
	}
}
