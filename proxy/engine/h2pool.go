package engine

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"

	"golang.org/x/net/http2"
)

// maxH2Conns bounds the HTTP/2 connections to one upstream key. Each carries
// as many streams as the upstream allows.
const maxH2Conns = 16

var errStreams = errors.New("engine: no stream left on the upstream's connections")

// h2Pool holds HTTP/2 connections to upstreams, shared by all requests of a key.
// It is the transport's ConnPool, so that the transport's own rule decides what
// may be sent again after a GOAWAY.
type h2Pool struct {
	engine    *Engine
	transport *http2.Transport

	mu     sync.Mutex
	keys   map[string]*h2Key
	closed bool
}

// h2Key is what is known of one key.
type h2Key struct {
	conns   []*http2.ClientConn
	dialing chan struct{} // closed when the dial in flight ended
}

// exchangeKey finds the exchange in an upstream request's context.
type exchangeKey struct{}

func (p *h2Pool) init(e *Engine) {
	p.engine, p.keys = e, map[string]*h2Key{}
	p.transport = &http2.Transport{
		ConnPool:           p,
		DisableCompression: true,
		AllowHTTP:          true,
		MaxHeaderListSize:  uint32(e.cfg.MaxResponseHeaderBytes),
		IdleConnTimeout:    e.cfg.UpstreamIdleTimeout,
		ReadIdleTimeout:    e.cfg.ResponseTimeout / 2,
		PingTimeout:        e.cfg.ConnectTimeout * 2,
		WriteByteTimeout:   e.cfg.StreamIdleTimeout,
	}
}

// GetClientConn implements http2.ClientConnPool.
func (p *h2Pool) GetClientConn(req *http.Request, _ string) (*http2.ClientConn, error) {
	x := req.Context().Value(exchangeKey{}).(*exchange)
	key := x.verdict.Upstream.Key
	if key == "" {
		cc, _, err := p.dial(req.Context(), x)
		x.single = cc
		return cc, err
	}
	for {
		cc, wait, err := p.reserve(key)
		if cc != nil || err != nil {
			x.outcome.Reused = cc != nil
			return cc, err
		}
		if wait != nil {
			select {
			case <-wait:
				continue
			case <-req.Context().Done():
				return nil, context.Cause(req.Context())
			}
		}
		return p.dialFor(req.Context(), key, x)
	}
}

// reserve takes a stream on a pooled connection. Without one it returns what to
// wait for, or nothing: then the caller dials.
func (p *h2Pool) reserve(key string) (*http2.ClientConn, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := p.keys[key]
	if k == nil {
		p.prune()
		k = &h2Key{}
		p.keys[strings.Clone(key)] = k
	}
	k.conns = slices.DeleteFunc(k.conns, unusable)
	for _, cc := range k.conns {
		if cc.ReserveNewRequest() {
			return cc, nil, nil
		}
	}
	switch {
	case k.dialing != nil:
		return nil, k.dialing, nil
	case len(k.conns) >= maxH2Conns:
		return nil, nil, &StatusError{Status: http.StatusServiceUnavailable, Reason: ReasonDial, Err: errStreams}
	}
	k.dialing = make(chan struct{})
	return nil, nil, nil
}

// prune forgets keys that have no connection left.
func (p *h2Pool) prune() {
	for key, k := range p.keys {
		if k.conns = slices.DeleteFunc(k.conns, unusable); len(k.conns) == 0 && k.dialing == nil {
			delete(p.keys, key)
		}
	}
}

func unusable(cc *http2.ClientConn) bool {
	state := cc.State()
	return state.Closed || state.Closing
}

// dialFor opens a connection for everybody who waits for the key.
func (p *h2Pool) dialFor(ctx context.Context, key string, x *exchange) (*http2.ClientConn, error) {
	cc, dialed, err := p.dial(context.WithoutCancel(ctx), x)
	p.mu.Lock()
	defer p.mu.Unlock()
	k := p.keys[key]
	if k != nil && k.dialing != nil {
		close(k.dialing)
		k.dialing = nil
	}
	if err != nil {
		return nil, err
	}
	if dialed != "" && dialed != key { // see Keyed
		if k = p.keys[dialed]; k == nil {
			k = &h2Key{}
			p.keys[strings.Clone(dialed)] = k
		}
	}
	if k == nil || p.closed {
		x.single = cc // the key was dropped meanwhile: for this request only
		return cc, nil
	}
	k.conns = append(k.conns, cc)
	return cc, nil
}

// dial asks the session for a connection and reserves its first stream.
func (p *h2Pool) dial(ctx context.Context, x *exchange) (*http2.ClientConn, string, error) {
	conn, f := x.dial(ctx)
	if f != nil {
		return nil, "", &dialError{f}
	}
	var key string
	if k, ok := conn.(Keyed); ok {
		key = k.PoolKey()
	}
	cc, err := p.transport.NewClientConn(conn)
	if err != nil {
		_ = conn.Close()
		return nil, "", fmt.Errorf("engine: http/2 preface: %w", err)
	}
	if !cc.ReserveNewRequest() {
		_ = cc.Close()
		return nil, "", errStreams
	}
	return cc, key, nil
}

// dialError carries a failure through the transport.
type dialError struct{ f *failure }

func (e *dialError) Error() string { return e.f.err.Error() }
func (e *dialError) Unwrap() error { return e.f.err }

// MarkDead implements http2.ClientConnPool.
func (p *h2Pool) MarkDead(cc *http2.ClientConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.keys {
		k.conns = slices.DeleteFunc(k.conns, func(c *http2.ClientConn) bool { return c == cc })
	}
}

// drop closes idle connections of matching keys, others after their last stream.
func (p *h2Pool) drop(match func(string) bool) {
	for _, cc := range p.take(match) {
		cc.SetDoNotReuse()
		if state := cc.State(); state.StreamsActive+state.StreamsReserved == 0 {
			_ = cc.Close()
		}
	}
}

func (p *h2Pool) take(match func(string) bool) (taken []*http2.ClientConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, k := range p.keys {
		if !match(key) {
			continue
		}
		taken = append(taken, k.conns...)
		k.conns = nil
		if k.dialing != nil {
			close(k.dialing) // who waits dials anew
		}
		delete(p.keys, key)
	}
	return taken
}

func (p *h2Pool) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	for _, cc := range p.take(func(string) bool { return true }) {
		_ = cc.Close()
	}
}
