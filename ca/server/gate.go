package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"castellan.dev/identity"
	"castellan.dev/internal/crowd"
)

// PeerVerifier judges a TLS peer's certificate; *tlsconf.Verifier is one.
type PeerVerifier interface {
	Peer(cs tls.ConnectionState) (spiffeid.ID, error)
}

// GateConfig configures a Gate.
type GateConfig struct {
	Verifier    PeerVerifier
	TrustDomain spiffeid.TrustDomain
	// AgentAccounts are whose certificate opens the gate; none: nobody's.
	AgentAccounts []identity.Account
	// Open are the full names of the methods that ask for no certificate.
	Open       []string
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// UnaryTimeout bounds a unary call from its head to its answer; default 15 s.
	UnaryTimeout time.Duration
	Now          func() time.Time
}

// Gate admits to a listener's methods: to the open ones everybody, to all others
// agents with a valid certificate only. It asks anew for every call, so a
// certificate that expires or is revoked opens nothing more on a live connection.
type Gate struct {
	cfg      GateConfig
	refusals *prometheus.CounterVec
	quiet    *quiet
	calls    *crowd.Places
	// methods are all there are, and unaryMethods those of one message each way. They
	// are filled by registration, before anything is served.
	methods, unaryMethods map[string]bool

	closing context.Context
	close   context.CancelCauseFunc
}

// NewGate checks cfg.
func NewGate(cfg GateConfig) (*Gate, error) {
	if cfg.Verifier == nil || cfg.TrustDomain.IsZero() {
		return nil, errors.New("server: the gate needs a verifier and a trust domain")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.UnaryTimeout <= 0 {
		cfg.UnaryTimeout = unaryTimeout
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	left := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "castellan_server_gate_log_suppressed_total",
		Help: "Log lines of refused calls left out, because there were too many of one reason.",
	})
	closing, cancel := context.WithCancelCause(context.Background())
	g := &Gate{
		cfg: cfg, closing: closing, close: cancel,
		quiet:        newQuiet(cfg.Now, left),
		calls:        crowd.NewPlaces(unprovedCalls),
		methods:      map[string]bool{},
		unaryMethods: map[string]bool{},
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_server_gate_refusals_total",
			Help: "Calls refused before they were read, or for want of an agent's certificate, by reason.",
		}, []string{"reason"}),
	}
	if cfg.Registerer != nil {
		for _, c := range []prometheus.Collector{g.refusals, left} {
			if err := cfg.Registerer.Register(c); err != nil {
				return nil, fmt.Errorf("server: metrics: %w", err)
			}
		}
	}
	return g, nil
}

// Close ends every stream that went through the gate, so that the server can stop.
func (g *Gate) Close() { g.close(errClosing) }

// unary lets a call to its decoder: one of an open method whoever makes it, any other
// when an agent does. Who shows no agent's certificate may be driven out by others like
// him until he has proved himself.
func (g *Gate) unary(ctx context.Context, method string, decode func(any) error,
	next func(context.Context, func(any) error) (any, error),
) (_ any, err error) {
	defer g.contain(ctx, method, &err)
	if !slices.Contains(g.cfg.Open, method) {
		if _, err := g.admit(ctx, method); err != nil {
			return nil, err
		}
		return next(ctx, decode)
	}
	if !g.agent(ctx) {
		var place *crowd.Place
		ctx, place = g.unproved(ctx)
		defer place.Leave()
	}
	return next(ctx, func(into any) error {
		r := request{into: into}
		switch err := decode(&r); {
		case status.Code(err) == codes.ResourceExhausted:
			// Over maxMessage; gRPC has answered so already.
			return g.refuse(ctx, method, codes.ResourceExhausted, "message-size", err)
		case err != nil && errors.Is(context.Cause(ctx), errCrowdedOut):
			return g.refuse(ctx, method, codes.ResourceExhausted, "limit-unproved", errCrowdedOut)
		case err != nil && ctx.Err() != nil:
			return g.refuse(ctx, method, codes.DeadlineExceeded, "slow-message", err)
		case err != nil:
			return g.refuse(ctx, method, codes.InvalidArgument, "message", err)
		case r.size > 0:
			return g.refuse(ctx, method, codes.InvalidArgument, "message-size", fmt.Errorf("a request of %d bytes, %d are allowed", r.size, maxRequest))
		}
		return nil
	})
}

// stream is the interceptor for streams. A stream ends when the certificate that
// opened it expires: its agent opens another with the next one.
func (g *Gate) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer g.contain(stream.Context(), info.FullMethod, &err)
	if slices.Contains(g.cfg.Open, info.FullMethod) {
		return next(srv, stream)
	}
	cs, err := g.admit(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithDeadlineCause(stream.Context(), cs.PeerCertificates[0].NotAfter, errExpired)
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(g.closing, func() { end(errClosing) })()
	err = next(srv, boundStream{ServerStream: stream, ctx: ctx})
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errExpired):
		g.refusals.WithLabelValues("expired").Inc()
		return status.Error(codes.Unauthenticated, "certificate expired")
	case errors.Is(cause, errClosing):
		return status.Error(codes.Unavailable, "server is stopping")
	}
	return err
}

// contain turns a panic into an internal error of its call: a fault that one
// request meets must not take the authority from everybody. Nothing was answered.
func (g *Gate) contain(ctx context.Context, method string, err *error) {
	if r := recover(); r != nil {
		g.cfg.Log.ErrorContext(ctx, "call panicked", "method", method, "peer", peerAddress(ctx),
			"panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		*err = verdict{code: codes.Internal}.status()
	}
}

var (
	errExpired = errors.New("the peer's certificate expired")
	errClosing = errors.New("the server is stopping")
)

// boundStream is a stream that ends earlier than its connection.
type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s boundStream) Context() context.Context { return s.ctx }

// admit returns the connection of a verified agent, or a status.
func (g *Gate) admit(ctx context.Context, method string) (*tls.ConnectionState, error) {
	cs, err := connection(ctx)
	if err != nil {
		return nil, g.refuse(ctx, method, codes.Unauthenticated, "no-certificate", err)
	}
	if code, reason, err := g.judge(cs); err != nil {
		return nil, g.refuse(ctx, method, code, reason, err)
	}
	return cs, nil
}

// agent reports whether a call comes over an agent's connection.
func (g *Gate) agent(ctx context.Context) bool {
	cs, err := connection(ctx)
	if err == nil {
		_, _, err = g.judge(cs)
	}
	return err == nil
}

// connection is the TLS connection that a call came over.
func connection(ctx context.Context) (*tls.ConnectionState, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, errors.New("no TLS")
	}
	return &info.State, nil
}

// judge says why a connection is not an agent's, or nil.
func (g *Gate) judge(cs *tls.ConnectionState) (codes.Code, string, error) {
	if len(cs.PeerCertificates) == 0 {
		return codes.Unauthenticated, "no-certificate", errors.New("the caller has no certificate")
	}
	id, err := g.cfg.Verifier.Peer(*cs)
	if err != nil {
		return codes.Unauthenticated, "certificate", err
	}
	w, err := identity.FromID(id)
	if err != nil || w.TrustDomain() != g.cfg.TrustDomain || !slices.Contains(g.cfg.AgentAccounts, w.Account()) {
		return codes.PermissionDenied, "not-an-agent", fmt.Errorf("%q is no agent", id)
	}
	return codes.OK, "", nil
}

func (g *Gate) refuse(ctx context.Context, method string, code codes.Code, reason string, cause error) error {
	g.refusals.WithLabelValues(reason).Inc()
	if suppressed, ok := g.quiet.allow(reason); ok {
		g.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "call refused",
			slog.String("method", method), slog.String("code", code.String()), slog.String("reason", reason),
			slog.String("peer", peerAddress(ctx)), slog.Uint64("suppressed", suppressed), slog.String("cause", cause.Error()))
	}
	return verdict{code: code, wait: time.Second}.status()
}
