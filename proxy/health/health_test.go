package health_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"castellan.dev/internal/config"
	"castellan.dev/internal/telemetry"
	"castellan.dev/proxy/health"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs a handler as the binary does.
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- telemetry.Serve(ctx, "ready", l, h, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       time.Minute,
	}
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("User-Agent", "kube-probe/1.36")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestReady(t *testing.T) {
	var trouble atomic.Pointer[error]
	url := serve(t, health.Ready(func() error { return nil }, func() error {
		if e := trouble.Load(); e != nil {
			return *e
		}
		return nil
	}))
	if code, body := get(t, url+"/healthz/ready"); code != 200 || body != "ready\n" {
		t.Errorf("%d %q", code, body)
	}
	secret := errors.New("certificate of somebody")
	trouble.Store(&secret)
	// The reason is not for whoever asks here.
	if code, body := get(t, url+"/healthz/ready"); code != 503 || body != "not ready\n" {
		t.Errorf("%d %q", code, body)
	}
	for _, path := range []string{"/", "/metrics", "/healthz", "/healthz/ready/x"} {
		if code, _ := get(t, url+path); code != 404 {
			t.Errorf("%s: %d", path, code)
		}
	}
}

func port(t *testing.T, addr string) uint16 {
	t.Helper()
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	var n uint16
	if _, err := fmt.Sscan(p, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// application answers probes as told by the path.
type application struct {
	mu    sync.Mutex
	asked []*http.Request
	hang  chan struct{}
}

func (a *application) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.asked = append(a.asked, r)
	a.mu.Unlock()
	switch r.URL.Path {
	case "/redirect":
		http.Redirect(w, r, "http://192.0.2.1/elsewhere", http.StatusFound)
	case "/hang":
		select {
		case <-a.hang:
		case <-r.Context().Done():
		}
	case "/long":
		w.Header().Set("X-App", "secret")
		fmt.Fprint(w, strings.Repeat("x", 1<<20))
	case "/sick":
		http.Error(w, "the database is down", 500)
	case "/h2":
		if r.ProtoMajor != 2 {
			w.WriteHeader(505)
		}
	}
}

func (a *application) last() *http.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[len(a.asked)-1]
}

func TestHTTPProbes(t *testing.T) {
	app := &application{hang: make(chan struct{})}
	plain := httptest.NewServer(app)
	defer plain.Close()
	secure := httptest.NewUnstartedServer(app)
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	httpGet := func(path string) config.Probe {
		return config.Probe{TimeoutSeconds: 20, HTTPGet: &config.HTTPProbe{Path: path, Port: port(t, plain.Listener.Addr().String()), Scheme: "HTTP"}}
	}
	https := httpGet("/h2")
	https.HTTPGet.Scheme, https.HTTPGet.Port = "HTTPS", port(t, secure.Listener.Addr().String())
	headers := httpGet("/ok?full=1")
	headers.HTTPGet.HTTPHeaders = []config.ProbeHeader{{Name: "host", Value: "app.example"}, {Name: "x-a", Value: "1"}, {Name: "X-A", Value: "2"}, {Name: "User-Agent", Value: "own"}}
	slow := httpGet("/hang")
	slow.TimeoutSeconds = 1
	gone := httpGet("/")
	gone.HTTPGet.Port = port(t, closed.Addr().String())
	handler := health.Probes(map[string]config.Probe{
		"/app-health/a/ok": httpGet("/ok"), "/app-health/a/sick": httpGet("/sick"), "/app-health/a/redirect": httpGet("/redirect"),
		"/app-health/a/long": httpGet("/long"), "/app-health/a/https": https, "/app-health/a/headers": headers, "/app-health/a/slow": slow,
		"/app-health/a/gone": gone, "/app-health/a/relative": httpGet("ok"),
		"/app-health/a/elsewhere": httpGet("http://192.0.2.1:9/ok"), "/app-health/a/user": httpGet("//u:p@192.0.2.1/ok"),
	}, (&net.Dialer{}).DialContext, slog.New(slog.DiscardHandler))
	url := serve(t, handler)
	for path, want := range map[string]int{
		"ok": 200, "sick": 500, "redirect": 302, "long": 200, "https": 200, "headers": 200, "slow": 504, "gone": 503, "relative": 200,
		// The application is asked, whatever the path would name.
		"elsewhere": 200, "user": 200,
		// Nothing that is not configured.
		"other": 404, "ok/": 404, "../a/none": 404,
	} {
		if code, body := get(t, url+"/app-health/a/"+path); code != want || body != "" && want != 404 {
			t.Errorf("%s: %d %q, want %d", path, code, body, want)
		}
	}
	get(t, url+"/app-health/a/headers")
	if r := app.last(); r.Host != "app.example" || fmt.Sprint(r.Header["X-A"]) != "[1 2]" || r.URL.RawQuery != "full=1" || r.UserAgent() != "own" {
		t.Errorf("%s %v", r.Host, r.Header)
	}
	get(t, url+"/app-health/a/ok")
	if r := app.last(); r.UserAgent() != "kube-probe/1.36" || !strings.HasPrefix(r.Host, "127.0.0.1:") || len(r.Header) != 3 {
		t.Errorf("%s %v", r.Host, r.Header)
	}
}

// However many ask, the application is asked once at a time, and all get its answer.
func TestProbesAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		app := &application{hang: make(chan struct{})}
		l := pipes{make(chan net.Conn), make(chan struct{})}
		server := &http.Server{Handler: app, ReadHeaderTimeout: time.Minute}
		go func() { _ = server.Serve(l) }()
		defer server.Close()
		probes := health.Probes(map[string]config.Probe{
			"/app-health/a": {TimeoutSeconds: 60, HTTPGet: &config.HTTPProbe{Path: "/hang", Port: 80, Scheme: "HTTP"}},
		}, l.dial, slog.New(slog.DiscardHandler))
		codes := make(chan int, 20)
		for range cap(codes) {
			go func() {
				w := httptest.NewRecorder()
				r := httptest.NewRequest(http.MethodGet, "/app-health/a", nil)
				probes.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1})))
				codes <- w.Code
			}()
		}
		synctest.Wait() // all have asked
		app.mu.Lock()
		n := len(app.asked)
		app.mu.Unlock()
		if n != 1 {
			t.Errorf("the application was asked %d times at once", n)
		}
		close(app.hang)
		for range cap(codes) {
			if code := <-codes; code != 200 {
				t.Errorf("%d", code)
			}
		}
	})
}

// pipes listens where dial calls, without a network.
type pipes struct {
	calls  chan net.Conn
	closed chan struct{}
}

func (p pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.calls <- far:
		return near, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.calls:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p pipes) Close() error   { close(p.closed); return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

func TestTCPAndGRPCProbes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, status := grpc.NewServer(), grpchealth.NewServer()
	healthv1.RegisterHealthServer(server, status)
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(l) }()
	p := port(t, l.Addr().String())
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	url := serve(t, health.Probes(map[string]config.Probe{
		"/app-health/tcp":   {TimeoutSeconds: 20, TCPSocket: &config.TCPProbe{Port: p}},
		"/app-health/all":   {TimeoutSeconds: 20, GRPC: &config.GRPCProbe{Port: p}},
		"/app-health/one":   {TimeoutSeconds: 20, GRPC: &config.GRPCProbe{Port: p, Service: "orders"}},
		"/app-health/mute":  {TimeoutSeconds: 1, GRPC: &config.GRPCProbe{Port: port(t, mute.Addr().String())}},
		"/app-health/empty": {TimeoutSeconds: 1},
	}, (&net.Dialer{}).DialContext, slog.New(slog.DiscardHandler)))
	check := func(path string, want int) {
		t.Helper()
		if code, body := get(t, url+path); code != want || body != "" {
			t.Errorf("%s: %d %q, want %d", path, code, body, want)
		}
	}
	check("/app-health/tcp", 200)
	check("/app-health/all", 200)
	check("/app-health/one", 503) // unknown to it
	status.SetServingStatus("orders", healthv1.HealthCheckResponse_NOT_SERVING)
	check("/app-health/one", 503)
	status.SetServingStatus("orders", healthv1.HealthCheckResponse_SERVING)
	check("/app-health/one", 200)
	check("/app-health/mute", 504)
	check("/app-health/empty", 404)
	server.Stop()
	<-served
	check("/app-health/tcp", 503)
	check("/app-health/all", 503)
}

// TestIdleConnections: a kubelet gets its answer though another address sits on every
// place that one may have, and its own address too.
func TestIdleConnections(t *testing.T) {
	url := serve(t, health.Ready())
	var first net.Conn
	for _, source := range []string{"127.0.0.1", "127.0.0.2"} {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		for range 40 {
			conn, err := d.Dial("tcp", strings.TrimPrefix(url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			// Between two requests the server waits a minute.
			if _, err := io.WriteString(conn, "GET /healthz/ready HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = conn
			}
		}
	}
	if err := first.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, first); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the oldest is kept")
	}
	if code, _ := get(t, url+"/healthz/ready"); code != 200 {
		t.Errorf("%d", code)
	}
}
