package xds

import (
	"context"
	"log/slog"
	"time"
)

// Subscription is one resource type that a Client follows.
type Subscription struct {
	TypeURL string
	// Names to follow; nil follows everything (wildcard).
	Names []string
	// Apply takes one update: resources that are new or have another version, and
	// names of those that are gone. It is called for an empty update too, since that
	// says that there is nothing (more). An error refuses the whole update: it goes
	// to the server as the NACK's reason, and the client goes on holding the versions
	// from before. It is called from Run's goroutine, one at a time.
	Apply func(changed []Resource, removed []string) error
}

// ClientConfig configures a Client.
type ClientConfig struct {
	// Open opens a stream, which must end with ctx.
	Open func(ctx context.Context) (DeltaClientStream, error)
	// NodeID is what the client calls itself.
	NodeID        string
	Subscriptions []Subscription
	Log           *slog.Logger
	// MinBackoff and MaxBackoff bound the pause before a new attempt, which doubles,
	// jittered, until a response has come. Default 100ms and 5s.
	MinBackoff, MaxBackoff time.Duration
}

// Client follows resources over delta streams, one after the other. What it has
// applied stays applied while there is no stream; after a reconnect the server
// tells what is new and what is gone.
type Client struct{ cfg ClientConfig }

// NewClient returns a Client; nothing is opened before Run.
func NewClient(cfg ClientConfig) *Client { return &Client{cfg: cfg} }

// Run follows until ctx ends, and then returns nil.
func (c *Client) Run(ctx context.Context) error { return nil }

// SetNames replaces the names of a subscription; nil makes it a wildcard. Names
// that are dropped are given to Apply as removed. It does not block.
func (c *Client) SetNames(typeURL string, names []string) {}

// Connected reports whether a stream is open on which a response has come.
func (c *Client) Connected() bool { return false }
