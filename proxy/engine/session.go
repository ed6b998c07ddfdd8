package engine

import (
	"context"
	"net"
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
