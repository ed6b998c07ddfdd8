// Package telemetry gives every binary its logger, its own metrics registry, and
// the small HTTP server that shows both health and metrics. It keeps no globals.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"castellan.dev/internal/config"
	"castellan.dev/internal/crowd"
)

// NewLogger returns a logger that writes to w as cfg says.
func NewLogger(w io.Writer, cfg config.Log) *slog.Logger {
	var level slog.Level
	// Validate has refused other values; on its zero value the level stays info.
	_ = level.UnmarshalText([]byte(cfg.Level))
	opts := &slog.HandlerOptions{Level: level}
	if cfg.Format == "text" {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

// NewRegistry returns a registry with the process and Go collectors.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Admin serves /livez, /readyz[?verbose] and /metrics.
type Admin struct {
	listener net.Listener
	log      *slog.Logger

	mu      sync.Mutex
	checks  map[string]func() error
	notices map[string]func() error
	mux     *http.ServeMux
}

// NewAdmin returns an Admin on listener; nothing is served before Run.
func NewAdmin(listener net.Listener, gatherer prometheus.Gatherer, log *slog.Logger) *Admin {
	a := &Admin{listener: listener, log: log, checks: map[string]func() error{}, notices: map[string]func() error{}, mux: http.NewServeMux()}
	a.mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	a.mux.HandleFunc("GET /readyz", a.readyz)
	a.mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{}))
	return a
}

// AddCheck adds a named readiness check; nil from it means ready. Its error is
// shown to whoever asks with ?verbose, so it must hold no secret.
func (a *Admin) AddCheck(name string, check func() error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.checks[name] = check
}

// AddNotice adds something that is shown with ?verbose and takes no readiness away:
// a fault that the process goes on serving with, where ending it would do harm.
func (a *Admin) AddNotice(name string, check func() error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.notices[name] = check
}

// Handle adds a handler, for what else a binary publishes over plain HTTP. Call it before Run.
func (a *Admin) Handle(pattern string, h http.Handler) { a.mux.Handle(pattern, h) }

// Run serves until ctx ends.
func (a *Admin) Run(ctx context.Context) error {
	return Serve(ctx, "admin", a.listener, a.mux, a.log)
}

// observers are the connections of a port that Serve serves, which anybody may open: a
// node's kubelet and a collector or two need a handful.
var observers = crowd.Bounds{Total: 256, PerSource: 32}

// Serve serves h on l, in the clear, until ctx ends: what observers ask of a program.
// Errors name the listener.
func Serve(ctx context.Context, name string, l net.Listener, h http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn), // accepting failed, or a handler panicked
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(crowd.Limit(l, observers, crowd.Bounds{})); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("%s listener: %w", name, err)
	}
	return nil
}

func (a *Admin) readyz(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	checks, notices := maps.Clone(a.checks), maps.Clone(a.notices)
	a.mu.Unlock()
	var body strings.Builder
	ready := true
	for _, name := range slices.Sorted(maps.Keys(checks)) {
		if err := checks[name](); err != nil {
			ready = false
			fmt.Fprintf(&body, "[-] %s: %v\n", name, err)
		} else {
			fmt.Fprintf(&body, "[+] %s ok\n", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(notices)) {
		if err := notices[name](); err != nil {
			fmt.Fprintf(&body, "[!] %s: %v\n", name, err)
		} else {
			fmt.Fprintf(&body, "[+] %s ok\n", name)
		}
	}
	if !ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	switch {
	case r.URL.Query().Has("verbose"):
		_, _ = io.WriteString(w, body.String())
	case ready:
		fmt.Fprintln(w, "ok")
	default:
		fmt.Fprintln(w, "not ready; ask /readyz?verbose")
	}
}
