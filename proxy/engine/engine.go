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
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Session is what a connection's owner decides. Begin and End of one HTTP/1
// connection come from one goroutine; HTTP/2 calls them concurrently for
// concurrent requests.
type Session interface {
	// Begin judges a request: after strict parsing and removal of hop-by-hop
	// fields, before anything of it is forwarded and before any "100 Continue".
	// It must not wait for the network.
	Begin(r *Request) Verdict
	// Dial opens a connection to the upstream the verdict named. It is called
	// only when no pooled connection with that key is usable. A *StatusError
	// chooses the answer; other errors answer 503, timeouts 504. For HTTP/2
	// upstreams the connection then also serves other requests of the same key.
	Dial(ctx context.Context, r *Request) (net.Conn, error)
	// End is called exactly once for each request that was answered or given
	// up, also for one refused before Begin (r.Judged() is false then, and
	// fields of r may be empty). It must not wait.
	End(r *Request, o *Outcome)
}

// Keyed is an optional ability of what Dial returns: a connection that went to
// another endpoint than the verdict's key names says which key it is pooled under.
type Keyed interface{ PoolKey() string }

// Field is one header field.
type Field struct{ Name, Value string }

// Verdict is what Session.Begin decides. The zero value forwards unchanged to
// an HTTP/1.1 upstream that is not pooled. Slices may be reused by the Session
// once End was called for the request.
type Verdict struct {
	// Status other than 0 answers the client with it; nothing is forwarded.
	Status int
	// Body is the one-line body of such an answer; a newline is added. Default: the status text.
	Body string
	// Header is added to such an answer (WWW-Authenticate).
	Header []Field

	// Path, if not empty, replaces the path: it is forwarded byte for byte.
	Path string
	// Query replaces the query (without "?"; empty removes it) when SetQuery is true.
	Query    string
	SetQuery bool
	// Host, if not empty, replaces the authority.
	Host string
	// Remove names fields, in lower case, that are not forwarded. They are kept
	// out of trailers too.
	Remove []string
	// Set are fields set after that: every field of the same name is dropped
	// first, from trailers too. Several entries of one name are all sent.
	// Framing fields (Content-Length, Transfer-Encoding, Connection, ...) and Host are ignored in both.
	Set []Field

	// Upstream says where it goes.
	Upstream Upstream
	// Close ends the connection after this response (HTTP/2: GOAWAY).
	Close bool
}

// Upstream names where a request goes. Connections of equal Key are
// interchangeable: same endpoint, same expected identity, same own credential.
// With an empty Key connections are never shared or kept.
type Upstream struct {
	Key string
	// H2 speaks HTTP/2 on what Dial returns (prior knowledge, or negotiated by the dialer).
	H2 bool
	// Scheme is HTTP/2's :scheme; default "http".
	Scheme string
}

// StatusError is an error of Dial that chooses the answer (502, 503 or 504).
// Reason is a constant for Outcome.Reason.
type StatusError struct {
	Status int
	Reason string
	Err    error
}

// Error returns the cause's text: it is for logs, never for peers.
func (e *StatusError) Error() string {
	if e.Err == nil {
		return e.Reason
	}
	return e.Reason + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *StatusError) Unwrap() error { return e.Err }

// Outcome is how a request ended. It is valid during End only.
type Outcome struct {
	// Status is what was sent to the client; 0: nothing was.
	Status int
	// Reason is empty for a response relayed whole; else one of the Reason constants or a StatusError's.
	Reason string
	// Err is the cause, for logs.
	Err error
	// RequestBytes and ResponseBytes count body bytes read from and written to the client (tunnelled bytes included).
	RequestBytes, ResponseBytes int64
	// Start is when the first byte of the request was seen.
	Start time.Time
	// Judged is how long after Start Begin had returned, Connected when an
	// upstream connection was there, FirstByte when the response's head was
	// there, Total when the last byte was sent; 0 for a stage not reached.
	Judged, Connected, FirstByte, Total time.Duration
	// Reused: the upstream connection was pooled. Retried: a pooled one had
	// been closed by the upstream and a fresh one was used.
	Reused, Retried bool
	// Upgraded: a WebSocket was tunnelled.
	Upgraded bool
	// GRPCStatus is the response's grpc-status, or "".
	GRPCStatus string
}

// Reasons in Outcome.Reason, constant for metrics and logs.
const (
	ReasonMalformed       = "malformed_request"
	ReasonTooLarge        = "request_head_too_large"
	ReasonHeaderTimeout   = "request_head_timeout"
	ReasonMethod          = "method_not_supported"
	ReasonVersion         = "version_not_supported"
	ReasonVerdict         = "verdict"
	ReasonDial            = "upstream_connect_failed"
	ReasonDialTimeout     = "upstream_connect_timeout"
	ReasonReset           = "upstream_closed"
	ReasonBadResponse     = "upstream_malformed_response"
	ReasonResponseTimeout = "upstream_response_timeout"
	ReasonBodyTimeout     = "stream_idle_timeout"
	ReasonRequestBody     = "malformed_request_body"
	ReasonClientGone      = "client_gone"
	ReasonClosed          = "connection_closed"
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
	MaxIdleUpstream        int           // idle upstream connections kept for one key; default 128
	Log                    *slog.Logger  // default: discard
	Now                    func() time.Time
}

// ErrDraining is why a connection is not served any more.
var ErrDraining = errors.New("engine: draining")

// Engine serves connections. It is safe for concurrent use.
type Engine struct {
	cfg Config

	mu       sync.Mutex
	conns    map[*Conn]struct{}
	draining bool
}

// New returns an Engine; it starts nothing.
func New(cfg Config) *Engine {
	return &Engine{cfg: cfg, conns: map[*Conn]struct{}{}}
}

// NewConn prepares to serve an accepted connection; h2: it speaks HTTP/2 (by
// ALPN or prior knowledge). The connection's owner may close it through the Conn.
func (e *Engine) NewConn(conn net.Conn, h2 bool, s Session) *Conn {
	return &Conn{engine: e}
}

// ServeConn serves conn until it ends, and closes it. When ctx ends it is closed at once.
func (e *Engine) ServeConn(ctx context.Context, conn net.Conn, h2 bool, s Session) {
	e.NewConn(conn, h2, s).Serve(ctx)
}

// Drain closes every connection gracefully (idle ones at once, others after
// their responses) and waits for them; when ctx ends what is left is closed at
// once. Connections that come later are closed without being served.
func (e *Engine) Drain(ctx context.Context) error { return nil }

// DropUpstream closes pooled upstream connections whose key matches, those that
// serve requests once these have ended.
func (e *Engine) DropUpstream(match func(key string) bool) {}

// Close closes pooled upstream connections. Call it after Drain.
func (e *Engine) Close() {}

// Conn is one client connection.
type Conn struct {
	engine *Engine
}

// Serve serves the connection until it ends, and closes it. When ctx ends it is closed at once.
func (c *Conn) Serve(ctx context.Context) {}

// CloseGracefully closes the connection once nothing is in flight: HTTP/1 after
// the current response, HTTP/2 by GOAWAY. It does not wait.
func (c *Conn) CloseGracefully() {}

// CloseNow closes the connection at once. It does not wait.
func (c *Conn) CloseNow() {}

// IdleSince says since when no request is in flight; false when one is.
func (c *Conn) IdleSince() (time.Time, bool) { return time.Time{}, false }
