package authz

import (
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"time"

	"castellan.dev/api/policy"
)

// Bounds of a key fetch's timeout.
const (
	minJWKSTimeout = time.Millisecond
	maxJWKSTimeout = time.Minute
)

// requestAuthentication is rules 25 to 30 and 35.
func (v *validation) requestAuthentication(r *policy.RequestAuthentication) {
	v.selection(r.Selector, r.TargetRef, r.TargetRefs)
	switch {
	case len(r.JWTRules) == 0:
		v.warn("spec.jwtRules", "", "without rules no token is looked at, so no request has a request principal")
	case len(r.JWTRules) > maxJWTRules:
		v.refuse("spec.jwtRules", "", "%d rules, at most %d are allowed", len(r.JWTRules), maxJWTRules)
		return
	}
	if field, n := excessJWT(r); field != "" {
		v.tooMany(field, n)
		return
	}
	issuers := make(map[string]int)
	for i, rule := range r.JWTRules {
		field := itemPath("spec.jwtRules", i)
		v.jwtRule(field, rule)
		if first, twice := issuers[rule.Issuer]; twice && rule.Issuer != "" {
			v.warn(field+".issuer", rule.Issuer, "also the issuer of rule %d: a token of it must satisfy both or the first that accepts it decides its principal", first)
		} else {
			issuers[rule.Issuer] = i
		}
	}
}

func (v *validation) jwtRule(field string, r policy.JWTRule) {
	if !v.short(field+".issuer", r.Issuer) {
		return
	}
	v.issuer(field, r)
	if len(r.Audiences) == 0 {
		v.warn(field+".audiences", "", "without audiences a token meant for any other service of this issuer is accepted")
	}
	v.values(field+".audiences", r.Audiences, noCheck)
	v.keys(field, r)
	for i, h := range r.FromHeaders {
		if name := itemPath(field+".fromHeaders", i) + ".name"; !isToken(h.Name) {
			v.refuse(name, h.Name, "not the name of a header")
		}
	}
	v.values(field+".fromParams", r.FromParams, noCheck)
	v.values(field+".fromCookies", r.FromCookies, checkCookie)
	v.outputs(field, r)
	v.timeout(field+".timeout", r.Timeout)
	if len(r.SpaceDelimitedClaims) > maxSpaceDelimited {
		v.refuse(field+".spaceDelimitedClaims", "", "%d claims, at most %d are allowed", len(r.SpaceDelimitedClaims), maxSpaceDelimited)
	}
	v.values(field+".spaceDelimitedClaims", r.SpaceDelimitedClaims, noCheck)
}

func noCheck(*validation, string, string) {}

func checkCookie(v *validation, field, value string) {
	if !isToken(value) {
		v.refuse(field, value, "not the name of a cookie")
	}
}

// issuer is rule 28.
func (v *validation) issuer(field string, r policy.JWTRule) {
	switch {
	case r.Issuer == "" && r.JwksURI == "":
		v.refuse(field+".issuer", "", "required unless jwksUri says whose keys are meant")
	case r.Issuer == "":
		v.warn(field+".issuer", "", "without an issuer every token that these keys signed is accepted, whoever it says issued it")
	case r.JwksURI == "" && r.Jwks == "":
		if reason := v.urlFault(r.Issuer); reason != "" {
			v.warn(field+".issuer", r.Issuer, "with neither jwks nor jwksUri its keys are looked up by OpenID discovery, and %s: every token will be refused", reason)
		}
	}
}

func (v *validation) keys(field string, r policy.JWTRule) {
	if r.Jwks != "" && r.JwksURI != "" {
		v.refuse(field, "", "only one of jwks and jwksUri may be given")
	}
	if r.JwksURI != "" {
		v.jwksURI(field+".jwksUri", r.JwksURI)
	}
	if r.Jwks != "" {
		// The value is never repeated: what was pasted may be a private key.
		if reason := jwksFault(r.Jwks); reason != "" {
			v.refuse(field+".jwks", "", "%s", reason)
		}
	}
}

func (v *validation) jwksURI(field, uri string) {
	u, err := url.Parse(uri)
	switch {
	case len(uri) > maxJwksURI:
		v.refuse(field, uri, "%d bytes long, at most %d are allowed", len(uri), maxJwksURI)
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Opaque != "":
		v.refuse(field, uri, "not a URL; allowed: https://HOST/PATH, or http:// where mesh.jwks.allow has \"http\"")
	case u.User != nil:
		v.refuse(field, u.Redacted(), "must not hold a user name or password")
	case v.urlFault(uri) != "":
		v.warn(field, uri, "%s: the keys will not be fetched and every token will be refused", v.urlFault(uri))
	}
}

// urlFault says why a key URL would not be fetched, as far as text can tell.
func (v *validation) urlFault(raw string) string {
	u, err := url.Parse(raw)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		return "it is no URL"
	case u.Scheme == "http" && !slices.Contains(v.mesh.JWKS.Allow, "http"):
		return "plain http is refused unless mesh.jwks.allow has \"http\""
	default:
		return ""
	}
}

// jwksFault checks an inline key set, with constant text only.
func jwksFault(text string) string {
	if len(text) > maxJwks {
		return "key set is too large; at most 64 KiB are allowed"
	}
	var set struct {
		Keys []struct {
			Type    string          `json:"kty"`
			N       string          `json:"n"`
			X       string          `json:"x"`
			Private json.RawMessage `json:"d"`
			Secret  json.RawMessage `json:"k"`
		} `json:"keys"`
	}
	if err := json.Unmarshal([]byte(text), &set); err != nil {
		return `not a JSON Web Key Set; allowed: {"keys": [...]}`
	}
	var usable int
	for _, k := range set.Keys {
		switch {
		case k.Private != nil || k.Secret != nil:
			return "holds a private or symmetric key; give public keys only, and replace that key, since it has been disclosed"
		case k.Type == "RSA" && k.N != "", k.Type == "EC" && k.X != "":
			usable++
		}
	}
	if usable == 0 {
		return "key set has no usable key; allowed: RSA and EC public keys"
	}
	return ""
}

// reservedHeaders are those a claim must never be written to: they frame the
// message, or the proxy's own word stands in them.
var reservedHeaders = [...]string{
	"connection", "content-length", "expect", "host", "keep-alive", "proxy-connection", "te", "trailer",
	"transfer-encoding", "upgrade", "x-forwarded-client-cert", "x-forwarded-for",
}

func (v *validation) outputs(field string, r policy.JWTRule) {
	if r.OutputPayloadToHeader != "" {
		v.outputHeader(field+".outputPayloadToHeader", r.OutputPayloadToHeader)
	}
	seen := make(map[string]bool)
	for i, c := range r.OutputClaimToHeaders {
		item := itemPath(field+".outputClaimToHeaders", i)
		if c.Claim == "" {
			v.refuse(item+".claim", "", "required")
		}
		v.outputHeader(item+".header", c.Header)
		name := strings.ToLower(c.Header)
		if seen[name] {
			v.refuse(item+".header", c.Header, "given twice; each claim needs a header of its own")
		}
		seen[name] = true
	}
}

func (v *validation) outputHeader(field, name string) {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
	switch {
	case name == "" || strings.Trim(name, letters) != "":
		v.refuse(field, name, "not the name of a header; allowed: letters, digits, - and _")
	case slices.Contains(reservedHeaders[:], strings.ToLower(name)):
		v.refuse(field, name, "reserved: no claim may be written to it")
	}
}

func (v *validation) timeout(field, value string) {
	if value == "" {
		return
	}
	d, err := time.ParseDuration(value)
	if err != nil || d < minJWKSTimeout || d > maxJWKSTimeout {
		v.refuse(field, value, "not a timeout; allowed: %s to %s, as in \"5s\"", minJWKSTimeout, maxJWKSTimeout)
	}
}
