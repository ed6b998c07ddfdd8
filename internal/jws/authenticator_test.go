package jws_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"castellan.dev/api/policy"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
)

// request is a RequestView.
type request struct {
	method  string
	query   string
	headers map[string][]string
}

func (r *request) Method() string              { return r.method }
func (r *request) RawQuery() string            { return r.query }
func (r *request) Values(name string) []string { return r.headers[name] }

func get(headers ...string) *request {
	r := &request{method: "GET", headers: map[string][]string{}}
	for i := 0; i < len(headers); i += 2 {
		r.headers[headers[i]] = append(r.headers[headers[i]], headers[i+1])
	}
	return r
}

func withQuery(query string) *request { return &request{method: "GET", query: query} }

// bench is two issuers with rules and keys.
type scene struct {
	one, two *jwstest.Issuer
	now      time.Time
	sets     map[string]*jws.KeySet
}

func newScene(t testing.TB) *scene {
	s := &scene{one: jwstest.EC(t, "https://one.test", "k1"), two: jwstest.EC(t, "https://two.test", "k2"), now: now()}
	s.sets = map[string]*jws.KeySet{"jwks:https://one.test/keys": keySet(t, s.one), "oidc:https://two.test": keySet(t, s.two)}
	return s
}

func (s *scene) rule1() policy.JWTRule {
	return policy.JWTRule{Issuer: s.one.Name, JwksURI: "https://one.test/keys"}
}

func (s *scene) rule2() policy.JWTRule { return policy.JWTRule{Issuer: s.two.Name} }

func (s *scene) authenticator(t testing.TB, rules ...policy.JWTRule) *jws.Authenticator {
	t.Helper()
	a, err := jws.NewAuthenticator(rules, func(source string) *jws.KeySet { return s.sets[source] },
		jws.AuthenticatorConfig{Now: func() time.Time { return s.now }})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (s *scene) token(t testing.TB, is *jwstest.Issuer, change jwstest.Claims) string {
	return is.Sign(t, is.Base(s.now, "app").With(change))
}

func TestAuthenticate(t *testing.T) {
	s := newScene(t)
	aud := func(r policy.JWTRule, a ...string) policy.JWTRule { r.Audiences = a; return r }
	from := func(r policy.JWTRule, name, prefix string) policy.JWTRule {
		r.FromHeaders = append(r.FromHeaders, policy.JWTHeader{Name: name, Prefix: prefix})
		return r
	}
	param := func(r policy.JWTRule, name string) policy.JWTRule {
		r.FromParams = append(r.FromParams, name)
		return r
	}
	cookie := func(r policy.JWTRule, name string) policy.JWTRule {
		r.FromCookies = append(r.FromCookies, name)
		return r
	}
	t1, t2 := s.token(t, s.one, nil), s.token(t, s.two, nil)
	expired := s.token(t, s.one, jwstest.Claims{"exp": s.now.Unix()})
	stranger := jwstest.EC(t, "https://one.test", "k1")
	unknown := jwstest.EC(t, "https://evil.test", "k1")
	inline := policy.JWTRule{Issuer: s.one.Name, Jwks: string(jwstest.JWKS(t, s.one))}
	broken := policy.JWTRule{Issuer: s.one.Name, Jwks: "<html>"}
	absent := policy.JWTRule{Issuer: s.one.Name, JwksURI: "https://down.test/keys"}
	preflight := get("origin", "https://x.test", "access-control-request-method", "POST", "authorization", "Bearer "+expired)
	preflight.method = "OPTIONS"
	noPreflight := get("origin", "https://x.test", "authorization", "Bearer "+expired)
	noPreflight.method = "OPTIONS"

	tests := map[string]struct {
		rules  []policy.JWTRule
		r      *request
		code   int
		issuer string // of the verified token
		reason string
	}{
		"authz-25 no token passes":                     {[]policy.JWTRule{s.rule1()}, get(), 0, "", ""},
		"authz-25 valid":                               {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer "+t1), 0, s.one.Name, ""},
		"authz-25 malformed is 401":                    {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer x"), 401, "", "token malformed"},
		"authz-25 expired is 401":                      {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer "+expired), 401, "", "token expired"},
		"authz-25 unknown issuer is 401":               {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer "+s.token(t, unknown, nil)), 401, "", `token issuer not accepted: "https://evil.test"`},
		"authz-25 bad signature is 401":                {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer "+s.token(t, stranger, nil)), 401, "", "token signature wrong"},
		"authz-25 wrong audience is 403":               {[]policy.JWTRule{aud(s.rule1(), "other")}, get("authorization", "Bearer "+t1), 403, "", "token audience not accepted"},
		"authz-25 wrong audience but expired is 401":   {[]policy.JWTRule{aud(s.rule1(), "other")}, get("authorization", "Bearer "+expired), 401, "", "token expired"},
		"authz-25 rules pool, same issuer":             {[]policy.JWTRule{aud(s.rule1(), "other"), aud(s.rule1(), "app")}, get("authorization", "Bearer "+t1), 0, s.one.Name, ""},
		"authz-25 rules pool, second issuer":           {[]policy.JWTRule{s.rule1(), s.rule2()}, get("authorization", "Bearer "+t2), 0, s.two.Name, ""},
		"authz-25 oversized is 401":                    {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer "+strings.Repeat("a", 9<<10)), 401, "", "token too large"},
		"authz-26 access_token parameter":              {[]policy.JWTRule{s.rule1()}, withQuery("a=b&access_token=" + t1), 0, s.one.Name, ""},
		"authz-26 parameter, name escaped":             {[]policy.JWTRule{s.rule1()}, withQuery("access%5Ftoken=" + expired), 401, "", "token expired"},
		"authz-26 parameter, value escaped":            {[]policy.JWTRule{s.rule1()}, withQuery("access_token=" + strings.ReplaceAll(t1, ".", "%2E")), 0, s.one.Name, ""},
		"authz-26 parameter, broken escape":            {[]policy.JWTRule{s.rule1()}, withQuery("access_token=%zz"), 401, "", "broken escape"},
		"authz-26 parameter, twice":                    {[]policy.JWTRule{s.rule1()}, withQuery("access_token=" + t1 + "&access_token=x"), 401, "", "token malformed"},
		"authz-26 fromHeaders replaces the default":    {[]policy.JWTRule{from(s.rule1(), "X-Token", "")}, get("authorization", "Bearer "+expired), 0, "", ""},
		"authz-26 fromHeaders":                         {[]policy.JWTRule{from(s.rule1(), "X-Token", "")}, get("x-token", t1), 0, s.one.Name, ""},
		"authz-26 fromHeaders, empty value":            {[]policy.JWTRule{from(s.rule1(), "X-Token", "")}, get("x-token", ""), 0, "", ""},
		"authz-26 fromParams replaces the default":     {[]policy.JWTRule{param(s.rule1(), "jwt")}, withQuery("access_token=x&jwt=" + t1), 0, s.one.Name, ""},
		"authz-26 fromCookies":                         {[]policy.JWTRule{cookie(s.rule1(), "session")}, get("cookie", "a=b; session=\""+t1+"\"; c=d"), 0, s.one.Name, ""},
		"authz-26 fromCookies, invalid":                {[]policy.JWTRule{cookie(s.rule1(), "session")}, get("cookie", "session=x"), 401, "", "token malformed"},
		"authz-26 fromCookies, another":                {[]policy.JWTRule{cookie(s.rule1(), "session")}, get("cookie", "xsession=x"), 0, "", ""},
		"spiffe-20 Bearer in the authorization header": {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer "+s.token(t, s.one, map[string]any{"sub": "spiffe://cluster.local/ns/shop/sa/orders"})), 0, s.one.Name, ""},
		"authz-26 wrong prefix is no token":            {[]policy.JWTRule{s.rule1()}, get("authorization", "Basic "+expired), 0, "", ""},
		"authz-26 prefix not at the start is no token": {[]policy.JWTRule{s.rule1()}, get("authorization", "x Bearer "+expired), 0, "", ""},
		"authz-26 prefix is case-sensitive":            {[]policy.JWTRule{s.rule1()}, get("authorization", "bearer "+expired), 0, "", ""},
		"authz-26 longest prefix reads":                {[]policy.JWTRule{from(s.rule1(), "x", ""), from(s.rule1(), "x", "Bearer ")}, get("x", "Bearer "+t1), 0, s.one.Name, ""},
		"authz-26 a place only the other rule reads":   {[]policy.JWTRule{s.rule1(), from(s.rule2(), "x", "")}, get("x", t1), 401, "", "token issuer not accepted"},
		"authz-27 every token must verify":             {[]policy.JWTRule{s.rule1(), from(s.rule2(), "x", "")}, get("authorization", "Bearer "+t1, "x", "junk"), 401, "", "token malformed"},
		"authz-27 two valid, the first rule's counts":  {[]policy.JWTRule{s.rule1(), from(s.rule2(), "x", "")}, get("x", t2, "authorization", "Bearer "+t1), 0, s.one.Name, ""},
		"authz-27 repeated header, second invalid":     {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer "+t1, "authorization", "Bearer "+expired), 401, "", "token expired"},
		"authz-27 header and parameter":                {[]policy.JWTRule{s.rule1()}, &request{query: "access_token=" + expired, headers: map[string][]string{"authorization": {"Bearer " + t1}}}, 401, "", "token expired"},
		"authz-27 many tokens":                         {[]policy.JWTRule{s.rule1()}, withQuery(strings.Repeat("&access_token="+t1, 9)), 401, "", "more than 8 tokens"},
		"authz-28 inline keys":                         {[]policy.JWTRule{inline}, get("authorization", "Bearer "+t1), 0, s.one.Name, ""},
		"authz-28 broken inline keys refuse tokens":    {[]policy.JWTRule{broken}, get("authorization", "Bearer "+t1), 401, "", "no keys to verify"},
		"authz-28 broken inline keys, no token":        {[]policy.JWTRule{broken}, get(), 0, "", ""},
		"authz-28 keys that cannot be had":             {[]policy.JWTRule{absent}, get("authorization", "Bearer "+t1), 401, "", "no keys to verify"},
		"authz-28 keys that cannot be had, no token":   {[]policy.JWTRule{absent}, get(), 0, "", ""},
		"authz-28 rule without issuer takes any":       {[]policy.JWTRule{{JwksURI: "https://one.test/keys"}}, get("authorization", "Bearer "+s.one.Sign(t, s.one.Base(s.now).With(jwstest.Claims{"iss": "https://any.test"}))), 0, "https://any.test", ""},
		"authz-28 rule without issuer, still expired":  {[]policy.JWTRule{{JwksURI: "https://one.test/keys"}}, get("authorization", "Bearer "+expired), 401, "", "token expired"},
		"authz-29 no audiences, any passes":            {[]policy.JWTRule{s.rule1()}, get("authorization", "Bearer "+s.token(t, s.one, jwstest.Claims{"aud": nil})), 0, s.one.Name, ""},
		"authz-29 audiences, none in the token":        {[]policy.JWTRule{aud(s.rule1(), "app")}, get("authorization", "Bearer "+s.token(t, s.one, jwstest.Claims{"aud": nil})), 403, "", "token audience"},
		"authz-30 CORS preflight bypasses":             {[]policy.JWTRule{s.rule1()}, preflight, 0, "", ""},
		"authz-30 OPTIONS alone does not":              {[]policy.JWTRule{s.rule1()}, noPreflight, 401, "", "token expired"},
		"no rules":                                     {nil, get("authorization", "Bearer x"), 0, "", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			a := s.authenticator(t, tt.rules...)
			for _, pass := range []string{"first", "remembered"} {
				got := a.Authenticate(tt.r)
				if got.Code != tt.code || !strings.Contains(got.Reason, tt.reason) || (got.Reason == "") != (tt.code == 0) {
					t.Fatalf("%s: %d %q, want %d %q", pass, got.Code, got.Reason, tt.code, tt.reason)
				}
				issuer := ""
				if got.Verified != nil {
					issuer = got.Verified.Token.Issuer
				}
				if issuer != tt.issuer {
					t.Fatalf("%s: verified %q, want %q", pass, issuer, tt.issuer)
				}
			}
		})
	}
}

func TestOutputs(t *testing.T) {
	s := newScene(t)
	rule := s.rule1()
	rule.OutputPayloadToHeader = "X-Payload"
	rule.SpaceDelimitedClaims = []string{"roles"}
	for i, claim := range []string{"sub", "n", "big", "ok", "nested.deep.er", "list", "float", "gone", "evil", "nested"} {
		rule.OutputClaimToHeaders = append(rule.OutputClaimToHeaders, policy.ClaimToHeader{Header: fmt.Sprintf("X-Claim-%d", i), Claim: claim})
	}
	token := s.token(t, s.one, jwstest.Claims{
		"n": -7, "big": json.Number("12345678901234567890"), "ok": true, "list": []string{"a"}, "float": 1.5,
		"nested": map[string]any{"deep": map[string]any{"er": "x"}}, "evil": "a\r\nx-admin: 1",
	})
	a := s.authenticator(t, rule)
	removed := []string{
		"x-claim-0", "x-claim-1", "x-claim-2", "x-claim-3", "x-claim-4",
		"x-claim-5", "x-claim-6", "x-claim-7", "x-claim-8", "x-claim-9", "x-payload",
	}
	want := map[string]string{
		"x-claim-0": "alice", "x-claim-1": "-7", "x-claim-2": "12345678901234567890", "x-claim-3": "true", "x-claim-4": "x",
		"x-payload": strings.Split(token, ".")[1],
	}
	t.Run("authz-30 claims to headers", func(t *testing.T) {
		got := a.Authenticate(get("authorization", "Bearer "+token, "x-claim-0", "admin"))
		set := map[string]string{}
		for _, h := range got.SetHeaders {
			set[h.Name] = h.Value
		}
		if fmt.Sprint(set) != fmt.Sprint(want) || !slices.Equal(got.RemoveHeaders, removed) {
			t.Errorf("sets %v, removes %v", set, got.RemoveHeaders)
		}
		if !slices.Equal(got.Verified.SpaceDelimited, []string{"roles"}) {
			t.Errorf("space-delimited %v", got.Verified.SpaceDelimited)
		}
	})
	for name, r := range map[string]*request{"without a token": get(), "with a bad one": get("authorization", "Bearer x")} {
		t.Run("authz-30 spoofed claim headers go "+name, func(t *testing.T) {
			if got := a.Authenticate(r); !slices.Equal(got.RemoveHeaders, removed) || got.SetHeaders != nil {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestStripping(t *testing.T) {
	s := newScene(t)
	both := func(r policy.JWTRule, forward bool) policy.JWTRule {
		r.FromHeaders = []policy.JWTHeader{{Name: "Authorization", Prefix: "Bearer "}, {Name: "X-Token"}}
		r.FromParams, r.FromCookies, r.ForwardOriginalToken = []string{"jwt"}, []string{"session"}, forward
		return r
	}
	token := s.token(t, s.one, nil)
	r := get("authorization", "Bearer "+token, "x-token", token, "cookie", "session="+token)
	r.query = "jwt=" + token
	t.Run("authz-30 stripped", func(t *testing.T) {
		got := s.authenticator(t, both(s.rule1(), false)).Authenticate(r)
		if fmt.Sprint(got.StripHeaders, got.StripParams, got.StripCookies) != "[authorization x-token] [jwt] [session]" {
			t.Errorf("%v %v %v (%d %s)", got.StripHeaders, got.StripParams, got.StripCookies, got.Code, got.Reason)
		}
	})
	t.Run("authz-30 forwardOriginalToken", func(t *testing.T) {
		got := s.authenticator(t, both(s.rule1(), true)).Authenticate(r)
		if got.Code != 0 || got.StripHeaders != nil || got.StripParams != nil || got.StripCookies != nil {
			t.Errorf("%+v", got)
		}
	})
	for in, want := range map[string]string{
		"jwt=x": "", "a=b&jwt=x&c=d": "a=b&c=d", "jw%74=x&a": "a", "ajwt=1&jwt": "ajwt=1", "": "", "a=%zz&jwt=1": "a=%zz",
	} {
		if got := jws.StripQuery(in, []string{"jwt"}); got != want {
			t.Errorf("query %q: %q, want %q", in, got, want)
		}
		if _, err := url.ParseQuery(want); err == nil && jws.StripQuery(in, nil) != in {
			t.Errorf("query %q changed for nothing", in)
		}
	}
	for in, want := range map[string]string{
		"session=x": "", "a=b; session=x; c=d": "a=b; c=d", "xsession=1;session=2": "xsession=1", "": "",
	} {
		if got := jws.StripCookie(in, []string{"session"}); got != want {
			t.Errorf("cookie %q: %q, want %q", in, got, want)
		}
	}
}

// TestRemembered holds what a remembered token is asked anew every time.
func TestRemembered(t *testing.T) {
	s := newScene(t)
	a := s.authenticator(t, s.rule1())
	r := get("authorization", "Bearer "+s.token(t, s.one, nil))
	first := a.Authenticate(r)
	if again := a.Authenticate(r); first.Verified == nil || again.Verified != first.Verified {
		t.Fatal("not remembered")
	}
	builds := 0
	for range 3 {
		if got := first.Verified.Memo(func(v *jws.Verified) any { builds++; return v.Token.Subject }); got != "alice" {
			t.Fatal(got)
		}
	}
	if builds != 1 {
		t.Errorf("built %d times", builds)
	}

	s.now = s.now.Add(10 * time.Minute)
	if got := a.Authenticate(r); got.Code != 401 || !strings.Contains(got.Reason, "expired") {
		t.Errorf("after its expiry: %d %s", got.Code, got.Reason)
	}
	s.now = now().Add(-time.Hour)
	if got := a.Authenticate(r); got.Code != 401 || !strings.Contains(got.Reason, "not yet valid") {
		t.Errorf("after the clock stepped back: %d %s", got.Code, got.Reason)
	}
	s.now = now()
	s.sets["jwks:https://one.test/keys"] = keySet(t, s.two)
	if got := a.Authenticate(r); got.Code != 401 || !strings.Contains(got.Reason, "unknown key") {
		t.Errorf("after its key was withdrawn: %d %s", got.Code, got.Reason)
	}
	s.sets["jwks:https://one.test/keys"] = nil
	if got := a.Authenticate(r); got.Code != 401 || !strings.Contains(got.Reason, "no keys") {
		t.Errorf("after the keys went away: %d %s", got.Code, got.Reason)
	}
	s.sets["jwks:https://one.test/keys"] = keySet(t, s.one, s.two)
	if got := a.Authenticate(r); got.Code != 0 {
		t.Errorf("after its key came back: %d %s", got.Code, got.Reason)
	}
}

// TestBuffersAreReused: what is remembered must not alias the caller's buffer.
func TestBuffersAreReused(t *testing.T) {
	s := newScene(t)
	a := s.authenticator(t, s.rule1())
	good, other := s.token(t, s.one, nil), s.token(t, s.one, jwstest.Claims{"sub": "bob"})
	buffer := []byte("Bearer " + good)
	a.Authenticate(get("authorization", string(buffer)))
	copy(buffer, strings.Repeat("x", len(buffer)))
	if got := a.Authenticate(get("authorization", "Bearer "+good)); got.Code != 0 || got.Verified.Token.Subject != "alice" {
		t.Fatalf("%+v", got)
	}
	if got := a.Authenticate(get("authorization", "Bearer "+other)); got.Verified.Token.Subject != "bob" {
		t.Fatalf("%+v", got)
	}
}

func TestBadRules(t *testing.T) {
	for name, tt := range map[string]struct {
		rules []policy.JWTRule
		text  string
	}{
		"both keys": {[]policy.JWTRule{{Issuer: "x", Jwks: "{}", JwksURI: "https://x"}}, "JWT rule 0: both jwks and jwksUri are set"},
		"nothing":   {[]policy.JWTRule{{}}, "JWT rule 0: neither issuer nor keys are set"},
		"very many": {make([]policy.JWTRule, 600), "600 JWT rules select one workload"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := jws.NewAuthenticator(tt.rules, nil, jws.AuthenticatorConfig{}); err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("error %v, want %q", err, tt.text)
			}
		})
	}
	var none *jws.Authenticator
	if got := none.Authenticate(get("authorization", "Bearer x")); got.Code != 0 {
		t.Error("a nil authenticator has rules")
	}
}

// TestConcurrent runs tokens, key changes and evictions beside each other.
func TestConcurrent(t *testing.T) {
	s := newScene(t)
	var set atomic.Pointer[jws.KeySet]
	set.Store(keySet(t, s.one))
	a, err := jws.NewAuthenticator([]policy.JWTRule{s.rule1()}, func(string) *jws.KeySet { return set.Load() },
		jws.AuthenticatorConfig{Now: now, CacheSize: 16})
	if err != nil {
		t.Fatal(err)
	}
	var tokens []string
	for i := range 40 {
		tokens = append(tokens, s.token(t, s.one, jwstest.Claims{"sub": fmt.Sprint(i)}))
	}
	other := keySet(t, s.one, s.two)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 200 {
				n := (i*7 + g) % len(tokens)
				got := a.Authenticate(get("authorization", "Bearer "+tokens[n]))
				if got.Code != 0 || got.Verified.Token.Subject != fmt.Sprint(n) {
					t.Errorf("token %d: %d %s", n, got.Code, got.Reason)
				}
				got.Verified.Memo(func(*jws.Verified) any { return n })
				if i == 100 {
					set.Store(other)
				}
			}
		})
	}
	wg.Wait()
}

func TestHitDoesNotAllocate(t *testing.T) {
	s := newScene(t)
	rule := s.rule1()
	rule.OutputPayloadToHeader = "x-payload"
	a := s.authenticator(t, rule)
	r := get("authorization", "Bearer "+s.token(t, s.one, nil))
	a.Authenticate(r)
	if n := testing.AllocsPerRun(100, func() { a.Authenticate(r) }); n > 1 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAuthenticateHit(b *testing.B) {
	s := newScene(b)
	a := s.authenticator(b, s.rule1())
	r := get("authorization", "Bearer "+s.token(b, s.one, nil))
	b.ReportAllocs()
	for b.Loop() {
		if got := a.Authenticate(r); got.Code != 0 {
			b.Fatal(got.Reason)
		}
	}
}
