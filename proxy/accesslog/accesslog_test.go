package accesslog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"castellan.dev/proxy/accesslog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func one(t *testing.T, e accesslog.Entry) map[string]any {
	t.Helper()
	var out bytes.Buffer
	l := accesslog.New(&out)
	l.Add(&e)
	l.Flush()
	if n := strings.Count(out.String(), "\n"); n != 1 {
		t.Fatalf("%d lines: %q", n, out.String())
	}
	var got map[string]any
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%v: %s", err, out.Bytes())
	}
	return got
}

func TestEntry(t *testing.T) {
	got := one(t, accesslog.Entry{
		Start:     time.Date(2026, 11, 21, 1, 2, 3, 4005000, time.UTC),
		Direction: "inbound", Protocol: "HTTP/1.1", Peer: "spiffe://cluster.local/ns/shop/sa/frontend",
		Method: "GET", Path: "/x", Host: "orders", Status: 403, BytesSent: 7, Duration: 1234567 * time.Nanosecond,
		Reason: "denied", Policy: "shop/p", Rule: 0, Error: errors.New("why"),
		RequestID: "r1", TraceParent: "00-1",
	})
	want := map[string]any{
		"time": "2026-11-21T01:02:03.004005Z", "direction": "inbound", "protocol": "HTTP/1.1",
		"peer": "spiffe://cluster.local/ns/shop/sa/frontend", "method": "GET", "path": "/x", "host": "orders",
		"status": 403.0, "bytesReceived": 0.0, "bytesSent": 7.0, "durationMs": 1.234, "reason": "denied",
		"policy": "shop/p", "rule": 0.0, "error": "why", "requestId": "r1", "traceparent": "00-1",
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s: %v, want %v", k, got[k], v)
		}
	}
	if len(got) != len(want) {
		t.Errorf("fields %v", got)
	}
}

// A peer's bytes can neither end the line nor the string, whatever they are.
func TestEveryByteStaysInItsField(t *testing.T) {
	for c := range 256 {
		path := "/a" + string([]byte{byte(c)}) + "b\u2028"
		got := one(t, accesslog.Entry{Path: path, Method: "GET"})
		s, _ := got["path"].(string)
		if !strings.HasPrefix(s, "/a") || !strings.Contains(s, "b") {
			t.Errorf("byte %#x: %q", c, s)
		}
		if c < 0x80 && s[2] != byte(c) {
			t.Errorf("byte %#x changed: %q", c, s)
		}
	}
}

func TestLongValuesAreCut(t *testing.T) {
	got := one(t, accesslog.Entry{Path: "/" + strings.Repeat("x", 1<<20)})
	if s := got["path"].(string); len(s) > 1100 || !strings.HasSuffix(s, "...") {
		t.Fatalf("%d bytes", len(s))
	}
}

// blocked is a writer that does not return until released.
type blocked struct {
	release chan struct{}
	mu      sync.Mutex
	n       int
}

func (b *blocked) Write(p []byte) (int, error) {
	<-b.release
	b.mu.Lock()
	defer b.mu.Unlock()
	b.n += bytes.Count(p, []byte("\n"))
	return len(p), nil
}

func TestSlowWriterDropsAndCounts(t *testing.T) {
	w := &blocked{release: make(chan struct{})}
	l := accesslog.New(w)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- l.Run(ctx) }()
	const n = 50_000
	for range n {
		l.Add(&accesslog.Entry{Path: "/" + strings.Repeat("x", 100)})
	}
	if l.Dropped() == 0 {
		t.Fatal("nothing was dropped, so memory has no bound")
	}
	close(w.release)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if uint64(w.n)+l.Dropped() != n {
		t.Fatalf("%d written and %d dropped of %d", w.n, l.Dropped(), n)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("no space left on device") }

func TestFailedWritesAreCounted(t *testing.T) {
	l := accesslog.New(failing{})
	l.Add(&accesslog.Entry{})
	l.Flush()
	if l.Dropped() != 1 {
		t.Fatalf("dropped %d", l.Dropped())
	}
}

func TestRunWritesTheRestAtTheEnd(t *testing.T) {
	var out bytes.Buffer
	l := accesslog.New(&out)
	l.Add(&accesslog.Entry{Path: "/last"})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.Run(ctx); err != nil || !strings.Contains(out.String(), "/last") {
		t.Fatalf("%v, %q", err, out.String())
	}
}

func TestNilLog(t *testing.T) {
	var l *accesslog.Log
	l.Add(&accesslog.Entry{})
	l.Flush()
}

func BenchmarkAdd(b *testing.B) {
	l := accesslog.New(io.Discard)
	e := accesslog.Entry{
		Start: time.Now(), Direction: "inbound", Protocol: "HTTP/1.1", Peer: "spiffe://cluster.local/ns/shop/sa/frontend",
		Source: "127.0.0.1:43210", Method: "GET", Host: "orders.shop", Path: "/orders/1", Status: 200, BytesSent: 1024,
		Duration: 345 * time.Microsecond, Policy: "shop/orders", RequestID: "0191f8a0-9c7e-7b6a-a5a9-6f1e0f0d7f7e",
	}
	b.ReportAllocs()
	for i := range b.N {
		l.Add(&e)
		if i%100 == 0 {
			l.Flush()
		}
	}
}
