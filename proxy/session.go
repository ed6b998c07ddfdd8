package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"castellan.dev/authz"
	"castellan.dev/internal/judge"
	"castellan.dev/proxy/accesslog"
	"castellan.dev/proxy/engine"
)

// Bodies of refusals: constant, so that a peer learns nothing of policy.
const (
	bodyBadRequest   = "bad request"
	bodyUnauthorized = "authentication required"
	bodyForbidden    = "access denied"
)

// headerXFCC is Envoy's x-forwarded-client-cert.
const headerXFCC = "x-forwarded-client-cert"

// inboundSession judges the requests of one connection. HTTP/2 calls it concurrently.
type inboundSession struct {
	in     *inbound
	live   *live
	source string
	peer   string
	// xfcc is what we tell the application of the peer; empty for plaintext.
	xfcc []string
	// judged is the policy in force when it was made, with what the connection
	// fixes evaluated.
	judged atomic.Pointer[judged]
	flying inFlight
}

type judged struct {
	policy     *policyState
	connection *authz.Connection
}

func newInboundSession(in *inbound, l *live, source netip.AddrPort) *inboundSession {
	s := &inboundSession{in: in, live: l, source: source.String()}
	if len(l.chain) > 0 {
		s.peer = l.peer.ID.String()
		s.xfcc = []string{forwardedClientCert(in.p.store.load().id.String(), l.peer)}
	}
	return s
}

// judgeNow returns the judge under pol, made anew when the policy changed.
func (s *inboundSession) judgeNow(pol *policyState) *authz.Connection {
	j := s.judged.Load()
	if j == nil || j.policy != pol {
		j = &judged{policy: pol, connection: pol.snapshot.Connect(s.live.subject)}
		s.judged.Store(j)
	}
	return j.connection
}

// exchange is one request under judgement. They are pooled: what is in one is
// valid from Begin to End.
type exchange struct {
	request *engine.Request
	verdict judge.Case
	// xfcc is what the application will see of that header, so policy does too.
	xfcc     []string
	reason   string
	remove   []string
	set      []engine.Field
	endpoint *endpoint
	port     *servicePort
	// only: no other endpoint will do.
	only bool

	// remoteIP is the client's as trusted proxies told it.
	remoteIP netip.Addr
	// The rest is under inFlight's lock: policy is what x was judged by last, ended
	// says that it would not be let through any more.
	policy      *policyState
	open, ended bool
	prev, next  *exchange
}

// exchanges are pooled and keep their slices.
type exchanges struct{ pool sync.Pool }

func (e *exchanges) get(r *engine.Request) *exchange {
	x, ok := e.pool.Get().(*exchange)
	if !ok {
		x = &exchange{}
	}
	x.request = r
	x.verdict.Decision.Rule = -1
	return x
}

func (e *exchanges) put(x *exchange) {
	x.verdict.Reset()
	clear(x.remove)
	clear(x.set)
	x.request, x.xfcc, x.reason, x.endpoint, x.port = nil, nil, "", nil, nil
	x.policy, x.ended, x.only = nil, false, false
	x.remove, x.set = x.remove[:0], x.set[:0]
	e.pool.Put(x)
}

// Values gives header values as they are judged.
func (x *exchange) Values(name string) []string {
	if name == headerXFCC {
		return x.xfcc
	}
	return x.request.Values(name)
}

// Begin judges one request: path, token, policy; and sets what the application
// may rely on. Every refusal is constant text; the reason goes to the log.
func (s *inboundSession) Begin(r *engine.Request) engine.Verdict {
	p := s.in.p
	x := p.exchanges.get(r)
	r.Aux = x
	st := p.store.load()
	pol := st.policy
	if pol == nil {
		// Fails closed: without a policy nothing is allowed (trust rule 8).
		return p.refuseRequest(x, 403, deniedNoPolicy, authz.ReasonNoSnapshot)
	}
	if pol.broken != "" {
		return p.refuseRequest(x, 403, deniedNoPolicy, "policy cannot be enforced, all is denied: "+pol.broken)
	}
	x.xfcc = s.xfcc
	c := &x.verdict
	x.remoteIP = judge.RemoteIP(r, pol.mesh.NumTrustedProxies)
	c.Judge(judge.Request{
		Method: r.Method, Host: r.Host, Path: r.Path, RawQuery: r.RawQuery, Header: x, RemoteIP: x.remoteIP,
	}, pol.mesh.PathNormalization, pol.tokens, s.judgeNow(pol))
	if c.Status != 200 {
		return p.refuseRequest(x, c.Status, c.Kind, c.Reason)
	}
	if !s.entered(x, pol) {
		return p.refuseRequest(x, 403, judge.KindPolicy, closedPolicy)
	}
	x.remove = append(append(x.remove, headerXFCC), c.Remove...)
	for _, h := range c.Set {
		x.set = append(x.set, engine.Field(h))
	}
	for _, value := range s.xfcc {
		x.set = append(x.set, engine.Field{Name: headerXFCC, Value: value})
	}
	v := engine.Verdict{Upstream: s.upstream(r, st), Remove: x.remove, Set: x.set, Query: c.Query, SetQuery: c.SetQuery}
	if c.Path != r.Path {
		v.Path = c.Path
	}
	return v
}

// refuseRequest answers with constant text.
func (p *Proxy) refuseRequest(x *exchange, status int, kind, reason string) engine.Verdict {
	x.reason = reason
	p.metrics.deniedBy[kind].Inc()
	v := engine.Verdict{Status: status, Body: bodyForbidden}
	switch status {
	case 400:
		v.Body = bodyBadRequest
	case 401:
		v.Body, v.Header = bodyUnauthorized, p.challenge
	}
	return v
}

// upstream: a port declared HTTP/2 or gRPC is spoken to so; else the
// application gets HTTP/1.1 but for what only HTTP/2 carries.
func (s *inboundSession) upstream(r *engine.Request, st *state) engine.Upstream {
	declared := judge.ProtocolOf(st.declared(s.in.port))
	if declared == speaksHTTP2 && !r.WebSocket || r.Proto == engine.HTTP2 && (declared == undeclared || isGRPC(r)) {
		return engine.Upstream{Key: s.in.h2, H2: true}
	}
	return engine.Upstream{Key: s.in.http1}
}

func isGRPC(r *engine.Request) bool {
	v := r.Values("content-type")
	return len(v) == 1 && strings.HasPrefix(v[0], "application/grpc")
}

// Dial opens a connection to the application.
func (s *inboundSession) Dial(ctx context.Context, _ *engine.Request) (net.Conn, error) {
	return s.in.dial(ctx)
}

func (in *inbound) dial(ctx context.Context) (net.Conn, error) {
	conn, err := in.dialer.DialContext(ctx, "tcp", in.app)
	if err != nil {
		in.p.metrics.connects.WithLabelValues("inbound", "failed").Inc()
		if errors.Is(err, context.DeadlineExceeded) || timedOut(err) {
			return nil, &engine.StatusError{Status: 504, Reason: engine.ReasonDialTimeout, Err: err}
		}
		return nil, &engine.StatusError{Status: 503, Reason: engine.ReasonDial, Err: err}
	}
	in.p.metrics.connects.WithLabelValues("inbound", "ok").Inc()
	return conn, nil
}

// End writes the line and counts. The strings of r are used again after it.
func (s *inboundSession) End(r *engine.Request, o *engine.Outcome) {
	p := s.in.p
	x, _ := r.Aux.(*exchange)
	if x != nil {
		s.flying.leave(x)
	}
	p.metrics.request(inboundSide, o.Status, o.RequestBytes, o.ResponseBytes, o.Total)
	if p.cfg.AccessLog != nil {
		e := entryOf(r, o)
		e.Direction, e.Peer, e.Source, e.Destination = "inbound", s.peer, s.source, s.in.app
		if x != nil {
			x.describe(&e)
		}
		if why := s.live.why(); o.Upgraded && why != "" {
			e.Reason = why // what closed the tunnel
		} else if x != nil && x.ended {
			e.Reason = closedPolicy
		}
		p.cfg.AccessLog.Add(&e)
	}
	if x != nil {
		r.Aux = nil
		p.exchanges.put(x)
	}
}

// describe adds what was decided.
func (x *exchange) describe(e *accesslog.Entry) {
	if x.reason != "" {
		e.Reason = x.reason
	}
	d := &x.verdict.Decision
	if x.verdict.Err != nil {
		e.Error = x.verdict.Err
	}
	e.Policy, e.Rule = d.Policy, d.Rule
	if sh := d.Shadow; sh != nil && sh.Allowed != d.Allowed {
		e.Shadow = "would be denied by " + sh.Policy
		if sh.Allowed {
			e.Shadow = "would be allowed by " + sh.Policy
		}
	}
}

// entryOf takes from a request what both sides log.
func entryOf(r *engine.Request, o *engine.Outcome) accesslog.Entry {
	e := accesslog.Entry{
		Start: o.Start, Protocol: r.Proto.String(), Method: r.Method, Host: r.Host, Path: r.Path,
		Status: o.Status, BytesReceived: o.RequestBytes, BytesSent: o.ResponseBytes, Duration: o.Total,
		Reason: o.Reason, Error: o.Err, GRPCStatus: o.GRPCStatus,
	}
	if r.Judged() {
		e.RequestID, e.TraceParent = firstValue(r, "x-request-id"), firstValue(r, "traceparent")
	}
	return e
}

func firstValue(r *engine.Request, name string) string {
	if v := r.Values(name); len(v) > 0 {
		return v[0]
	}
	return ""
}
