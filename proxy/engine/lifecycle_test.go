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
	"testing"
	"time"

	"castellan.dev/proxy/engine"
)

// held is an application whose answers wait for release.
func held(t testing.TB, h2 bool) (addr string, arrived chan struct{}, release chan struct{}) {
	arrived, release = make(chan struct{}, 16), make(chan struct{})
	h := func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		select {
		case arrived <- struct{}{}:
		default:
		}
		select {
		case <-release:
		case <-r.Context().Done():
		}
		io.WriteString(w, "done")
	}
	if h2 {
		return h2app(t, http.HandlerFunc(h)), arrived, release
	}
	return app(t, h), arrived, release
}

// served starts one connection and returns its Conn.
func served(t testing.TB, e *engine.Engine, s engine.Session, h2 bool) (*engine.Conn, *client, chan struct{}) {
	near, far := tcpPair(t)
	near.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { near.Close() })
	conn := e.NewConn(far, h2, s)
	done := make(chan struct{})
	go func() { defer close(done); conn.Serve(context.Background()) }()
	t.Cleanup(func() { near.Close(); <-done; e.Close() })
	return conn, &client{t, near, bufio.NewReader(near)}, done
}

func TestCloseGracefully(t *testing.T) {
	t.Run("idle, never used", func(t *testing.T) {
		conn, c, done := served(t, engine.New(engine.Config{}), &session{}, false)
		conn.CloseGracefully()
		<-done
		c.closed()
	})
	t.Run("idle, after a request", func(t *testing.T) {
		conn, c, done := served(t, engine.New(engine.Config{}), &session{addr: app(t, echo)}, false)
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		c.response("GET")
		for _, idle := conn.IdleSince(); !idle; _, idle = conn.IdleSince() {
			time.Sleep(time.Millisecond)
		}
		conn.CloseGracefully()
		<-done
		c.closed()
	})
	t.Run("in flight", func(t *testing.T) {
		addr, arrived, release := held(t, false)
		conn, c, _ := served(t, engine.New(engine.Config{}), &session{addr: addr}, false)
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\nGET /never HTTP/1.1\r\nHost: h\r\n\r\n")
		<-arrived
		if _, idle := conn.IdleSince(); idle {
			t.Error("idle with a request in flight")
		}
		conn.CloseGracefully()
		close(release)
		if res, body := c.response("GET"); body != "done" || !res.Close {
			t.Errorf("got %q, close %v", body, res.Close)
		}
		if b, err := c.r.ReadByte(); err == nil {
			t.Errorf("got %q after the last response", b)
		}
	})
	t.Run("by verdict", func(t *testing.T) {
		s := &session{addr: app(t, echo)}
		s.begin = func(*engine.Request) engine.Verdict {
			return engine.Verdict{Upstream: engine.Upstream{Key: s.addr}, Close: true}
		}
		_, c, done := served(t, engine.New(engine.Config{}), s, false)
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		if res, _ := c.response("GET"); !res.Close {
			t.Error("no Connection: close")
		}
		<-done
	})
	t.Run("HTTP/2 in flight", func(t *testing.T) {
		addr, arrived, release := held(t, false)
		e := engine.New(engine.Config{})
		conns := make(chan *engine.Conn, 1)
		s := &session{addr: addr}
		s.begin = func(r *engine.Request) engine.Verdict {
			select {
			case conns <- r.Conn():
			default:
			}
			return engine.Verdict{Upstream: engine.Upstream{Key: addr}}
		}
		f := startEngine(t, e, s, true)
		c := h2client(t)
		result := make(chan error, 1)
		get := func() {
			res, err := c.Get("http://" + f.addr + "/")
			if err == nil {
				_, err = io.ReadAll(res.Body)
				res.Body.Close()
			}
			result <- err
		}
		go get()
		<-arrived
		first := <-conns
		first.CloseGracefully()
		close(release)
		if err := <-result; err != nil {
			t.Errorf("in flight: %v", err)
		}
		get() // on a new connection, as the first was told to go away
		if err := <-result; err != nil || <-conns == first {
			t.Errorf("after GOAWAY: %v, or the same connection", err)
		}
	})
}

func TestCloseNow(t *testing.T) {
	for _, h2up := range []bool{false, true} {
		t.Run(fmt.Sprintf("in flight, h2 upstream %v", h2up), func(t *testing.T) {
			addr, arrived, _ := held(t, h2up)
			s := &session{addr: addr, begin: func(*engine.Request) engine.Verdict {
				return engine.Verdict{Upstream: engine.Upstream{Key: addr, H2: h2up}}
			}}
			conn, c, done := served(t, engine.New(engine.Config{}), s, false)
			c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
			<-arrived
			conn.CloseNow()
			<-done
			if b, err := c.r.ReadByte(); err == nil {
				t.Errorf("read %q", b)
			}
			s.outcomes(t, 1)
		})
	}
	t.Run("HTTP/2", func(t *testing.T) {
		addr, arrived, _ := held(t, false)
		s := &session{addr: addr}
		s.begin = func(r *engine.Request) engine.Verdict {
			return engine.Verdict{Upstream: engine.Upstream{Key: addr}}
		}
		f := start(t, engine.Config{}, s, true)
		result := make(chan error, 1)
		go func() {
			_, err := h2client(t).Get("http://" + f.addr + "/")
			result <- err
		}()
		<-arrived
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := f.engine.Drain(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Drain: %v", err)
		}
		if err := <-result; err == nil {
			t.Error("the request succeeded")
		}
	})
}

func TestDrain(t *testing.T) {
	addr, arrived, release := held(t, false)
	s := &session{addr: addr}
	f := start(t, engine.Config{}, s, false)
	idle, busy := connect(t, f.addr), connect(t, f.addr)
	busy.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	<-arrived
	drained := make(chan error, 1)
	go func() { drained <- f.engine.Drain(context.Background()) }()
	idle.closed()
	select {
	case err := <-drained:
		t.Fatalf("drained with a request in flight: %v", err)
	default:
	}
	close(release)
	if res, body := busy.response("GET"); body != "done" || !res.Close {
		t.Errorf("got %q, close %v", body, res.Close)
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
	connect(t, f.addr).closed()
}

func TestTimeouts(t *testing.T) {
	const short = 100 * time.Millisecond
	t.Run("dos: slow head (slowloris)", func(t *testing.T) {
		s := &session{}
		f := start(t, engine.Config{HeaderTimeout: short}, s, false)
		c := connect(t, f.addr)
		c.send("GET / HTTP/1.1\r\nHost: h\r\n")
		if res, _ := c.response("GET"); res.StatusCode != 408 || !res.Close {
			t.Errorf("got %d", res.StatusCode)
		}
		c.closed()
		if o := s.outcomes(t, 1)[0]; o.Reason != engine.ReasonHeaderTimeout {
			t.Errorf("outcome %+v", o)
		}
	})
	t.Run("dos: trickled head", func(t *testing.T) {
		f := start(t, engine.Config{HeaderTimeout: short}, &session{}, false)
		c := connect(t, f.addr)
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			io.WriteString(c.Conn, "GET / HTTP/1.1\r\nX: ")
			for {
				select {
				case <-stop:
					return
				case <-time.After(short / 10):
					if _, err := c.Write([]byte("x")); err != nil {
						return
					}
				}
			}
		}()
		if res, _ := c.response("GET"); res.StatusCode != 408 {
			t.Errorf("got %d", res.StatusCode)
		}
	})
	t.Run("dos: idle connection", func(t *testing.T) {
		s := &session{addr: app(t, echo)}
		f := start(t, engine.Config{IdleTimeout: short}, s, false)
		c := connect(t, f.addr)
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		c.response("GET")
		c.closed()
	})
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("silent upstream, h2 %v", h2), func(t *testing.T) {
			addr, _, _ := held(t, h2)
			s := &session{addr: addr, begin: func(*engine.Request) engine.Verdict {
				return engine.Verdict{Upstream: engine.Upstream{Key: addr, H2: h2}}
			}}
			f := start(t, engine.Config{ResponseTimeout: short}, s, false)
			c := connect(t, f.addr)
			c.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\na")
			if res, _ := c.response("POST"); res.StatusCode != 504 {
				t.Errorf("got %d", res.StatusCode)
			}
			if o := s.outcomes(t, 1)[0]; o.Reason != engine.ReasonResponseTimeout {
				t.Errorf("outcome %+v", o)
			}
		})
	}
	t.Run("body stalls", func(t *testing.T) {
		s := &session{addr: app(t, echo)}
		f := start(t, engine.Config{StreamIdleTimeout: short}, s, false)
		c := connect(t, f.addr)
		c.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\na")
		io.Copy(io.Discard, c.r)
		if o := s.outcomes(t, 1)[0]; o.Reason != engine.ReasonBodyTimeout {
			t.Errorf("outcome %+v", o)
		}
	})
	t.Run("response stalls", func(t *testing.T) {
		s := &session{addr: rawApp(t, func(c net.Conn, r *bufio.Reader) {
			http.ReadRequest(r)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
			r.ReadByte()
		})}
		f := start(t, engine.Config{StreamIdleTimeout: short}, s, false)
		c := connect(t, f.addr)
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		io.Copy(io.Discard, c.r)
		if o := s.outcomes(t, 1)[0]; o.Reason != engine.ReasonBodyTimeout {
			t.Errorf("outcome %+v", o)
		}
	})
	t.Run("client does not read", func(t *testing.T) {
		for _, h2 := range []bool{false, true} {
			s := &session{addr: app(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(w, io.LimitReader(zeros{}, 64<<20))
			})}
			f := start(t, engine.Config{StreamIdleTimeout: short}, s, h2)
			if h2 {
				res, err := h2client(t).Get("http://" + f.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
			} else {
				connect(t, f.addr).send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
			}
			s.outcomes(t, 1)
		}
	})
	t.Run("a long stream outlives every timeout", func(t *testing.T) {
		cfg := engine.Config{StreamIdleTimeout: 4 * short, ResponseTimeout: short}
		mixes(t, cfg, func(w http.ResponseWriter, r *http.Request) {
			http.NewResponseController(w).EnableFullDuplex()
			n, _ := io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, n)
		}, func(t *testing.T, f *front, c *http.Client) {
			pr, pw := io.Pipe()
			go func() {
				defer pw.Close()
				for range 12 {
					time.Sleep(short / 2) // not a wait: this is the slow client
					pw.Write([]byte("x"))
				}
			}()
			res, err := c.Post("http://"+f.addr+"/", "", pr)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if string(body) != "12" {
				t.Errorf("got %d %q", res.StatusCode, body)
			}
		})
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestSharedUpstreams: idle clients hold no upstream connection; a few serve all.
func TestSharedUpstreams(t *testing.T) {
	s := &session{addr: app(t, echo)}
	f := start(t, engine.Config{}, s, false)
	for range 20 {
		c := connect(t, f.addr)
		c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		c.response("GET")
		s.outcomes(t, 1)
	}
	if s.dials > 2 {
		t.Errorf("%d dials for 20 clients, one after the other", s.dials)
	}
}

// TestDropUpstream: connections made under a key that is over are not used again.
func TestDropUpstream(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2 %v", h2), func(t *testing.T) {
			s := &session{addr: app(t, echo)}
			if h2 {
				s.addr = h2app(t, http.HandlerFunc(echo))
			}
			s.begin = func(*engine.Request) engine.Verdict {
				return engine.Verdict{Upstream: engine.Upstream{Key: "k", H2: h2}}
			}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			for i := range 4 {
				c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
				if res, _ := c.response("GET"); res.StatusCode != 200 {
					t.Fatalf("got %d", res.StatusCode)
				}
				s.outcomes(t, i+1)
				f.engine.DropUpstream(func(key string) bool { return key == "other" || i%2 == 1 && key == "k" })
			}
			if s.dials != 2 {
				t.Errorf("%d dials, want 2: one before and one after the drop", s.dials)
			}
		})
	}
}

// TestUpstreamKeys: a connection is never used under another key, and never
// again without one.
func TestUpstreamKeys(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2 %v", h2), func(t *testing.T) {
			s := &session{addr: app(t, echo)}
			if h2 {
				s.addr = h2app(t, http.HandlerFunc(echo))
			}
			s.begin = func(r *engine.Request) engine.Verdict {
				return engine.Verdict{Upstream: engine.Upstream{Key: strings.Clone(r.RawQuery), H2: h2}}
			}
			f := start(t, engine.Config{}, s, false)
			c := connect(t, f.addr)
			for i, key := range []string{"a", "b", "a", "b", "", ""} {
				c.send("GET /?%s HTTP/1.1\r\nHost: h\r\n\r\n", key)
				if res, _ := c.response("GET"); res.StatusCode != 200 {
					t.Fatalf("got %d", res.StatusCode)
				}
				s.outcomes(t, i+1)
			}
			if s.dials != 4 {
				t.Errorf("%d dials, want 4: one for each key and one for each request without", s.dials)
			}
		})
	}
}
