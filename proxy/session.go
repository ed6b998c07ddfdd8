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
	"castellan.dev/internal/jws"
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
	xfcc   string
	// judge is the policy in force when it was made, with what the connection
	// fixes evaluated.
	judge atomic.Pointer[judge]
}

type judge struct {
	policy     *policyState
	connection *authz.Connection
}

func newInboundSession(in *inbound, l *live, source netip.AddrPort) *inboundSession {
	s := &inboundSession{in: in, live: l, source: source.String()}
	if len(l.chain) > 0 {
		s.peer = l.peer.ID.String()
		s.xfcc = forwardedClientCert(in.p.store.load().id.String(), l.peer)
	}
	return s
}

// judgeNow returns the judge under pol, made anew when the policy changed.
func (s *inboundSession) judgeNow(pol *policyState) *authz.Connection {
	j := s.judge.Load()
	if j == nil || j.policy != pol {
		j = &judge{policy: pol, connection: pol.snapshot.Connect(s.live.subject)}
		s.judge.Store(j)
	}
	return j.connection
}

// exchange is one request under judgement. They are pooled: what is in one is
// valid from Begin to End.
type exchange struct {
	request  *engine.Request
	asked    authz.Request
	decision authz.Decision
	reason   string
	user     string
	remove   []string
	set      []engine.Field
	endpoint *endpoint
	port     *servicePort
	err      error
}

// pooled exchanges keep their slices.
type exchanges struct{ pool sync.Pool }

func (e *exchanges) get(r *engine.Request) *exchange {
	x, ok := e.pool.Get().(*exchange)
	if !ok {
		x = &exchange{}
	}
	x.request = r
	return x
}

func (e *exchanges) put(x *exchange) {
	clear(x.remove)
	clear(x.set)
	*x = exchange{remove: x.remove[:0], set: x.set[:0]}
	e.pool.Put(x)
}

// Values, RawQuery and Method are what request authentication reads.
func (x *exchange) Values(name string) []string { return x.request.Values(name) }

// RawQuery is the query as received.
func (x *exchange) RawQuery() string { return x.request.RawQuery }

// Method is the request's method.
func (x *exchange) Method() string { return x.request.Method }

// Begin judges one request: path, token, policy; and sets what the application
// may rely on. Every refusal is constant text; the reason goes to the log.
func (s *inboundSession) Begin(r *engine.Request) engine.Verdict {
	p := s.in.p
	x := p.exchanges.get(r)
	r.Aux = x
	pol := p.store.load().policy
	if pol == nil {
		// Fails closed: without a policy nothing is allowed (trust rule 8).
		return s.refuse(x, 403, bodyForbidden, deniedNoPolicy, authz.ReasonNoSnapshot)
	}
	if pol.broken != "" {
		return s.refuse(x, 403, bodyForbidden, deniedNoPolicy, "policy cannot be enforced, all is denied: "+pol.broken)
	}
	path, err := normalize(pol.mesh.PathNormalization, r.Path)
	if err != nil {
		x.err = err
		return s.refuse(x, 400, bodyBadRequest, deniedPath, "path cannot be normalised")
	}
	v := engine.Verdict{Upstream: s.upstream(r)}
	if path != r.Path {
		v.Path = path
	}
	x.asked = authz.Request{Method: r.Method, Host: r.Host, Path: path, Header: r, RemoteIP: remoteIP(r, pol.mesh.NumTrustedProxies)}
	x.remove = append(x.remove, headerXFCC)
	if code := s.authenticate(x, pol, &v); code != 0 {
		return s.refuseToken(x, code)
	}
	x.decision = s.judgeNow(pol).Authorize(&x.asked)
	if !x.decision.Allowed {
		return s.refuse(x, 403, bodyForbidden, deniedPolicy, x.decision.Reason)
	}
	if s.xfcc != "" {
		x.set = append(x.set, engine.Field{Name: headerXFCC, Value: s.xfcc})
	}
	v.Remove, v.Set = x.remove, x.set
	return v
}

// authenticate verifies end-user tokens and says what of them is forwarded.
func (s *inboundSession) authenticate(x *exchange, pol *policyState, v *engine.Verdict) int {
	if pol.tokens == nil {
		return 0
	}
	res := pol.tokens.Authenticate(x)
	if res.Code != 0 {
		x.reason = res.Reason
		return res.Code
	}
	x.remove = append(x.remove, res.RemoveHeaders...)
	x.remove = append(x.remove, res.StripHeaders...)
	for _, h := range res.SetHeaders {
		x.set = append(x.set, engine.Field{Name: h.Name, Value: h.Value})
	}
	if len(res.StripParams) > 0 {
		v.Query, v.SetQuery = jws.StripQuery(x.request.RawQuery, res.StripParams), true
	}
	if len(res.StripCookies) > 0 {
		x.stripCookies(res.StripCookies)
	}
	if res.Verified != nil {
		x.asked.Claims, _ = res.Verified.Memo(claimsOf).(*authz.Claims)
	}
	return 0
}

// stripCookies replaces the Cookie fields by what is left without the named ones.
func (x *exchange) stripCookies(names []string) {
	kept := make([]string, 0, 1)
	for _, value := range x.request.Values("cookie") {
		if rest := jws.StripCookie(value, names); rest != "" {
			kept = append(kept, rest)
		}
	}
	if len(kept) == 0 {
		x.remove = append(x.remove, "cookie")
		return
	}
	x.set = append(x.set, engine.Field{Name: "cookie", Value: strings.Join(kept, "; ")})
}

// claimsOf is computed once per token and kept with it.
func claimsOf(v *jws.Verified) any {
	return authz.NewClaims(v.Token.Claims, v.Token.Issuer, v.SpaceDelimited)
}

func (s *inboundSession) refuse(x *exchange, status int, body, kind, reason string) engine.Verdict {
	x.reason = reason
	s.in.p.metrics.deniedBy[kind].Inc()
	return engine.Verdict{Status: status, Body: body}
}

func (s *inboundSession) refuseToken(x *exchange, code int) engine.Verdict {
	if code == 401 {
		v := s.refuse(x, 401, bodyUnauthorized, deniedToken, x.reason)
		v.Header = s.in.p.challenge
		return v
	}
	return s.refuse(x, code, bodyForbidden, deniedToken, x.reason)
}

// upstream: a port declared HTTP/2 or gRPC is spoken to so; else the
// application gets HTTP/1.1 but for what only HTTP/2 carries.
func (s *inboundSession) upstream(r *engine.Request) engine.Upstream {
	st := s.in.p.store.load()
	declared := protocolOf(st.declared(s.in.port))
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
	conn, err := in.p.dialer.DialContext(ctx, "tcp", in.app)
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
	p.metrics.request(inboundSide, o.Status, o.RequestBytes, o.ResponseBytes, o.Total)
	x, _ := r.Aux.(*exchange)
	if p.cfg.AccessLog != nil {
		e := entryOf(r, o)
		e.Direction, e.Peer, e.Source, e.Destination = "inbound", s.peer, s.source, s.in.app
		if x != nil {
			x.describe(&e)
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
	if x.err != nil {
		e.Error = x.err
	}
	e.Policy, e.Rule = x.decision.Policy, x.decision.Rule
	if sh := x.decision.Shadow; sh != nil && sh.Allowed != x.decision.Allowed {
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
