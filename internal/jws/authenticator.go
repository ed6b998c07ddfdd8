package jws

import (
	"time"

	"castellan.dev/api/policy"
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

// Authenticator applies the rules of RequestAuthentication (rules/authz.md 25–30)
// to requests. It is safe for concurrent use.
type Authenticator struct{}

// NewAuthenticator compiles rules. keys returns the set of a source by
// SourceName; nil from it means unavailable, and then tokens are refused while
// requests without one pass. It is called for every request with a token, so
// that a new set counts at once.
func NewAuthenticator(rules []policy.JWTRule, keys func(source string) *KeySet, cfg AuthenticatorConfig) (*Authenticator, error) {
	return &Authenticator{}, nil
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

// Verified is a verified end-user token with what follows from it. It is shared
// by every request that presents the token.
type Verified struct {
	Token          *Token
	SpaceDelimited []string
}

// Memo returns what build made of v the first time it was called: a place to
// keep what is derived from a token, such as *authz.Claims.
func (v *Verified) Memo(build func(*Verified) any) any { return build(v) }

// Authenticate judges a request. A nil Authenticator has no rules.
func (a *Authenticator) Authenticate(r RequestView) Result { return Result{} }

// StripQuery returns rawQuery without the given parameters.
func StripQuery(rawQuery string, params []string) string { return rawQuery }

// StripCookie returns a Cookie header's value without the given cookies, "" if none is left.
func StripCookie(value string, names []string) string { return value }
