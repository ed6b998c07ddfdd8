package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
)

// Subscription is one resource type that a Client follows.
type Subscription struct {
	TypeURL string
	// Names to follow; nil follows everything (wildcard), an empty list nothing.
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
type Client struct {
	cfg       ClientConfig
	connected atomic.Bool

	mu     sync.Mutex
	asked  map[string][]string // names by type that differ from what follows has
	poke   chan struct{}
	follow map[string]*follow // of Run's goroutine alone, as is order
	order  []*follow
}

// follow is one subscription and what is held of it.
type follow struct {
	sub  Subscription
	held map[string]string // name → version applied
	open bool              // the stream at hand has been asked for this type
}

// NewClient returns a Client; nothing is opened before Run.
func NewClient(cfg ClientConfig) *Client {
	if cfg.MinBackoff <= 0 {
		cfg.MinBackoff = 100 * time.Millisecond
	}
	if cfg.MaxBackoff <= 0 {
		cfg.MaxBackoff = 5 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{cfg: cfg, asked: map[string][]string{}, poke: make(chan struct{}, 1), follow: map[string]*follow{}}
	for _, sub := range cfg.Subscriptions {
		f := &follow{sub: sub, held: map[string]string{}}
		c.follow[sub.TypeURL] = f
		c.order = append(c.order, f)
	}
	return c
}

// Connected reports whether a stream is open on which a response has come.
func (c *Client) Connected() bool { return c.connected.Load() }

// SetNames replaces the names of a subscription; nil makes it a wildcard, an
// empty list follows nothing. Names that are dropped are given to Apply as removed. It does not block.
func (c *Client) SetNames(typeURL string, names []string) {
	c.mu.Lock()
	c.asked[typeURL] = slices.Clone(names)
	c.mu.Unlock()
	select {
	case c.poke <- struct{}{}:
	default:
	}
}

// Run follows until ctx ends, and then returns nil.
func (c *Client) Run(ctx context.Context) error {
	pause := c.cfg.MinBackoff
	for ctx.Err() == nil {
		answered, err := c.stream(ctx)
		c.connected.Store(false)
		if ctx.Err() != nil {
			return nil
		}
		if answered {
			pause = c.cfg.MinBackoff
		}
		// Half fixed and half random, so that many clients do not return at once.
		wait := pause/2 + rand.N(pause/2+1)
		c.cfg.Log.Warn("discovery stream ended; what was applied stays", slog.Any("error", err), slog.Duration("retry_in", wait))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		pause = min(2*pause, c.cfg.MaxBackoff)
	}
	return nil
}

// stream opens one stream and follows it to its end.
func (c *Client) stream(parent context.Context) (answered bool, err error) {
	ctx, cancel := context.WithCancel(parent)
	defer cancel()
	st, err := c.cfg.Open(ctx)
	if err != nil {
		return false, fmt.Errorf("opening: %w", err)
	}
	for _, f := range c.order {
		f.open = false
	}
	c.takeNames() // those asked for while there was no stream
	withNode := true
	for _, f := range c.order {
		if f.idle() {
			continue
		}
		for _, req := range c.first(f, withNode) {
			if err := st.Send(req); err != nil {
				return false, sendError(st, err)
			}
		}
		withNode = false
	}
	responses, failed := receiveResponses(ctx, st)
	for {
		select {
		case resp := <-responses:
			answered = true
			c.connected.Store(true)
			if err := st.Send(c.take(resp)); err != nil {
				return answered, awaitCause(ctx, err, responses, failed)
			}
		case <-c.poke:
			for _, req := range c.takeNames() {
				if err := st.Send(req); err != nil {
					return answered, awaitCause(ctx, err, responses, failed)
				}
			}
		case err := <-failed:
			return answered, err
		case <-ctx.Done():
			return answered, ctx.Err()
		}
	}
}

// sendError finds out why a stream cannot be sent on: gRPC says EOF there, and
// the status only to the receiver.
func sendError(st DeltaClientStream, err error) error {
	if !errors.Is(err, io.EOF) {
		return err
	}
	for {
		if _, err := st.Recv(); err != nil {
			return err
		}
	}
}

// awaitCause is sendError once another goroutine receives: gRPC allows one receiver.
func awaitCause(ctx context.Context, err error, responses <-chan *discoveryv3.DeltaDiscoveryResponse, failed <-chan error) error {
	if !errors.Is(err, io.EOF) {
		return err
	}
	for {
		select {
		case <-responses: // what is not acknowledged comes again on the next stream
		case cause := <-failed:
			return cause
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func receiveResponses(ctx context.Context, st DeltaClientStream) (<-chan *discoveryv3.DeltaDiscoveryResponse, <-chan error) {
	responses, failed := make(chan *discoveryv3.DeltaDiscoveryResponse), make(chan error, 1)
	go func() {
		for {
			resp, err := st.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case responses <- resp:
			case <-ctx.Done():
				return
			}
		}
	}()
	return responses, failed
}

// claimBytes is about how much of what is held one request says: servers bound
// their messages, and one that is refused would be refused at every attempt.
const claimBytes = 64 << 10

// first asks for a type on a new stream, and says what is already held; where
// that is much, in several requests.
func (c *Client) first(f *follow, withNode bool) []*discoveryv3.DeltaDiscoveryRequest {
	f.open = true
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: f.sub.TypeURL, ResourceNamesSubscribe: withWildcard(f.sub.Names)}
	if withNode {
		req.Node = &corev3.Node{Id: c.cfg.NodeID, UserAgentName: "castellan"}
	}
	reqs, size := []*discoveryv3.DeltaDiscoveryRequest{req}, 0
	for name, version := range f.held {
		if size += len(name) + len(version) + 16; size > claimBytes {
			req = &discoveryv3.DeltaDiscoveryRequest{TypeUrl: f.sub.TypeURL}
			reqs, size = append(reqs, req), 0
		}
		if req.InitialResourceVersions == nil {
			req.InitialResourceVersions = map[string]string{}
		}
		req.InitialResourceVersions[name] = version
	}
	return reqs
}

// take applies a response and returns its answer.
func (c *Client) take(resp *discoveryv3.DeltaDiscoveryResponse) *discoveryv3.DeltaDiscoveryRequest {
	ack := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}
	err := c.apply(resp)
	if err != nil {
		c.cfg.Log.Error("update refused; what was applied before stays",
			slog.String("type_url", resp.GetTypeUrl()), slog.Any("error", err))
		ack.ErrorDetail = &statuspb.Status{Code: int32(codes.InvalidArgument), Message: clip(err.Error(), maxReason)}
	}
	return ack
}

func (c *Client) apply(resp *discoveryv3.DeltaDiscoveryResponse) error {
	f := c.follow[resp.GetTypeUrl()]
	if f == nil {
		return fmt.Errorf("resources of type %q were not asked for", clip(resp.GetTypeUrl(), maxNodeID))
	}
	changed := make([]Resource, 0, len(resp.GetResources()))
	for _, r := range resp.GetResources() {
		if r.GetName() == "" || r.GetResource().GetTypeUrl() != f.sub.TypeURL {
			return fmt.Errorf("resource %q is of type %q", r.GetName(), r.GetResource().GetTypeUrl())
		}
		if !f.wants(r.GetName()) {
			continue // crossed with an unsubscription
		}
		changed = append(changed, Resource{Name: r.GetName(), Version: r.GetVersion(), Body: r.GetResource()})
	}
	if err := f.sub.Apply(changed, resp.GetRemovedResources()); err != nil {
		return err
	}
	for _, r := range changed {
		f.held[r.Name] = r.Version
	}
	for _, name := range resp.GetRemovedResources() {
		delete(f.held, name)
	}
	return nil
}

// idle holds when nothing is asked of a type; the protocol has no request for
// that, since a first one without names means everything.
func (f *follow) idle() bool { return f.sub.Names != nil && len(f.sub.Names) == 0 }

func (f *follow) wants(name string) bool {
	return f.sub.Names == nil || slices.Contains(f.sub.Names, name)
}

// takeNames makes the subscriptions what SetNames last asked for, and returns the
// requests that tell an open stream.
func (c *Client) takeNames() []*discoveryv3.DeltaDiscoveryRequest {
	c.mu.Lock()
	asked := c.asked
	c.asked = map[string][]string{}
	c.mu.Unlock()
	var reqs []*discoveryv3.DeltaDiscoveryRequest
	for _, f := range c.order {
		names, ok := asked[f.sub.TypeURL]
		if !ok {
			continue
		}
		before, after := withWildcard(f.sub.Names), withWildcard(names)
		req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: f.sub.TypeURL,
			ResourceNamesSubscribe: without(after, before), ResourceNamesUnsubscribe: without(before, after)}
		f.sub.Names = names
		c.drop(f)
		if !f.open {
			if !f.idle() {
				reqs = append(reqs, c.first(f, false)...)
			}
			continue
		}
		if len(req.ResourceNamesSubscribe)+len(req.ResourceNamesUnsubscribe) > 0 {
			reqs = append(reqs, req)
		}
	}
	return reqs
}

// drop forgets what is held and no longer wanted.
func (c *Client) drop(f *follow) {
	var dropped []string
	for name := range f.held {
		if !f.wants(name) {
			dropped = append(dropped, name)
			delete(f.held, name)
		}
	}
	if len(dropped) == 0 {
		return
	}
	slices.Sort(dropped)
	if err := f.sub.Apply(nil, dropped); err != nil {
		c.cfg.Log.Error("dropping resources failed", slog.String("type_url", f.sub.TypeURL), slog.Any("error", err))
	}
}

func withWildcard(names []string) []string {
	if names == nil {
		return []string{wildcard}
	}
	return names
}

func without(list, drop []string) []string {
	var out []string
	for _, v := range list {
		if !slices.Contains(drop, v) {
			out = append(out, v)
		}
	}
	return out
}
