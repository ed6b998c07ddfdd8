package engine_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"castellan.dev/proxy/engine"
)

// sweeping sweeps an engine often until the test ends.
func sweeping(t *testing.T, e *engine.Engine) {
	done, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				e.Sweep()
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
}

// A client that hangs up while its response is silent is missed soon, and with it
// the request upstream; one that waits is left to wait.
func TestClientHangsUp(t *testing.T) {
	for name, secure := range map[string]bool{"plain": false, "TLS": true} {
		for version, h2 := range map[string]bool{"http/1": false, "http/2": true} {
			t.Run(name+" to "+version, func(t *testing.T) {
				t.Parallel()
				ended := make(chan struct{}, 4)
				serve := app
				if h2 {
					serve = func(t testing.TB, h http.HandlerFunc) string { return h2app(t, h) }
				}
				upstream := serve(t, func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/stream" {
						_ = http.NewResponseController(w).Flush()
					}
					<-r.Context().Done()
					ended <- struct{}{}
				})
				e := engine.New(engine.Config{})
				s := &session{addr: upstream, begin: func(*engine.Request) engine.Verdict {
					return engine.Verdict{Upstream: engine.Upstream{Key: upstream, H2: h2}}
				}}
				server, client := benchTLS(t)
				addr := startEngine(t, e, s, false).addr
				if secure {
					addr = listen(t, func(c net.Conn) { e.ServeConn(context.Background(), tls.Server(c, server), false, s) })
				}
				sweeping(t, e)
				open := func(path string) net.Conn {
					c := connect(t, addr)
					if secure {
						c.Conn = tls.Client(c.Conn, client)
					}
					c.send("GET " + path + " HTTP/1.1\r\nHost: h\r\n\r\n")
					return c.Conn
				}
				stays := open("/stream")
				for i, path := range []string{"/stream", "/silent"} {
					c := open(path)
					if path == "/stream" {
						if _, err := io.ReadFull(c, make([]byte, len("HTTP/1.1 200 OK"))); err != nil {
							t.Fatal(err)
						}
					}
					c.Close()
					select {
					case <-ended:
					case <-time.After(15 * time.Second):
						t.Fatalf("%s: the request upstream goes on", path)
					}
					if o := s.outcomes(t, i+1)[i]; o.Reason != engine.ReasonClientGone || o.Path != path {
						t.Errorf("%s: %+v", path, o)
					}
				}
				select {
				case <-ended:
					t.Error("a client that waits lost its request")
				case <-time.After(time.Second):
				}
				stays.Close()
				<-ended
			})
		}
	}
}
