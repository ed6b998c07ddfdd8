package telemetry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"castellan.dev/internal/config"
	"castellan.dev/internal/telemetry"
)

func TestMain(m *testing.M) {
	// After a 400 net/http lingers half a second, so that the client gets to read it.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}

func TestLogger(t *testing.T) {
	log := func(cfg config.Log) string {
		var out bytes.Buffer
		l := telemetry.NewLogger(&out, cfg)
		l.Debug("debug")
		l.Info("info", "id", "x")
		l.Warn("warn")
		l.Error("error")
		return out.String()
	}
	for level, want := range map[string]int{"": 3, "debug": 4, "info": 3, "warn": 2, "error": 1} {
		if got := strings.Count(log(config.Log{Level: level}), "\n"); got != want {
			t.Errorf("level %q: %d lines, want %d", level, got, want)
		}
	}
	var line struct{ Level, Msg, ID string }
	if err := json.Unmarshal([]byte(strings.SplitN(log(config.Log{}), "\n", 2)[0]), &line); err != nil || line.Level != "INFO" || line.Msg != "info" || line.ID != "x" {
		t.Errorf("%+v, %v", line, err)
	}
	if text := log(config.Log{Format: "text"}); !strings.Contains(text, "level=INFO msg=info id=x\n") {
		t.Errorf("%s", text)
	}
}

// admin runs one until the test ends.
func admin(t *testing.T, registry prometheus.Gatherer, log *slog.Logger, setup func(*telemetry.Admin)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := telemetry.NewAdmin(l, registry, log)
	if setup != nil {
		setup(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return "http://" + l.Addr().String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
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

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestReadyz(t *testing.T) {
	var identity, policy atomic.Pointer[error]
	check := func(p *atomic.Pointer[error]) func() error {
		return func() error {
			if err := p.Load(); err != nil {
				return *err
			}
			return nil
		}
	}
	url := admin(t, prometheus.NewRegistry(), discard(), func(a *telemetry.Admin) {
		a.AddCheck("policy", check(&policy))
		a.AddCheck("identity", check(&identity))
	})
	noPolicy := errors.New("no policy received yet")
	steps := []struct {
		policy                  *error
		code                    int
		short, verbose, comment string
	}{
		{nil, 200, "ok\n", "[+] identity ok\n[+] policy ok\n", "ready"},
		{&noPolicy, 503, "not ready; ask /readyz?verbose\n", "[+] identity ok\n[-] policy: no policy received yet\n", "not ready: named, in the order of names"},
		{nil, 200, "ok\n", "[+] identity ok\n[+] policy ok\n", "ready again"},
	}
	for _, s := range steps {
		policy.Store(s.policy)
		if code, body := get(t, url+"/readyz"); code != s.code || body != s.short {
			t.Errorf("%s: %d %q", s.comment, code, body)
		}
		for _, query := range []string{"?verbose", "?verbose=1", "?x&verbose"} {
			if code, body := get(t, url+"/readyz"+query); code != s.code || body != s.verbose {
				t.Errorf("%s%s: %d %q", s.comment, query, code, body)
			}
		}
		// Alive is alive, ready or not: a restart would not help.
		if code, body := get(t, url+"/livez"); code != 200 || body != "ok\n" {
			t.Errorf("%s: livez %d %q", s.comment, code, body)
		}
	}
}

// TestNotices: a notice is shown and takes no readiness away.
func TestNotices(t *testing.T) {
	url := admin(t, prometheus.NewRegistry(), slog.New(slog.DiscardHandler), func(a *telemetry.Admin) {
		a.AddCheck("policy", func() error { return nil })
		a.AddNotice("file", func() error { return errors.New("junk") })
		a.AddNotice("other", func() error { return nil })
	})
	if code, body := get(t, url+"/readyz"); code != 200 || body != "ok\n" {
		t.Errorf("%d %q", code, body)
	}
	if code, body := get(t, url+"/readyz?verbose"); code != 200 || body != "[+] policy ok\n[!] file: junk\n[+] other ok\n" {
		t.Errorf("%d %q", code, body)
	}
}

func TestMetricsAndHandlers(t *testing.T) {
	registry := telemetry.NewRegistry()
	url := admin(t, registry, discard(), func(a *telemetry.Admin) {
		a.Handle("GET /keys", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }))
	})
	code, body := get(t, url+"/metrics")
	for _, want := range []string{"go_goroutines ", "process_resident_memory_bytes "} {
		if code != 200 || !strings.Contains(body, want) {
			t.Errorf("%d: no %q", code, want)
		}
	}
	if code, body := get(t, url+"/keys"); code != 200 || body != "{}" {
		t.Errorf("%d %q", code, body)
	}
	for _, path := range []string{"/", "/debug/pprof/", "/readyz/x", "/metricsx"} {
		if code, _ := get(t, url+path); code != 404 {
			t.Errorf("%s: %d", path, code)
		}
	}
	resp, err := http.Post(url+"/readyz", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 405 {
		t.Errorf("POST: %d", resp.StatusCode)
	}
	// Two binaries in one process would not share a registry.
	if telemetry.NewRegistry() == registry {
		t.Error("one registry for all")
	}
}

func TestLimits(t *testing.T) {
	url := admin(t, prometheus.NewRegistry(), discard(), nil)
	addr := strings.TrimPrefix(url, "http://")
	t.Run("headers are bounded", func(t *testing.T) {
		req, err := http.NewRequest("GET", url+"/livez", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Long", strings.Repeat("x", 64<<10))
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return // refused while it was sent
		}
		defer resp.Body.Close()
		if resp.StatusCode != 431 {
			t.Errorf("%d", resp.StatusCode)
		}
	})
	t.Run("a client that says nothing is dropped", func(t *testing.T) {
		if testing.Short() {
			t.Skip("waits for the server's own deadline of 5 s")
		}
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("GET /livez HTTP/1.1\r\nHost: x\r\n")); err != nil { // no end
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(conn); err != nil {
			t.Errorf("still open: %v", err)
		}
	})
}

// TestIdleConnections: who sits on all the places of his address loses the oldest to
// who comes; neither a kubelet is kept waiting, nor memory without bound.
func TestIdleConnections(t *testing.T) {
	url := admin(t, telemetry.NewRegistry(), slog.New(slog.DiscardHandler), func(*telemetry.Admin) {})
	var idle []net.Conn
	for range 40 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		idle = append(idle, conn)
	}
	for i, conn := range idle[:8] {
		if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("connection %d is kept", i)
		}
	}
}

// A handler that panics is told of, and ends nothing; what clients do wrong is not.
func TestErrorsAreLogged(t *testing.T) {
	var mu sync.Mutex
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(writer(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return out.Write(b)
	}), nil))
	logged := func() string {
		mu.Lock()
		defer mu.Unlock()
		return out.String()
	}
	url := admin(t, prometheus.NewRegistry(), log, func(a *telemetry.Admin) {
		a.Handle("GET /panic", http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("odd") }))
	})
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("\x16\x03\x01 nonsense\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400 ") {
		t.Errorf("%q, %v", answer, err)
	}
	if got := logged(); got != "" {
		t.Errorf("%s", got)
	}
	if resp, err := http.Get(url + "/panic"); err == nil {
		resp.Body.Close()
		t.Errorf("answered %d", resp.StatusCode)
	}
	if got := logged(); !strings.Contains(got, "level=WARN") || !strings.Contains(got, "panic serving") {
		t.Errorf("%s", got)
	}
	if code, _ := get(t, url+"/livez"); code != 200 {
		t.Errorf("%d: one bad handler ended the server", code)
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }

func TestRunSaysWhyItCannotServe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	err = telemetry.NewAdmin(l, prometheus.NewRegistry(), discard()).Run(context.Background())
	if err == nil || !strings.HasPrefix(err.Error(), "admin listener: ") {
		t.Errorf("%v", err)
	}
}
