package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"sync"
	"time"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// load is calls that go on until they are stopped.
type load struct {
	stop context.CancelFunc
	all  sync.WaitGroup
	own  *caller // with connections of its own

	mu     sync.Mutex
	report control.Report
}

// loadTimeout is how long a call of a load may take.
const loadTimeout = 30 * time.Second

// maxFailures bounds what a report tells of failures.
const maxFailures = 10

func (c *caller) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /call", func(w http.ResponseWriter, r *http.Request) {
		var call control.Call
		if decode(w, r, &call) {
			_ = json.NewEncoder(w).Encode(c.call(r.Context(), call))
		}
	})
	mux.HandleFunc("POST /load", func(w http.ResponseWriter, r *http.Request) {
		var l control.Load
		if decode(w, r, &l) {
			_ = json.NewEncoder(w).Encode(c.start(l))
		}
	})
	mux.HandleFunc("GET /load/{id}", func(w http.ResponseWriter, r *http.Request) { c.tell(w, r.PathValue("id"), false) })
	mux.HandleFunc("DELETE /load/{id}", func(w http.ResponseWriter, r *http.Request) { c.tell(w, r.PathValue("id"), true) })
	mux.HandleFunc("GET /identity", func(w http.ResponseWriter, r *http.Request) {
		c.own(w, r, func(ctx context.Context) (any, error) { return c.source.identity(ctx) })
	})
	mux.HandleFunc("GET /jwt", func(w http.ResponseWriter, r *http.Request) {
		c.own(w, r, func(ctx context.Context) (any, error) { return c.source.jwt(ctx, r.FormValue("audience")) })
	})
	mux.HandleFunc("GET /stat", func(w http.ResponseWriter, r *http.Request) {
		info, err := os.Stat(r.FormValue("path"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		fmt.Fprint(w, info.Mode())
	})
	mux.HandleFunc("GET /started", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(control.Started{Started: c.started})
	})
	mux.HandleFunc("GET /alive", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "alive") })
	return mux
}

func decode(w http.ResponseWriter, r *http.Request, v any) bool {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxAnswer)).Decode(v); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

func (c *caller) own(w http.ResponseWriter, r *http.Request, get func(context.Context) (any, error)) {
	if c.source == nil {
		http.Error(w, "there is no socket", http.StatusNotFound)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	v, err := get(ctx)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_ = json.NewEncoder(w).Encode(v)
}

func (c *caller) start(l control.Load) string {
	ctx, cancel := context.WithCancel(context.Background())
	running := &load{stop: cancel, own: newCaller(c.started, c.source)}
	c.mu.Lock()
	c.next++
	id := fmt.Sprint(c.next)
	c.loads[id] = running
	c.mu.Unlock()
	if l.Call.Timeout == 0 {
		l.Call.Timeout = int(loadTimeout / time.Millisecond)
	}
	running.all.Go(func() {
		ticks := time.NewTicker(max(l.Every, time.Millisecond))
		defer ticks.Stop()
		for ctx.Err() == nil {
			// A call that was begun is finished: being stopped is no failure.
			running.count(running.own.call(context.Background(), l.Call))
			select {
			case <-ctx.Done():
			case <-ticks.C:
			}
		}
	})
	return id
}

func (l *load) count(r control.Result) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.report.Calls++
	l.report.Longest = max(l.report.Longest, r.Millis)
	if r.Error == "" && r.Status < 400 {
		return
	}
	l.report.Failed++
	if len(l.report.Failures) < maxFailures {
		text := fmt.Sprintf("%s after %.0f ms: %d %s %s", time.Now().Format("15:04:05.000"), r.Millis, r.Status, r.Error, r.Body)
		l.report.Failures = append(l.report.Failures, text)
	}
}

func (c *caller) tell(w http.ResponseWriter, id string, end bool) {
	c.mu.Lock()
	l := c.loads[id]
	if end {
		delete(c.loads, id)
	}
	c.mu.Unlock()
	if l == nil {
		http.Error(w, "no such load", http.StatusNotFound)
		return
	}
	if end {
		l.stop()
		l.all.Wait()
		l.own.close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = json.NewEncoder(w).Encode(l.report)
}
