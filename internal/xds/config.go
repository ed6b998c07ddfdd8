package xds

import (
	"context"
	"log/slog"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// Observer learns what one stream has applied. Its methods are called from that
// stream's goroutine, one at a time, and must not block.
//
// versions is name → version of what one response held. A resource that the
// response said is gone has the version "".
type Observer interface {
	Acked(typeURL string, versions map[string]string)
	Nacked(typeURL string, versions map[string]string, reason string)
}

// NodeObserver is an Observer that also wants the node id the client gave in its
// first request; it is what the client says of itself, and proves nothing.
type NodeObserver interface {
	Node(id string)
}

// Limits bound what one stream can cost. Zero means the default.
type Limits struct {
	// Names that a stream may subscribe to, over all types; default 1000.
	Names int
	// NameBytes bounds one name; default 2048 (a SPIFFE ID's own limit).
	NameBytes int
	// Held is how many resources a reconnecting client may say it holds; default 100000.
	Held int
	// ResponseBytes is about where a delta response is cut and continued in the
	// next; default 1 MiB, well under gRPC's own default of 4 MiB.
	ResponseBytes int
	// SendTimeout is how long a peer may leave one response unread; default 30s.
	SendTimeout time.Duration
	// AckWait is how long an unanswered response of a type holds back the next of
	// that type; what changes meanwhile is sent at once, coalesced. Default 2s.
	AckWait time.Duration
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.Names, 1000)
	def(&l.NameBytes, 2048)
	def(&l.Held, 100_000)
	def(&l.ResponseBytes, 1<<20)
	if l.SendTimeout <= 0 {
		l.SendTimeout = 30 * time.Second
	}
	if l.AckWait <= 0 {
		l.AckWait = 2 * time.Second
	}
	return l
}

// Config is what one stream is served with.
type Config struct {
	Source Source
	// Types are the type URLs that the stream may ask for. Where there is one, a
	// request may leave its type out, and another type is an error; where there are
	// several (ADS), an unknown type is ignored, so that it does not fail the others.
	Types []string
	// Observer may be nil.
	Observer Observer
	// Log may be nil. Resources' bodies are never logged.
	Log    *slog.Logger
	Limits Limits
	// Now may be nil.
	Now func() time.Time
}

func (c Config) withDefaults() Config {
	c.Limits = c.Limits.withDefaults()
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now //nolint:forbidigo // the default clock
	}
	if c.Observer == nil {
		c.Observer = nopObserver{}
	}
	return c
}

type nopObserver struct{}

func (nopObserver) Acked(string, map[string]string)          {}
func (nopObserver) Nacked(string, map[string]string, string) {}

// DeltaStream is the server's side of any of Envoy's delta streams.
type DeltaStream interface {
	Context() context.Context
	Send(*discoveryv3.DeltaDiscoveryResponse) error
	Recv() (*discoveryv3.DeltaDiscoveryRequest, error)
}

// SotWStream is the server's side of any of Envoy's state-of-the-world streams.
type SotWStream interface {
	Context() context.Context
	Send(*discoveryv3.DiscoveryResponse) error
	Recv() (*discoveryv3.DiscoveryRequest, error)
}

// DeltaClientStream is the client's side of any of Envoy's delta streams.
type DeltaClientStream interface {
	Send(*discoveryv3.DeltaDiscoveryRequest) error
	Recv() (*discoveryv3.DeltaDiscoveryResponse, error)
}
