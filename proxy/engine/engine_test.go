package engine_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"castellan.dev/proxy/engine"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ended is what a session was told at End, copied.
type ended struct {
	Method, Path, Host string
	Judged             bool
	engine.Outcome
}

// session is a Session for tests: it forwards everything to addr.
type session struct {
	addr  string
	begin func(*engine.Request) engine.Verdict
	dial  func(context.Context, *engine.Request) (net.Conn, error)

	mu    sync.Mutex
	ended []ended
	dials int
}

func (s *session) Begin(r *engine.Request) engine.Verdict {
	if s.begin != nil {
		return s.begin(r)
	}
	return engine.Verdict{Upstream: engine.Upstream{Key: s.addr}}
}

func (s *session) Dial(ctx context.Context, r *engine.Request) (net.Conn, error) {
	s.mu.Lock()
	s.dials++
	s.mu.Unlock()
	if s.dial != nil {
		return s.dial(ctx, r)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", s.addr)
}

func (s *session) End(r *engine.Request, o *engine.Outcome) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = append(s.ended, ended{strings.Clone(r.Method), strings.Clone(r.Path), strings.Clone(r.Host), r.Judged(), *o})
}

// outcomes waits until n requests ended.
func (s *session) outcomes(t testing.TB, n int) []ended {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		got := s.ended
		s.mu.Unlock()
		if len(got) >= n {
			return got
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d requests ended, want %d", len(got), n)
		}
	}
}

// front is a listener served by an engine.
type front struct {
	addr    string
	engine  *engine.Engine
	session *session
}

// start serves connections of a loopback listener until the test ends.
func start(t testing.TB, cfg engine.Config, s *session, h2 bool) *front {
	t.Helper()
	return startEngine(t, engine.New(cfg), s, h2)
}

func startEngine(t testing.TB, e *engine.Engine, s *session, h2 bool) *front {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { e.ServeConn(ctx, conn, h2, s) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		cancel()
		wg.Wait()
		e.Close()
	})
	return &front{addr: l.Addr().String(), engine: e, session: s}
}

// app starts an application.
func app(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// client is a raw connection to the front.
type client struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

func connect(t testing.TB, addr string) *client {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return &client{t, conn, bufio.NewReader(conn)}
}

func (c *client) send(format string, args ...any) {
	c.t.Helper()
	if len(args) > 0 { // a format
		format = fmt.Sprintf(format, args...)
	}
	if _, err := io.WriteString(c, format); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

// response reads one response, body and all.
func (c *client) response(method string) (*http.Response, string) {
	c.t.Helper()
	res, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("response: %v", err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatalf("response body: %v", err)
	}
	return res, string(body)
}

// closed asserts that the front has closed the connection.
func (c *client) closed() {
	c.t.Helper()
	if b, err := c.r.ReadByte(); err != io.EOF {
		c.t.Fatalf("read %q, %v; want the connection closed", b, err)
	}
}

func echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Path", r.RequestURI)
	w.Header().Set("X-Method", r.Method)
	http.NewResponseController(w).EnableFullDuplex()
	io.Copy(w, r.Body)
}
