package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
	"castellan.dev/internal/judge"
	"castellan.dev/internal/jws"
	"castellan.dev/proxy/engine"
)

// decide takes the decision of a receiving proxy, and that of the caller's where it
// is that which refuses.
func (e *env) decide(ctx context.Context, q *canI, s *scene, r *receiver) (*answer, error) {
	d := &decision{env: e, ctx: ctx, q: q, s: s, r: r, answer: answer{
		Rule: -1, From: q.from, To: r.workload.Account.String(), Request: q.method + " " + q.target, Pods: r.pods,
	}}
	if r.workload.Account.IsZero() {
		d.To = strings.Join(r.pods, ", ")
	}
	speaks := judge.ProtocolOf(r.workload.Ports[r.port])
	tcp := q.tcp || q.any && speaks == judge.TCP
	if tcp {
		d.Request = fmt.Sprintf("tcp port %d", r.port)
	}
	d.enforced()
	if d.outside() || d.unexpected() {
		return &d.answer, nil
	}
	if _, declared := r.workload.Ports[r.port]; len(r.workload.Ports) > 0 && !declared {
		d.note("%s declares no port %d; give the workload's port, not the service's", d.To, r.port)
	}
	for _, f := range s.findings {
		d.step("%s", f)
	}
	var problems []authz.Problem
	cfg := authz.Config{Documents: s.docs, Workload: r.workload, Mesh: s.mesh, DenyAll: r.deny}
	d.snapshot, problems = authz.Compile(cfg)
	for _, p := range problems {
		d.step("problem: %s %s/%s: %s: %s", p.Kind, p.Namespace, p.Name, p.Field, p.Reason)
	}
	d.policies()
	if !d.connect() {
		return &d.answer, nil
	}
	var err error
	switch {
	case !tcp && speaks == judge.TCP:
		d.note("port %d is declared %s: the proxy reads no requests there and judges the connection", r.port, r.workload.Ports[r.port])
		d.tcp()
	case tcp && (speaks == judge.HTTP || speaks == judge.HTTP2):
		d.note("port %d is declared %s: the proxy reads requests there, and judges each", r.port, r.workload.Ports[r.port])
		d.tcp()
	case tcp && speaks == judge.Undeclared && judge.PortsWithHTTP(cfg).On(r.port):
		d.refuse(403, fmt.Sprintf("port %d declares no protocol and has rules about HTTP: what is not HTTP is refused there", r.port))
	case tcp:
		d.tcp()
	default:
		err = d.http()
	}
	return &d.answer, err
}

// enforced notes whether what is judged here is what is enforced there.
func (d *decision) enforced() {
	if !d.s.cluster {
		return
	}
	switch {
	case d.r.outside:
	case len(d.r.notes) > 0:
		d.Enforced = "no"
		for _, n := range d.r.notes {
			d.note("%s", n)
		}
	case d.r.known:
		d.Enforced = "yes"
	default:
		d.Enforced = "unknown"
		if d.s.unasked != nil {
			d.step("whether it is enforced as written could not be asked: %v", d.s.unasked)
		}
	}
}

// outside decides where no proxy stands before the receiver: then only the caller's
// has a say, if the caller has one.
func (d *decision) outside() bool {
	if !d.r.outside {
		return false
	}
	switch {
	case d.s.caller.IsZero():
		d.allow("no proxy stands before it, and none before a caller outside the mesh: nothing is enforced")
	case d.s.mesh.OutboundPolicy == policy.OutboundAllowAny:
		d.allow("no proxy stands before it: the caller's speaks to it in the clear, and nothing is enforced (outboundPolicy " + policy.OutboundAllowAny + ")")
	default:
		d.refuse(http.StatusServiceUnavailable, "it is outside the mesh: the caller's proxy does not speak in the clear (outboundPolicy "+policy.OutboundRegistryOnly+")")
	}
	return true
}

func (d *decision) allow(reason string) {
	d.Allowed, d.Code, d.Reason = true, http.StatusOK, reason
	d.step("decision: %s", reason)
}

// unexpected decides where the caller's proxy refuses who answers for the service
// (secure naming).
func (d *decision) unexpected() bool {
	service := d.r.service
	if service == nil || service.Accounts == nil || d.s.caller.IsZero() || slices.Contains(service.Accounts, d.r.workload.Account) {
		return false
	}
	w, err := identity.New(d.s.domain, d.r.workload.Account)
	if err == nil && slices.Contains(service.SubjectAltNames, w.ID().String()) {
		return false
	}
	d.refuse(http.StatusServiceUnavailable, fmt.Sprintf("the caller's proxy refuses it: %s is none of those who may answer for service %s/%s", d.To, service.Namespace, service.Name))
	return true
}

// decision is one being taken.
type decision struct {
	answer
	env      *env
	ctx      context.Context
	q        *canI
	s        *scene
	r        *receiver
	snapshot *authz.Snapshot
	peer     authz.Peer
}

// note is a step that people should see even if they did not ask for steps.
func (d *decision) note(format string, args ...any) {
	d.step(format, args...)
	d.Warnings = append(d.Warnings, fmt.Sprintf(format, args...))
}

func (d *decision) tcp() {
	d.explain(func(s *authz.Snapshot) authz.Decision { return s.Connect(d.peer).AuthorizeTCP() })
	d.decided(d.snapshot.Connect(d.peer).AuthorizeTCP())
}

// policies notes which documents select the receiver.
func (d *decision) policies() {
	n := 0
	for _, doc := range d.s.docs {
		if authz.Selects(doc, d.r.workload.Account.Namespace(), d.r.workload.Labels, d.s.mesh) {
			n++
			d.step("selects %s: %s %s/%s%s", d.To, doc.Kind, doc.Metadata.Namespace, doc.Metadata.Name, actionOf(doc))
		}
	}
	if n == 0 {
		d.step("no policy selects %s (labels %v)", d.To, d.r.workload.Labels)
	}
}

func actionOf(d policy.Document) string {
	if d.Authorization == nil {
		return ""
	}
	if d.Authorization.Action == "" {
		return " (" + policy.ActionAllow + ")"
	}
	return " (" + d.Authorization.Action + ")"
}

// connect settles what the handshake settles: mode and identity. It returns
// false where there will be no connection.
func (d *decision) connect() bool {
	mode := d.snapshot.MTLSMode(d.r.port)
	d.step("mutual TLS on port %d: %s", d.r.port, mode)
	d.peer = authz.Peer{
		ID: d.s.caller, SourceIP: d.q.source, DestinationIP: d.r.address,
		DestinationPort: d.r.port, SNI: d.q.sni, RemoteIP: d.q.remote,
	}
	switch {
	case mode == authz.ModeStrict && d.s.caller.IsZero():
		d.refuse(403, "mutual TLS is required (STRICT) and the caller has no certificate")
		return false
	case mode == authz.ModeDisable:
		if !d.s.caller.IsZero() {
			d.note("mutual TLS is disabled on port %d: the proxy does not see who calls", d.r.port)
		}
		d.peer.ID = spiffeid.ID{}
	case !d.s.caller.IsZero() && !trusted(d.s, d.s.caller.TrustDomain().Name()):
		d.refuse(403, fmt.Sprintf("the handshake fails: trust domain %q is neither the mesh's (%q) nor an alias of it", d.s.caller.TrustDomain(), d.s.domain))
		return false
	}
	return true
}

func trusted(s *scene, td string) bool {
	if td == s.domain.Name() {
		return true
	}
	for _, alias := range s.mesh.TrustDomainAliases {
		if td == alias {
			return true
		}
	}
	return false
}

// http judges one request by the code the proxy judges with: the request is
// written as a client would, read by the proxy's engine, and judged from what the
// engine made of it.
func (d *decision) http() error {
	raw, err := d.env.wire(d.q, d.r.host)
	if err != nil {
		return err
	}
	if upper := strings.ToUpper(d.q.method); upper != d.q.method {
		d.note("methods are case-sensitive; %q is not %s", d.q.method, upper)
	}
	tokens, err := d.authenticator()
	if err != nil {
		d.refuse(403, "policy cannot be enforced, all is denied: request authentication: "+err.Error())
		return nil
	}
	judged := &judgedSession{judge: func(r *engine.Request) {
		h := &judgedHeader{request: r, xfcc: d.forwardedClientCert()}
		remote := d.q.remote
		if !remote.IsValid() {
			remote = judge.RemoteIP(h, d.s.mesh.NumTrustedProxies)
		}
		request := judge.Request{Method: r.Method, Host: r.Host, Path: r.Path, RawQuery: r.RawQuery, Header: h, RemoteIP: remote}
		var c judge.Case
		c.Judge(request, d.s.mesh.PathNormalization, tokens, d.snapshot.Connect(d.peer))
		d.record(&c, r)
		if c.Kind == judge.KindPath || c.Kind == judge.KindToken {
			return
		}
		d.explain(func(s *authz.Snapshot) authz.Decision {
			var probe judge.Case
			probe.Judge(request, d.s.mesh.PathNormalization, tokens, s.Connect(d.peer))
			return probe.Decision
		})
		d.decided(c.Decision)
	}}
	status, err := throughEngine(raw, judged)
	if err != nil {
		return err
	}
	if !judged.begun {
		d.refuse(status, "the proxy refuses the request before policy is asked: "+judged.malformed)
	}
	return nil
}

// judgedHeader is what policy sees of the headers: the proxy drops the caller's
// own x-forwarded-client-cert and writes what it has verified.
type judgedHeader struct {
	request *engine.Request
	xfcc    []string
}

// Values implements authz.Header.
func (h *judgedHeader) Values(name string) []string {
	if name == "x-forwarded-client-cert" {
		return h.xfcc
	}
	return h.request.Values(name)
}

// forwardedClientCert is what the proxy writes, but for the hash of a certificate
// that is not here.
func (d *decision) forwardedClientCert() []string {
	if d.peer.ID.IsZero() {
		return nil
	}
	own, err := identity.New(d.s.domain, d.r.workload.Account)
	if err != nil {
		return nil
	}
	return []string{"By=" + own.String() + ";Hash=;URI=" + d.peer.ID.String()}
}

// record takes from a case what outlives the request.
func (d *decision) record(c *judge.Case, r *engine.Request) {
	if c.Path != "" && c.Path != r.Path {
		d.step("path %q is judged and forwarded as %q", r.Path, c.Path)
	}
	if c.Path != "" {
		d.Request = strings.Clone(r.Method + " " + c.Path)
	}
	if c.Verified != nil {
		d.step("token of issuer %q verified: subject %q", c.Verified.Token.Issuer, c.Verified.Token.Subject)
	}
	if c.Kind == judge.KindPath || c.Kind == judge.KindToken {
		reason := c.Reason
		if c.Err != nil {
			reason += ": " + c.Err.Error()
		}
		d.refuse(c.Status, reason)
	}
}

func (d *decision) decided(v authz.Decision) {
	d.Allowed, d.Action, d.Policy, d.Rule, d.Reason = v.Allowed, v.Action, v.Policy, v.Rule, v.Reason
	d.Code = http.StatusForbidden
	if v.Allowed {
		d.Code = http.StatusOK
	}
	if v.Provider != "" {
		d.Reason += ": provider " + v.Provider + " is not asked here"
	}
	d.step("decision: %s", d.why())
	if sh := v.Shadow; sh != nil {
		d.Shadow = "denied"
		if sh.Allowed {
			d.Shadow = "allowed"
		}
		d.Shadow += ": " + sh.Reason
		if sh.Policy != "" {
			d.Shadow += " (" + sh.Policy + ")"
		}
		d.step("with the dry-run policies enforced: %s", d.Shadow)
	}
}

// authenticator verifies tokens with inline keys, or with keys fetched from where
// the policy says, within the bounds of the mesh settings; these only when a
// token wants them.
func (d *decision) authenticator() (*jws.Authenticator, error) {
	rules := d.snapshot.JWTRules()
	if len(rules) == 0 {
		return nil, nil
	}
	return jws.NewAuthenticator(rules, func(source string) *jws.KeySet {
		keys, ok := d.s.keys[source]
		if !ok {
			if d.s.keys == nil {
				d.s.keys = map[string]*jws.KeySet{}
			}
			var err error
			if keys, err = fetchKeys(d.ctx, source, d.s.mesh); err != nil {
				d.note("keys of %s could not be fetched, its tokens are refused: %v", source, err)
			}
			d.s.keys[source] = keys
		}
		return keys
	}, jws.AuthenticatorConfig{})
}

// fetchKeys fetches one key set, once.
func fetchKeys(ctx context.Context, source string, mesh policy.Mesh) (*jws.KeySet, error) {
	remote, err := jws.NewRemote(jws.RemoteConfig{Source: source, Allow: mesh.JWKS.Allow, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	if err := remote.Refetch(ctx); err != nil {
		return nil, err
	}
	return remote.Keys()
}
