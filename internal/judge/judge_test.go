package judge_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
	"castellan.dev/internal/judge"
	"castellan.dev/internal/jws"
)

const issuer = "https://users.example"

// headers is a request's header fields, names in lower case.
type headers map[string][]string

func (h headers) Values(name string) []string { return h[name] }

// users signs end-user tokens.
type users struct {
	signer jose.Signer
	jwks   string
}

func newUsers(t testing.TB) *users {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	return &users{signer: signer, jwks: string(jwks)}
}

func (u *users) token(t testing.TB, expiry time.Duration, claims map[string]any) string {
	t.Helper()
	std := jwt.Claims{Issuer: issuer, Subject: "alice", Audience: jwt.Audience{"orders"}, Expiry: jwt.NewNumericDate(time.Now().Add(expiry))}
	token, err := jwt.Signed(u.signer).Claims(std).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// rule accepts the users' tokens and passes their group on in x-group.
func (u *users) rule(changes ...func(*policy.JWTRule)) policy.JWTRule {
	r := policy.JWTRule{
		Issuer: issuer, Jwks: u.jwks, Audiences: []string{"orders"},
		OutputClaimToHeaders: []policy.ClaimToHeader{{Header: "X-Group", Claim: "group"}},
	}
	for _, change := range changes {
		change(&r)
	}
	return r
}

func tokens(t testing.TB, rules ...policy.JWTRule) *jws.Authenticator {
	t.Helper()
	a, err := jws.NewAuthenticator(rules, nil, jws.AuthenticatorConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// connect compiles policies for shop/orders and connects shop/frontend to it.
func connect(t testing.TB, specs ...policy.AuthorizationPolicy) *authz.Connection {
	t.Helper()
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		t.Fatal(err)
	}
	cfg := authz.Config{
		Workload: authz.Workload{TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), Account: account},
		Mesh:     policy.Mesh{TrustDomain: "cluster.local", RootNamespace: "castellan-system"},
	}
	for i, spec := range specs {
		cfg.Documents = append(cfg.Documents, policy.Document{
			Kind: policy.KindAuthorization, Metadata: policy.Metadata{Namespace: "shop", Name: string(rune('a' + i))}, Authorization: &spec,
		})
	}
	snapshot, problems := authz.Compile(cfg)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return snapshot.Connect(authz.Peer{ID: spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/frontend"), SourceIP: netip.MustParseAddr("10.0.0.1")})
}

func allow(r policy.Rule) policy.AuthorizationPolicy {
	return policy.AuthorizationPolicy{Rules: []policy.Rule{r}}
}

func paths(p ...string) policy.Rule {
	return policy.Rule{To: []policy.To{{Operation: &policy.Operation{Paths: p}}}}
}

func when(key string, values ...string) policy.Rule {
	return policy.Rule{When: []policy.Condition{{Key: key, Values: values}}}
}

func TestJudge(t *testing.T) {
	u, stranger := newUsers(t), newUsers(t)
	good := u.token(t, time.Hour, map[string]any{"group": "finance", "groups": []string{"finance", "staff"}})
	plain := u.token(t, time.Hour, nil)
	forward := func(r *policy.JWTRule) { r.ForwardOriginalToken = true }
	all := tokens(t, u.rule())
	byUser := allow(policy.Rule{From: []policy.From{{Source: &policy.Source{RequestPrincipals: []string{issuer + "/alice"}}}}})
	byGroup := allow(when("request.headers[x-group]", "finance"))

	tests := map[string]struct {
		request       judge.Request
		normalization string // default BASE
		tokens        *jws.Authenticator
		connection    *authz.Connection
		status        int
		kind, reason  string
		path          string
		remove        []string
		set           []jws.HeaderValue
		query         string // where it is set
		strips        bool   // the query
		policy        string
	}{
		"no policy, no rules":                 {request: judge.Request{Method: "GET", Path: "/"}, connection: connect(t), status: 200, reason: authz.ReasonNoAllowPolicy, path: "/"},
		"allowed by rule":                     {request: judge.Request{Method: "GET", Path: "/a"}, connection: connect(t, allow(paths("/a"))), status: 200, reason: authz.ReasonAllowed, path: "/a", policy: "shop/a"},
		"no rule matches":                     {request: judge.Request{Method: "GET", Path: "/b"}, connection: connect(t, allow(paths("/a"))), status: 403, kind: judge.KindPolicy, reason: authz.ReasonNoMatch, path: "/b"},
		"trust-08 a nil connection denies":    {request: judge.Request{Method: "GET", Path: "/"}, status: 403, kind: judge.KindPolicy, reason: authz.ReasonNoSnapshot, path: "/"},
		"trust-08 so does one of no snapshot": {request: judge.Request{Method: "GET", Path: "/"}, connection: (*authz.Snapshot)(nil).Connect(authz.Peer{}), status: 403, kind: judge.KindPolicy, reason: authz.ReasonNoSnapshot, path: "/"},

		"authz-24 the judged path is the forwarded one": {request: judge.Request{Method: "GET", Path: "/x/../a"}, connection: connect(t, allow(paths("/a"))), status: 200, path: "/a", policy: "shop/a"},
		"authz-24 NONE leaves it":                       {request: judge.Request{Method: "GET", Path: "/x/../a"}, normalization: policy.NormalizeNone, connection: connect(t, allow(paths("/a"))), status: 403, kind: judge.KindPolicy, path: "/x/../a"},
		"authz-24 what cannot be normalised is 400":     {request: judge.Request{Method: "GET", Path: "/%00"}, connection: connect(t), status: 400, kind: judge.KindPath, reason: "path cannot be normalised"},
		"authz-24 an unknown option is 400":             {request: judge.Request{Method: "GET", Path: "/"}, normalization: "base", connection: connect(t), status: 400, kind: judge.KindPath},
		"OPTIONS * has no path":                         {request: judge.Request{Method: "OPTIONS", Path: "*"}, connection: connect(t), status: 200, path: "*"},
		"a bad path is not excused by a token":          {request: judge.Request{Method: "GET", Path: "/%00", Header: headers{"authorization": {"Bearer " + good}}}, tokens: all, connection: connect(t), status: 400, kind: judge.KindPath},

		"authz-26 no token is no mistake":     {request: judge.Request{Method: "GET", Path: "/"}, tokens: all, connection: connect(t), status: 200, path: "/", remove: []string{"x-group"}},
		"authz-26 but names nobody":           {request: judge.Request{Method: "GET", Path: "/"}, tokens: all, connection: connect(t, byUser), status: 403, kind: judge.KindPolicy, reason: authz.ReasonNoMatch, path: "/", remove: []string{"x-group"}},
		"authz-25 a verified token names one": {request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + good}}}, tokens: all, connection: connect(t, byUser), status: 200, path: "/", policy: "shop/a", remove: []string{"x-group", "authorization"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}},
		"authz-17 its claims count":           {request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + good}}}, tokens: all, connection: connect(t, allow(when("request.auth.claims[groups]", "staff"))), status: 200, path: "/", policy: "shop/a", remove: []string{"x-group", "authorization"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}},
		"authz-26 an expired token is 401":    {request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + u.token(t, -time.Hour, nil)}}}, tokens: all, connection: connect(t), status: 401, kind: judge.KindToken, reason: "expired", path: "/"},
		"authz-26 another's signature is 401": {request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + stranger.token(t, time.Hour, nil)}}}, tokens: all, connection: connect(t), status: 401, kind: judge.KindToken, path: "/"},
		"authz-25 another's audience is 403":  {request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + good}}}, tokens: tokens(t, u.rule(func(r *policy.JWTRule) { r.Audiences = []string{"payments"} })), connection: connect(t), status: 403, kind: judge.KindToken, path: "/"},
		"authz-30 a preflight needs no token": {request: judge.Request{Method: "OPTIONS", Path: "/", Header: headers{"authorization": {"Bearer nonsense"}, "origin": {"https://x.example"}, "access-control-request-method": {"POST"}}}, tokens: all, connection: connect(t), status: 200, path: "/", remove: []string{"x-group"}},
		"authz-30 and is judged by policy":    {request: judge.Request{Method: "OPTIONS", Path: "/", Header: headers{"origin": {"https://x.example"}, "access-control-request-method": {"POST"}}}, tokens: all, connection: connect(t, byUser), status: 403, kind: judge.KindPolicy, path: "/", remove: []string{"x-group"}},
		"authz-30 OPTIONS alone is none":      {request: judge.Request{Method: "OPTIONS", Path: "/", Header: headers{"authorization": {"Bearer nonsense"}}}, tokens: all, connection: connect(t), status: 401, kind: judge.KindToken, path: "/"},
		"the token is kept on request":        {request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + good}}}, tokens: tokens(t, u.rule(forward)), connection: connect(t), status: 200, path: "/", remove: []string{"x-group"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}},

		// A header that only a verified token may set is judged as set.
		"authz-28 a spoofed claim header never counts":  {request: judge.Request{Method: "GET", Path: "/", Header: headers{"x-group": {"finance"}}}, tokens: all, connection: connect(t, byGroup), status: 403, kind: judge.KindPolicy, reason: authz.ReasonNoMatch, path: "/", remove: []string{"x-group"}},
		"authz-28 nor beside a token without the claim": {request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + plain}, "x-group": {"finance"}}}, tokens: all, connection: connect(t, byGroup), status: 403, kind: judge.KindPolicy, path: "/", remove: []string{"x-group", "authorization"}},
		"authz-28 the verified one does":                {request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + good}, "x-group": {"staff"}}}, tokens: all, connection: connect(t, byGroup), status: 200, path: "/", policy: "shop/a", remove: []string{"x-group", "authorization"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}},
		"authz-28 nor does a spoofed one escape a DENY": {
			request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + good}, "x-group": {"staff"}}}, tokens: all,
			connection: connect(t, policy.AuthorizationPolicy{Action: policy.ActionDeny, Rules: []policy.Rule{when("request.headers[x-group]", "finance")}}),
			status:     403, kind: judge.KindPolicy, reason: authz.ReasonDenied, path: "/", policy: "shop/a", remove: []string{"x-group", "authorization"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}},
		"a stripped token is not seen by policy": {
			request: judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + good}}}, tokens: all,
			connection: connect(t, allow(when("request.headers[authorization]", "*"))), status: 403, kind: judge.KindPolicy, path: "/", remove: []string{"x-group", "authorization"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}},
		"other headers are seen as they came": {
			request: judge.Request{Method: "GET", Path: "/", Header: headers{"x-team": {"blue"}}}, tokens: all,
			connection: connect(t, allow(when("request.headers[x-team]", "blue"))), status: 200, path: "/", policy: "shop/a", remove: []string{"x-group"}},

		// Tokens in parameters and cookies are taken out of them.
		"stripped from the query": {
			request: judge.Request{Method: "GET", Path: "/", RawQuery: "a=1&t=" + good + "&b=2"}, tokens: tokens(t, u.rule(func(r *policy.JWTRule) { r.FromParams = []string{"t"} })),
			connection: connect(t, byUser), status: 200, path: "/", policy: "shop/a", remove: []string{"x-group"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}, strips: true, query: "a=1&b=2"},
		"stripped from cookies": {
			request: judge.Request{Method: "GET", Path: "/", Header: headers{"cookie": {"a=1; t=" + good, "b=2"}}}, tokens: tokens(t, u.rule(func(r *policy.JWTRule) { r.FromCookies = []string{"t"} })),
			connection: connect(t, byUser), status: 200, path: "/", policy: "shop/a", remove: []string{"x-group", "cookie"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}, {Name: "cookie", Value: "a=1; b=2"}}},
		"a cookie of nothing else goes": {
			request: judge.Request{Method: "GET", Path: "/", Header: headers{"cookie": {"t=" + good}}}, tokens: tokens(t, u.rule(func(r *policy.JWTRule) { r.FromCookies = []string{"t"} })),
			connection: connect(t, byUser), status: 200, path: "/", policy: "shop/a", remove: []string{"x-group", "cookie"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}},
		"a cookie kept on request stays": {
			request: judge.Request{Method: "GET", Path: "/", Header: headers{"cookie": {"t=" + good}}}, tokens: tokens(t, u.rule(forward, func(r *policy.JWTRule) { r.FromCookies = []string{"t"} })),
			connection: connect(t, byUser), status: 200, path: "/", policy: "shop/a", remove: []string{"x-group"}, set: []jws.HeaderValue{{Name: "x-group", Value: "finance"}}},

		"the remote address is the one given": {
			request:    judge.Request{Method: "GET", Path: "/", RemoteIP: netip.MustParseAddr("203.0.113.9")},
			connection: connect(t, allow(policy.Rule{From: []policy.From{{Source: &policy.Source{RemoteIPBlocks: []string{"203.0.113.0/24"}}}}})), status: 200, path: "/", policy: "shop/a"},
		"the host is the one received": {
			request:    judge.Request{Method: "GET", Path: "/", Host: "api.example:80"},
			connection: connect(t, allow(policy.Rule{To: []policy.To{{Operation: &policy.Operation{Hosts: []string{"api.example:80"}}}}})), status: 200, path: "/", policy: "shop/a"},
	}
	var c judge.Case // one for all, as a proxy uses it: nothing of one request may reach the next
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c.Reset()
			if tt.normalization == "" {
				tt.normalization = policy.NormalizeBase
			}
			if tt.request.Header == nil {
				tt.request.Header = headers{}
			}
			c.Judge(tt.request, tt.normalization, tt.tokens, tt.connection)
			if c.Status != tt.status || c.Kind != tt.kind || !strings.Contains(c.Reason, tt.reason) || c.Reason == "" || c.Path != tt.path {
				t.Errorf("%d %q %q path %q; want %d %q %q path %q", c.Status, c.Kind, c.Reason, c.Path, tt.status, tt.kind, tt.reason, tt.path)
			}
			if (c.Err != nil) != (tt.kind == judge.KindPath) || c.Decision.Policy != tt.policy {
				t.Errorf("error %v, policy %q", c.Err, c.Decision.Policy)
			}
			if !slices.Equal(c.Remove, tt.remove) || !slices.Equal(c.Set, tt.set) {
				t.Errorf("remove %q, want %q; set %s", c.Remove, tt.remove, cmp.Diff(tt.set, c.Set))
			}
			if c.SetQuery != tt.strips || c.Query != tt.query {
				t.Errorf("query %q, set %t", c.Query, c.SetQuery)
			}
		})
	}
}

// A verified token is there for the log; no other ever is.
func TestVerified(t *testing.T) {
	u := newUsers(t)
	a := tokens(t, u.rule())
	judgeWith := func(token string) *judge.Case {
		c := &judge.Case{}
		c.Judge(judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + token}}}, policy.NormalizeBase, a, connect(t))
		return c
	}
	if c := judgeWith(u.token(t, time.Hour, nil)); c.Verified == nil || c.Verified.Token.Subject != "alice" {
		t.Errorf("%+v", c.Verified)
	}
	for _, token := range []string{u.token(t, -time.Hour, nil), "nonsense", newUsers(t).token(t, time.Hour, nil)} {
		if c := judgeWith(token); c.Verified != nil || c.Status == 200 || len(c.Set) > 0 {
			t.Errorf("%d %+v", c.Status, c.Verified)
		}
	}
}

func TestReset(t *testing.T) {
	u := newUsers(t)
	var c judge.Case
	c.Judge(judge.Request{Method: "GET", Path: "/", Header: headers{"authorization": {"Bearer " + u.token(t, time.Hour, map[string]any{"group": "x"})}}},
		policy.NormalizeBase, tokens(t, u.rule()), connect(t))
	if len(c.Set) == 0 || len(c.Remove) == 0 || c.Verified == nil {
		t.Fatalf("%+v", c)
	}
	set, remove := c.Set, c.Remove
	c.Reset()
	if c.Status != 0 || c.Kind != "" || c.Reason != "" || c.Path != "" || c.Verified != nil || c.Err != nil || len(c.Set)+len(c.Remove) > 0 || c.SetQuery || c.Query != "" {
		t.Errorf("%+v", c)
	}
	// What the slices held does not linger behind their end.
	if set[0] != (jws.HeaderValue{}) || remove[0] != "" {
		t.Errorf("%q %q", set, remove)
	}
}

// Requests without a token cost no allocation, rules or no rules.
func TestJudgeAllocations(t *testing.T) {
	connection := connect(t, allow(paths("/a", "/b*")), allow(when("request.headers[x-team]", "blue")))
	header := headers{"x-team": {"blue"}, "accept": {"*/*"}}
	for name, a := range map[string]*jws.Authenticator{"no rules": nil, "rules": tokens(t, newUsers(t).rule())} {
		t.Run(name, func(t *testing.T) {
			var c judge.Case
			// Boxed once, as a proxy's pooled request is.
			r := judge.Request{Method: "GET", Path: "/bc", Host: "orders.shop", Header: header}
			n := testing.AllocsPerRun(200, func() {
				c.Reset()
				c.Judge(r, policy.NormalizeBase, a, connection)
				if c.Status != 200 {
					t.Fatalf("%d %s", c.Status, c.Reason)
				}
			})
			if n != 0 {
				t.Errorf("%v allocations", n)
			}
		})
	}
}

func BenchmarkJudge(b *testing.B) {
	connection := connect(b, allow(paths("/a", "/b*")), allow(when("request.headers[x-team]", "blue")))
	u := newUsers(b)
	a := tokens(b, u.rule())
	for name, header := range map[string]headers{"no token": {"x-team": {"blue"}}, "token": {"x-team": {"blue"}, "authorization": {"Bearer " + u.token(b, time.Hour, nil)}}} {
		b.Run(name, func(b *testing.B) {
			var c judge.Case
			for b.Loop() {
				c.Reset()
				c.Judge(judge.Request{Method: "GET", Path: "/bc", Header: header}, policy.NormalizeBase, a, connection)
			}
			if c.Status != 200 {
				b.Fatal(c.Reason)
			}
		})
	}
}
