package jws

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"castellan.dev/api/policy"
)

const (
	// maxRules bounds what one workload's policies pool (authz 25).
	maxRules = 512
	// maxPresented bounds how many tokens one request may bring: each can cost a
	// signature verification.
	maxPresented = 8

	defaultCacheSize = 1024
)

// SourceName names where a rule's keys come from: "" for inline keys, else
// "jwks:<uri>" or "oidc:<issuer>", which is the name of the castellan.v1.Jwks resource.
func SourceName(rule policy.JWTRule) string {
	switch {
	case rule.Jwks != "":
		return ""
	case rule.JwksURI != "":
		return "jwks:" + rule.JwksURI
	default:
		return "oidc:" + rule.Issuer
	}
}

// AuthenticatorConfig configures an Authenticator.
type AuthenticatorConfig struct {
	Now func() time.Time
	// CacheSize bounds the remembered tokens; default 1024.
	CacheSize int
}

// Authenticator applies the rules of RequestAuthentication (25–30 of docs/conformance.md)
// to requests. It is safe for concurrent use.
type Authenticator struct {
	rules  []jwtRule
	sites  []site
	remove []string
	keys   func(source string) *KeySet
	now    func() time.Time
	cache  *cache
}

// jwtRule is one compiled rule.
type jwtRule struct {
	expect         Expect
	source         string
	inline         *KeySet // when source is ""
	payloadHeader  string
	claimHeaders   []claimHeader
	spaceDelimited []string
	forward        bool
}

type claimHeader struct {
	name string
	path []string
}

// NewAuthenticator compiles rules. keys returns the set of a source by
// SourceName; nil from it means unavailable, and then tokens are refused while
// requests without one pass. It is called for every request with a token, so
// that a new set counts at once.
//
// Inline keys that cannot be read refuse the tokens of their rule and nothing
// else. An error means that the rules cannot be held at all: deny everything.
func NewAuthenticator(rules []policy.JWTRule, keys func(source string) *KeySet, cfg AuthenticatorConfig) (*Authenticator, error) {
	if len(rules) > maxRules {
		return nil, fmt.Errorf("jws: %d JWT rules select one workload, %d are allowed", len(rules), maxRules)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.CacheSize <= 0 {
		cfg.CacheSize = defaultCacheSize
	}
	if keys == nil {
		keys = func(string) *KeySet { return nil }
	}
	a := &Authenticator{keys: keys, now: cfg.Now, cache: newCache(cfg.CacheSize)}
	for i, r := range rules {
		rule, err := compileRule(r)
		if err != nil {
			return nil, fmt.Errorf("jws: JWT rule %d: %w", i, err)
		}
		a.rules = append(a.rules, rule)
		a.remove = append(a.remove, rule.outputs()...)
		a.addSites(r, i)
	}
	slices.Sort(a.remove)
	a.remove = slices.Compact(a.remove)
	sortSites(a.sites)
	return a, nil
}

func compileRule(r policy.JWTRule) (jwtRule, error) {
	if r.Jwks != "" && r.JwksURI != "" {
		return jwtRule{}, errors.New("both jwks and jwksUri are set")
	}
	if r.Issuer == "" && r.JwksURI == "" && r.Jwks == "" {
		return jwtRule{}, errors.New("neither issuer nor keys are set")
	}
	rule := jwtRule{
		expect:         Expect{Issuer: r.Issuer, Audiences: slices.Clone(r.Audiences)},
		source:         SourceName(r),
		payloadHeader:  strings.ToLower(r.OutputPayloadToHeader),
		spaceDelimited: slices.Clone(r.SpaceDelimitedClaims),
		forward:        r.ForwardOriginalToken,
	}
	if rule.source == "" {
		// Fails closed: without keys every token of this rule is refused.
		rule.inline, _ = ParseJWKS([]byte(r.Jwks))
	}
	for _, c := range r.OutputClaimToHeaders {
		rule.claimHeaders = append(rule.claimHeaders, claimHeader{name: strings.ToLower(c.Header), path: strings.Split(c.Claim, ".")})
	}
	return rule, nil
}

// outputs are the headers the rule sets, which nobody else may.
func (r *jwtRule) outputs() []string {
	var names []string
	if r.payloadHeader != "" {
		names = append(names, r.payloadHeader)
	}
	for _, c := range r.claimHeaders {
		names = append(names, c.name)
	}
	return names
}

// RequestView is what an Authenticator reads of a request.
type RequestView interface {
	// Values returns a header's values by lower-case name. They may alias
	// buffers that live as long as the request.
	Values(name string) []string
	RawQuery() string
	Method() string
}

// HeaderValue is a header to set.
type HeaderValue struct{ Name, Value string }

// Result says what to do with a request. Its slices are shared: do not change them.
type Result struct {
	// Code is 0 (go on), 401 or 403.
	Code int
	// Reason is why Code is not 0, for logs.
	Reason string
	// Verified is the token that counts, nil when none was presented. When there
	// are several (all verified), it is the one of the first rule.
	Verified *Verified
	// RemoveHeaders are claim headers, lower-case, that only we may set; remove
	// them from every request, whatever Code is, before SetHeaders.
	RemoveHeaders []string
	SetHeaders    []HeaderValue
	// StripHeaders, StripParams and StripCookies carried tokens that are not forwarded.
	StripHeaders []string
	StripParams  []string
	StripCookies []string
}

// Authenticate judges a request. A nil Authenticator has no rules.
//
// Every token presented where a rule reads must verify under one of the rules
// that read there (design decision on authz 27): a valid token does not excuse an
// invalid one beside it.
func (a *Authenticator) Authenticate(r RequestView) Result {
	if a == nil {
		return Result{}
	}
	e := examination{a: a, result: Result{RemoveHeaders: a.remove}}
	if len(a.rules) == 0 || preflight(r) {
		return e.result
	}
	for i := range a.sites {
		s := &a.sites[i]
		ok := true
		switch s.kind {
		case inHeader:
			ok = e.header(s, r.Values(s.name))
		case inParam:
			ok = e.params(s, r.RawQuery())
		case inCookie:
			ok = e.cookies(s, r.Values("cookie"))
		}
		if !ok {
			return e.result
		}
	}
	if v := e.result.Verified; v != nil {
		e.result.SetHeaders = v.headers
	}
	return e.result
}

// preflight holds for a valid CORS preflight request (authz 30), which browsers
// send without credentials.
func preflight(r RequestView) bool {
	return r.Method() == "OPTIONS" && present(r.Values("origin")) && present(r.Values("access-control-request-method"))
}

func present(values []string) bool { return len(values) > 0 && values[0] != "" }

// examination is the state of judging one request.
type examination struct {
	a         *Authenticator
	result    Result
	presented int
}

// refuse ends the examination: nothing found so far counts.
func (e *examination) refuse(code int, reason string) bool {
	e.result = Result{Code: code, Reason: reason, RemoveHeaders: e.a.remove}
	return false
}

// token judges one token found at s.
func (e *examination) token(rules []int, token string) (*Verified, bool) {
	if e.presented++; e.presented > maxPresented {
		return nil, e.refuse(401, fmt.Sprintf("more than %d tokens in one request", maxPresented))
	}
	v, err := e.a.verify(rules, token)
	if err != nil {
		code := 401
		if errors.Is(err, ErrAudience) {
			code = 403 // authz 25
		}
		return nil, e.refuse(code, err.Error())
	}
	if best := e.result.Verified; best == nil || v.rule < best.rule {
		e.result.Verified = v
	}
	return v, true
}

// verify returns what is known of a token under one of rules. It is remembered
// by the token's bytes and the key set's identity; times are checked every time.
func (a *Authenticator) verify(rules []int, token string) (*Verified, error) {
	now := a.now()
	if v := a.cache.get(token); v != nil && slices.Contains(rules, v.rule) && sameKeys(v.keys, a.keySet(v.rule)) {
		if err := v.Token.CheckTimes(now); err != nil {
			return nil, err
		}
		return v, nil
	}
	if len(token) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, %d are allowed", ErrTooLarge, len(token), MaxSize)
	}
	// The caller's string may alias a buffer that the next request reuses.
	token = strings.Clone(token)
	v, err := a.verifyNew(rules, token, now)
	if err != nil {
		return nil, err
	}
	a.cache.put(token, v)
	return v, nil
}

// sameKeys holds while the set a token was verified with is the one in force.
func sameKeys(then, current *KeySet) bool {
	return then == current || current != nil && then.Version() == current.Version()
}

// verifyNew tries every rule of the token's issuer. An error of audience is
// reported only where nothing worse and nothing better came of another rule.
func (a *Authenticator) verifyNew(rules []int, token string, now time.Time) (*Verified, error) {
	u, err := Parse(token)
	if err != nil {
		return nil, err
	}
	failure := fmt.Errorf("%w: %q", ErrIssuer, clip(u.Issuer()))
	for _, i := range rules {
		rule := &a.rules[i]
		keys := a.keySet(i)
		t, err := u.Verify(keys, rule.expect, now)
		switch {
		case err == nil:
			return &Verified{Token: t, SpaceDelimited: rule.spaceDelimited, rule: i, keys: keys, headers: rule.set(t)}, nil
		case errors.Is(err, ErrIssuer):
		case !errors.Is(failure, ErrAudience):
			failure = err
		}
	}
	return nil, failure
}

func (a *Authenticator) keySet(rule int) *KeySet {
	r := &a.rules[rule]
	if r.source == "" {
		return r.inline
	}
	return a.keys(r.source)
}
