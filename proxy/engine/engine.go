// Package engine carries HTTP/1.1 and HTTP/2 between a client connection and an
// upstream: it parses strictly, asks a Session about each request before
// anything of it is forwarded, and relays bodies both ways at once.
//
// It refuses what two parsers could read differently (bare line feeds, folded
// lines, Content-Length beside Transfer-Encoding, unknown transfer codings,
// names with underscores or spaces, ...), strips hop-by-hop fields before the
// Session judges, and forwards the path exactly as judged. Only WebSocket
// upgrades are tunnelled.
//
// It assumes that the connection it is given is authenticated already, that the
// Session decides policy and dials, and that pool keys are equal only where
// connections are interchangeable. It knows no TLS, no policy and no tokens.
package engine

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"
)

// Config bounds what a peer can cost. Zero values take the default named.
type Config struct {
	MaxHeaderBytes         int           // request head; default 32 KiB
	MaxResponseHeaderBytes int           // default 64 KiB
	MaxTargetBytes         int           // request target; default 8 KiB
	MaxHeaders             int           // fields in a head; default 100
	MaxStreams             int           // per HTTP/2 connection; default 100
	HeaderTimeout          time.Duration // from a head's first byte to its last; default 10s
	IdleTimeout            time.Duration // between requests; default 5m
	ConnectTimeout         time.Duration // for Dial; default 5s
	ResponseTimeout        time.Duration // from the last byte sent upstream to the response's head; default 60s
	StreamIdleTimeout      time.Duration // no byte either way in a body or tunnel; default 5m
	UpstreamIdleTimeout    time.Duration // how long an idle upstream connection is kept; default 30s
	MaxIdleUpstream        int           // idle upstream connections kept for one key; default 1024
	Log                    *slog.Logger  // default: discard
	Now                    func() time.Time
}

// withDefaults fills in what is zero.
func (c Config) withDefaults() Config {
	number := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	duration := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	number(&c.MaxHeaderBytes, 32<<10)
	number(&c.MaxResponseHeaderBytes, 64<<10)
	number(&c.MaxTargetBytes, 8<<10)
	number(&c.MaxHeaders, 100)
	number(&c.MaxStreams, 100)
	number(&c.MaxIdleUpstream, 1024)
	duration(&c.HeaderTimeout, 10*time.Second)
	duration(&c.IdleTimeout, 5*time.Minute)
	duration(&c.ConnectTimeout, 5*time.Second)
	duration(&c.ResponseTimeout, time.Minute)
	duration(&c.StreamIdleTimeout, 5*time.Minute)
	duration(&c.UpstreamIdleTimeout, 30*time.Second)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Engine serves connections. It is safe for concurrent use.
type Engine struct {
	cfg       Config
	buffers   buffers
	exchanges sync.Pool
	upstreams upstreams
	h2        h2Pool

	mu       sync.Mutex
	conns    map[*Conn]struct{}
	draining bool
	ended    chan struct{} // closed when draining and no connection is left
}

// New returns an Engine; it starts nothing.
func New(cfg Config) *Engine {
	e := &Engine{cfg: cfg.withDefaults(), conns: map[*Conn]struct{}{}, ended: make(chan struct{})}
	e.exchanges.New = func() any { return newExchange(e) }
	e.upstreams.init(e)
	e.h2.init(e)
	return e
}

// ServeConn serves conn until it ends, and closes it. When ctx ends it is closed at once.
func (e *Engine) ServeConn(ctx context.Context, conn net.Conn, h2 bool, s Session) {
	e.NewConn(conn, h2, s).Serve(ctx)
}

// Drain closes every connection gracefully (idle ones at once, others after
// their responses) and waits for them; when ctx ends what is left is closed at
// once, and Drain says so. Connections that come later are closed without being served.
func (e *Engine) Drain(ctx context.Context) error {
	conns := e.startDraining()
	for _, c := range conns {
		c.CloseGracefully()
	}
	select {
	case <-e.ended:
		return nil
	case <-ctx.Done():
	}
	left := e.live()
	for _, c := range left {
		c.CloseNow()
	}
	<-e.ended
	return fmt.Errorf("engine: %d connections closed before their requests ended: %w", len(left), context.Cause(ctx))
}

func (e *Engine) startDraining() []*Conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.draining {
		e.draining = true
		if len(e.conns) == 0 {
			close(e.ended)
		}
	}
	return slices.Collect(maps.Keys(e.conns))
}

func (e *Engine) live() []*Conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.conns))
}

// enter registers a connection; false when draining.
func (e *Engine) enter(c *Conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.draining {
		return false
	}
	e.conns[c] = struct{}{}
	return true
}

func (e *Engine) leave(c *Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.conns, c)
	if e.draining && len(e.conns) == 0 {
		close(e.ended)
	}
}

// DropUpstream closes pooled upstream connections whose key matches, those that
// serve requests once these have ended.
func (e *Engine) DropUpstream(match func(key string) bool) {
	e.upstreams.drop(match)
	e.h2.drop(match)
}

// Close closes pooled upstream connections, and keeps none from then on. Call it after Drain.
func (e *Engine) Close() {
	e.upstreams.close()
	e.h2.close()
}
