// Package proxy is the sidecar: it accepts mutual TLS from the mesh for the
// application behind it, and carries the application's requests to others of the
// mesh.
//
// Inbound it decides who is there (the peer's SPIFFE ID, the end user's token),
// judges every request by the policy in force at that moment, forwards exactly
// what was judged, and tells the application who called. Outbound it chooses the
// endpoint itself, and a server whose SPIFFE ID is not among the destination's
// expected ones is not spoken to. When policy, bundle or deny list change, live
// connections are judged again.
//
// It refuses everything for which it has no reason to let it pass: no
// certificate, no bundle, no policy, a policy that cannot be read. Peers get
// constant text; reasons are in the log and in metrics. Everything a peer can
// make it keep has a bound.
//
// It assumes that whoever can open the agent's socket may be this workload, and
// that the application listens where only this proxy connects.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"castellan.dev/internal/config"
	"castellan.dev/internal/run"
	"castellan.dev/internal/tlsconf"
	"castellan.dev/proxy/accesslog"
	"castellan.dev/proxy/engine"
)

// Config configures a Proxy.
type Config struct {
	// Proxy has been validated.
	Proxy config.Proxy
	// AccessLog may be nil.
	AccessLog  *accesslog.Log
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// Now defaults to time.Now.
	Now func() time.Time
}

// Proxy is one workload's proxy.
type Proxy struct {
	cfg     Config
	log     *slog.Logger
	now     func() time.Time
	metrics *metrics

	store     *store
	verifier  *tlsconf.Verifier
	serverTLS *serverTLS
	strict    strictTLS

	inboundEngine, outboundEngine *engine.Engine
	exchanges                     exchanges
	buffers                       buffers
	challenge                     []engine.Field
	dialer                        net.Dialer

	// captured is nil where nothing is.
	captured *captured

	limits limits
	// outLimits are those of captured outbound connections: all are the pod's own.
	outLimits  limits
	handshakes chan struct{}
	registry   registry
	firstByte  time.Duration
	// quiet bounds log lines that peers can cause at will, naming those of
	// destinations that are not who they should be.
	quiet, naming *rate.Limiter

	// serial is that of the certificate connections were last retired for.
	serial string

	acceptors []*acceptor
	draining  atomic.Bool
	// serving ends when connections have to, after draining.
	serving     context.Context
	stopServing context.CancelFunc
}

// keepAlive is how often the kernel looks after a connection that says nothing.
const keepAlive = 30 * time.Second

// New checks the configuration and returns a Proxy; nothing is opened before Listen.
func New(cfg Config) (*Proxy, error) {
	if cfg.Registerer == nil {
		return nil, errors.New("proxy: no registerer for metrics")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	limit := cfg.Proxy.Limits
	p := &Proxy{
		cfg: cfg, log: cfg.Log, now: cfg.Now, store: newStore(),
		metrics:    newMetrics(cfg.Registerer),
		limits:     limits{total: limit.MaxConnections, perSource: limit.MaxPerSource, budget: limit.InFlight()},
		outLimits:  limits{total: limit.MaxConnections, perSource: limit.MaxConnections},
		handshakes: make(chan struct{}, max(limit.MaxHandshakes, 1)),
		firstByte:  min(limit.HandshakeTimeout.Or(5*time.Second), 5*time.Second),
		quiet:      rate.NewLimiter(5, 20),
		naming:     rate.NewLimiter(10, 50),
		challenge:  []engine.Field{{Name: "WWW-Authenticate", Value: "Bearer"}},
		dialer:     net.Dialer{KeepAlive: keepAlive},
	}
	if c := cfg.Proxy.Capture; c != nil {
		p.captured = newCaptured(p.now, c.Inbound, c.Outbound)
	}
	p.serving, p.stopServing = context.WithCancel(context.Background())
	p.verifier = tlsconf.NewVerifier(p.store.trust, p.now)
	p.serverTLS = newServerTLS(p.store.certificate, p.verifier)
	p.strict = p.serverTLS.strict()
	p.store.changed = p.changed
	engineConfig := engine.Config{
		MaxHeaderBytes: limit.MaxHeaderBytes, MaxStreams: limit.MaxStreams,
		HeaderTimeout: limit.HeaderTimeout.Or(0), IdleTimeout: limit.IdleTimeout.Or(0), ConnectTimeout: limit.ConnectTimeout.Or(0),
		ResponseTimeout: limit.ResponseTimeout.Or(0), StreamIdleTimeout: limit.StreamIdleTimeout.Or(0),
		Log: p.log, Now: p.now,
	}
	p.inboundEngine, p.outboundEngine = engine.New(engineConfig), engine.New(engineConfig)
	p.observe(cfg.Registerer)
	return p, nil
}

// Addrs are the listeners' addresses, inbound before outbound, as configured.
func (p *Proxy) Addrs() []net.Addr {
	addrs := make([]net.Addr, 0, len(p.acceptors))
	for _, a := range p.acceptors {
		addrs = append(addrs, a.listener.Addr())
	}
	return addrs
}

// Run serves until ctx ends, and then drains: it accepts no more, lets what is
// under way end, and closes what has not ended after DrainTimeout.
func (p *Proxy) Run(ctx context.Context) error {
	defer p.stopServing()
	// Updates, judgements and logging go on while connections drain.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	return run.All(background,
		func(background context.Context) error {
			defer stop()
			return p.accept(ctx, background)
		},
		p.follow,
		p.tick,
		p.cfg.AccessLog.Run,
	)
}

func (p *Proxy) accept(ctx, background context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(background, cancel)()
	var serving sync.WaitGroup
	parts := make([]run.Part, 0, len(p.acceptors))
	for _, a := range p.acceptors {
		parts = append(parts, func(ctx context.Context) error { return a.run(ctx, &serving) })
	}
	err := run.All(ctx, parts...)
	p.drain(&serving)
	return err
}

// drain waits for connections to end, and ends those that do not.
func (p *Proxy) drain(serving *sync.WaitGroup) {
	p.draining.Store(true)
	timeout := p.cfg.Proxy.DrainTimeout.Or(5 * time.Second)
	p.log.Info("draining", "timeout", timeout.String())
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var engines sync.WaitGroup
	for _, e := range []*engine.Engine{p.inboundEngine, p.outboundEngine} {
		engines.Go(func() { _ = e.Drain(ctx) })
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		engines.Wait()
		serving.Wait()
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		p.stopServing()
		p.registry.each(func(l *live) { p.end(l, closedDrain, nil) })
		<-ended
	}
	p.inboundEngine.Close()
	p.outboundEngine.Close()
}

// tick sweeps once a second.
func (p *Proxy) tick(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			p.sweep(p.now())
			p.inboundEngine.Sweep()
			p.outboundEngine.Sweep()
		}
	}
}

// changed judges live connections by the new state, and retires connections
// that were opened with a certificate we no longer use: their peers close them
// when it expires, and must not find a request on its way.
func (p *Proxy) changed() {
	p.rejudge()
	// Under the store's lock, as is the serial.
	if serial := p.store.load().serial; serial != p.serial {
		p.serial = serial
		p.outboundEngine.DropUpstream(func(key string) bool { return !keyHasSerial(key, serial) })
	}
}

// CheckIdentity is nil once certificate and bundle are there and valid.
func (p *Proxy) CheckIdentity() error {
	st := p.store.load()
	switch {
	case st.svid == nil:
		return errors.New("no certificate from the agent yet; is its socket " + strconv.Quote(p.cfg.Proxy.AgentSocket) + " served?")
	case p.now().After(st.svid.Leaf.NotAfter):
		return fmt.Errorf("our certificate expired at %s; the agent could not renew it", st.svid.Leaf.NotAfter.Format(time.RFC3339))
	case st.trust == nil:
		return errors.New("no trust bundle from the agent yet")
	}
	return nil
}

// CheckPolicy is nil once a policy is in force.
func (p *Proxy) CheckPolicy() error {
	if p.store.load().policy == nil {
		return errors.New("no policy from the agent yet; everything is denied")
	}
	return nil
}

// CheckServices is nil once the server has said what services there are, without
// which captured connections go nowhere.
func (p *Proxy) CheckServices() error {
	if p.captured != nil && p.store.load().index == nil {
		return errors.New("no services from the agent yet; nothing captured can be sent anywhere")
	}
	return nil
}

// CheckDraining is nil while connections are accepted.
func (p *Proxy) CheckDraining() error {
	if p.draining.Load() {
		return errors.New("draining")
	}
	return nil
}
