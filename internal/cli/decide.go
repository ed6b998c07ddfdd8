package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/internal/judge"
	"castellan.dev/internal/jws"
	"castellan.dev/proxy/engine"
)

// answer is the decision as programs read it.
type answer struct {
	Allowed bool   `json:"allowed"`
	Code    int    `json:"code"`
	Action  string `json:"action,omitempty"`
	Policy  string `json:"policy"`
	Rule    int    `json:"rule"`
	Reason  string `json:"reason"`
	From    string `json:"from"`
	To      string `json:"to"`
	// Request is what was judged, the path normalised.
	Request string   `json:"request"`
	Shadow  string   `json:"shadow,omitempty"`
	Steps   []string `json:"steps,omitempty"`
}

func (a *answer) step(format string, args ...any) {
	a.Steps = append(a.Steps, fmt.Sprintf(format, args...))
}

// refuse is a refusal before policy is asked.
func (a *answer) refuse(code int, reason string) *answer {
	a.Allowed, a.Code, a.Reason, a.Rule = false, code, reason, -1
	a.step("%d: %s", code, reason)
	return a
}

func (a *answer) print(w io.Writer) error {
	verdict := fmt.Sprintf("denied (%d)", a.Code)
	if a.Allowed {
		verdict = "allowed"
	}
	why := a.Reason
	if a.Policy != "" {
		why += fmt.Sprintf(" (%s %s", a.Action, a.Policy)
		if a.Rule >= 0 {
			why += fmt.Sprintf(", rule %d", a.Rule)
		}
		why += ")"
	}
	if _, err := fmt.Fprintf(w, "%s: %s -> %s %s: %s\n", verdict, a.From, a.To, a.Request, why); err != nil {
		return err
	}
	for _, s := range a.Steps {
		if _, err := fmt.Fprintf(w, "  %s\n", s); err != nil {
			return err
		}
	}
	return nil
}

// decide takes the decision of the receiving proxy.
func decide(q *canI, s *setting) (*answer, error) {
	a := &answer{Rule: -1, From: q.from, To: s.workload.Account.String(), Request: strings.TrimSpace(q.method + " " + q.target)}
	if q.tcp {
		a.Request = "tcp port " + portText(s.port)
	}
	snapshot, problems := authz.Compile(authz.Config{Documents: s.docs, Workload: s.workload, Mesh: s.mesh})
	for _, p := range problems {
		a.step("problem: %s %s/%s: %s: %s", p.Kind, p.Namespace, p.Name, p.Field, p.Reason)
	}
	a.policies(s)
	peer, refused, err := a.connection(q, s, snapshot)
	if err != nil || refused != nil {
		return refused, err
	}
	connection := snapshot.Connect(peer)
	if q.tcp {
		a.decision(connection.AuthorizeTCP())
		return a, nil
	}
	return a.http(q, s, snapshot, connection)
}

// policies notes which documents select the receiver.
func (a *answer) policies(s *setting) {
	n := 0
	for _, d := range s.docs {
		if authz.Selects(d, s.workload.Account.Namespace(), s.workload.Labels, s.mesh) {
			n++
			a.step("selects %s: %s %s/%s%s", a.To, d.Kind, d.Metadata.Namespace, d.Metadata.Name, actionOf(d))
		}
	}
	if n == 0 {
		a.step("no policy selects %s (labels %v)", a.To, s.workload.Labels)
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

// connection settles what the handshake settles: mode and identity.
func (a *answer) connection(q *canI, s *setting, snapshot *authz.Snapshot) (authz.Peer, *answer, error) {
	source, err := parseIP("--source-ip", q.sourceIP)
	if err != nil {
		return authz.Peer{}, nil, err
	}
	remote, err := parseIP("--remote-ip", q.remoteIP)
	if err != nil {
		return authz.Peer{}, nil, err
	}
	mode := snapshot.MTLSMode(s.port)
	a.step("mutual TLS on port %d: %s", s.port, mode)
	peer := authz.Peer{ID: s.caller, SourceIP: source, DestinationIP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), DestinationPort: s.port, SNI: q.sni, RemoteIP: remote}
	switch {
	case mode == authz.ModeStrict && s.caller.IsZero():
		return peer, a.refuse(403, "mutual TLS is required (STRICT) and the caller has no certificate"), nil
	case mode == authz.ModeDisable:
		if !s.caller.IsZero() {
			a.step("mutual TLS is disabled: the caller's identity is not seen")
		}
		peer.ID = spiffeid.ID{}
	case !s.caller.IsZero() && !trusted(s, s.caller.TrustDomain().Name()):
		return peer, a.refuse(403, fmt.Sprintf("the handshake fails: trust domain %q is neither the mesh's nor an alias", s.caller.TrustDomain())), nil
	}
	return peer, nil, nil
}

func trusted(s *setting, td string) bool {
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
func (a *answer) http(q *canI, s *setting, snapshot *authz.Snapshot, connection *authz.Connection) (*answer, error) {
	raw, err := q.wire(s.host)
	if err != nil {
		return nil, err
	}
	remote, err := parseIP("--remote-ip", q.remoteIP)
	if err != nil {
		return nil, err
	}
	tokens, err := a.authenticator(snapshot, s)
	if err != nil {
		return nil, err
	}
	judged := &judgedSession{judge: func(r *engine.Request) {
		var c judge.Case
		c.Judge(judge.Request{Method: r.Method, Host: r.Host, Path: r.Path, RawQuery: r.RawQuery, Header: r, RemoteIP: remote},
			s.mesh.PathNormalization, tokens, connection)
		a.record(&c, r)
	}}
	status, err := throughEngine(raw, judged)
	if err != nil {
		return nil, err
	}
	if !judged.begun {
		return a.refuse(status, "the request is malformed: the proxy answers it before policy is asked"), nil
	}
	return a, nil
}

// record takes from a case what outlives the request.
func (a *answer) record(c *judge.Case, r *engine.Request) {
	if c.Path != "" && c.Path != r.Path {
		a.step("path %q is judged and forwarded as %q", r.Path, c.Path)
		a.Request = strings.Clone(r.Method + " " + c.Path)
	}
	if c.Verified != nil {
		a.step("token of issuer %q verified", c.Verified.Token.Issuer)
	}
	if c.Kind == judge.KindPath || c.Kind == judge.KindToken {
		reason := c.Reason
		if c.Err != nil {
			reason += ": " + c.Err.Error()
		}
		a.refuse(c.Status, reason)
		return
	}
	a.decision(c.Decision)
}

func (a *answer) decision(d authz.Decision) {
	a.Allowed, a.Action, a.Policy, a.Rule, a.Reason = d.Allowed, d.Action, d.Policy, d.Rule, d.Reason
	a.Code = 403
	if d.Allowed {
		a.Code = 200
	}
	if d.Provider != "" {
		a.Reason += ": provider " + d.Provider + " is not asked here"
	}
	a.step("policy: %s %s rule %d: %s", d.Action, d.Policy, d.Rule, d.Reason)
	if sh := d.Shadow; sh != nil {
		a.Shadow = "denied"
		if sh.Allowed {
			a.Shadow = "allowed"
		}
		a.Shadow += ": " + sh.Reason
		a.step("with the dry-run policies enforced: %s (%s)", a.Shadow, sh.Policy)
	}
}

// authenticator verifies tokens with inline keys, or with keys fetched from where
// the policy says, within the bounds of the mesh settings.
func (a *answer) authenticator(snapshot *authz.Snapshot, s *setting) (*jws.Authenticator, error) {
	rules := snapshot.JWTRules()
	if len(rules) == 0 {
		return nil, nil
	}
	sets := map[string]*jws.KeySet{}
	for _, r := range rules {
		source := jws.SourceName(r)
		if source == "" || sets[source] != nil {
			continue
		}
		keys, err := fetchKeys(source, s.mesh)
		if err != nil {
			a.step("keys of %s could not be fetched, its tokens are refused: %v", source, err)
			continue
		}
		sets[source] = keys
	}
	return jws.NewAuthenticator(rules, func(source string) *jws.KeySet { return sets[source] }, jws.AuthenticatorConfig{})
}

// fetchKeys fetches one key set, once.
func fetchKeys(source string, mesh policy.Mesh) (*jws.KeySet, error) {
	remote, err := jws.NewRemote(jws.RemoteConfig{Source: source, Allow: mesh.JWKS.Allow, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	if err := remote.Refetch(ctx); err != nil {
		return nil, err
	}
	return remote.Keys()
}

// wire returns the request as its bytes.
func (q *canI) wire(host string) ([]byte, error) {
	pairs, err := parsePairs("--header", q.headers, "=")
	if err != nil {
		return nil, err
	}
	if q.jwtFile != "" {
		token, err := readToken(q.jwtFile)
		if err != nil {
			return nil, err
		}
		pairs = append(pairs, [2]string{"Authorization", "Bearer " + token})
	}
	var b strings.Builder
	line := func(parts ...string) error {
		for _, p := range parts {
			if strings.ContainsAny(p, "\r\n") {
				return invalidf("%q holds a line break, which would end the line it stands in", p)
			}
			b.WriteString(p)
		}
		b.WriteString("\r\n")
		return nil
	}
	lines := [][]string{{q.method, " ", q.target, " HTTP/1.1"}, {"Host: ", host}}
	for _, p := range pairs {
		if strings.EqualFold(p[0], "host") {
			return nil, invalidf("--header %q: use --host", p[0])
		}
		lines = append(lines, []string{p[0], ": ", p[1]})
	}
	for _, l := range append(lines, []string{"Connection: close"}, nil) {
		if err := line(l...); err != nil {
			return nil, err
		}
	}
	return []byte(b.String()), nil
}

// judgedSession judges the one request and forwards nothing.
type judgedSession struct {
	judge func(*engine.Request)
	begun bool
}

// Begin judges.
func (s *judgedSession) Begin(r *engine.Request) engine.Verdict {
	s.begun = true
	s.judge(r)
	return engine.Verdict{Status: http.StatusNoContent}
}

// Dial is never asked: nothing is forwarded.
func (s *judgedSession) Dial(context.Context, *engine.Request) (net.Conn, error) {
	return nil, errors.New("nothing is forwarded")
}

// End has nothing to log.
func (s *judgedSession) End(*engine.Request, *engine.Outcome) {}

// throughEngine gives the bytes of one request to the proxy's HTTP engine and
// returns the status it answers with.
func throughEngine(raw []byte, s *judgedSession) (int, error) {
	client, server := net.Pipe()
	defer client.Close()
	deadline := time.Now().Add(fetchTimeout) //nolint:forbidigo // bounds a pipe within this process
	if err := client.SetDeadline(deadline); err != nil {
		return 0, err
	}
	e := engine.New(engine.Config{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.ServeConn(context.Background(), server, false, s)
	}()
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		// The engine may answer before it has read everything.
		_, _ = client.Write(raw)
	}()
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	client.Close()
	<-wrote
	<-done
	e.Close()
	if err != nil {
		return 0, fmt.Errorf("the proxy's engine did not answer: %w", err)
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}
