package proxy_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"castellan.dev/internal/config"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

// hoard opens streams with large heads that give their answers no window, until the
// connection ends. It comes from 127.0.0.2.
func hoard(t *testing.T, addr string, streams int) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	var out bytes.Buffer
	out.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&out, nil)
	_ = f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	filler := strings.Repeat("x", 3000)
	for i := range streams {
		block.Reset()
		for _, h := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "orders"}, {":path", "/x"}} {
			_ = enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
		}
		for range 9 {
			_ = enc.WriteField(hpack.HeaderField{Name: "filler", Value: filler})
		}
		_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
	}
	_, _ = c.Write(out.Bytes()) // it may be closed meanwhile
	return c
}

// Whoever opens streams and takes no answers loses connections; others are served, and
// what is held is bounded all the while, whether policy lets the requests pass or not.
func TestRequestsInFlightAreBounded(t *testing.T) {
	for name, policies := range map[string]string{"allowed": mode("PERMISSIVE"), "denied": mode("PERMISSIVE") + frontendMayGet} {
		t.Run(name, func(t *testing.T) {
			r, ca := mesh(t, policies, limit(func(l *config.ProxyLimits) { l.Fit(24 << 20) }))
			budget := r.Budget()
			if budget != 8<<20 {
				t.Fatalf("budget %d", budget)
			}
			honest := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio-http/1.1")
			var conns []net.Conn
			for i := range 12 {
				conns = append(conns, hoard(t, r.inbound, 30))
				if i < 2 { // 30 times 80 KB or more: the fourth is too much
					eventually(t, "its streams are counted", func() bool { return r.Held() > int64(i+1)*2<<20 })
				}
				honest.mustGet(200) // another source's
				dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio-http/1.1").mustGet(200)
				if held := r.Held(); held > budget+budget/8 {
					t.Fatalf("%d bytes held of %d", held, budget)
				}
			}
			eventually(t, "connections are lost", func() bool {
				return strings.Contains(r.log.String(), `"reason":"memory"`) && r.Held() <= budget
			})
			lost := 0
			for _, c := range conns {
				_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				if _, err := io.Copy(io.Discard, c); !timeout(err) {
					lost++
				}
				c.Close()
			}
			if lost < 8 {
				t.Errorf("%d connections lost", lost)
			}
			honest.mustGet(200)
			eventually(t, "all is given back", func() bool { return r.Held() == 0 })
		})
	}
}

// What has ended is not charged for, though one stream of the connection goes on.
func TestEndedRequestsAreGivenBack(t *testing.T) {
	arrived := make(chan struct{})
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stays" {
			close(arrived)
			<-r.Context().Done()
			return
		}
		_, _ = io.WriteString(w, "done")
	}))
	t.Cleanup(app.Close)
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Publish(strict)
	r := start(t, a, app.Listener.Addr().String()).ready()
	cc := h2Client(t, a.Issuer.Leaf(t, frontend), r.inbound)
	ctx, cancel := context.WithCancel(t.Context())
	stayed := make(chan struct{})
	go func() {
		defer close(stayed)
		req, _ := http.NewRequestWithContext(ctx, "GET", "https://orders/stays", nil)
		if resp, err := cc.RoundTrip(req); err == nil {
			resp.Body.Close()
		}
	}()
	<-arrived
	for range 200 {
		if status, err := h2Get(t, cc); err != nil || status != 200 {
			t.Fatalf("%d, %v", status, err)
		}
	}
	// Its own, and that of two whose end is not known of.
	eventually(t, "what ended is given back", func() bool { return r.Held() <= 4*24<<10 })
	if r.Held() == 0 {
		t.Error("the stream that stays is not counted")
	}
	cancel()
	<-stayed
	eventually(t, "all is given back", func() bool { return r.Held() == 0 })
	dialTLS(t, r.inbound, a.Issuer.Leaf(t, frontend), "http/1.1").mustGet(200)
	eventually(t, "HTTP/1 too", func() bool { return r.Held() == 0 })
}
