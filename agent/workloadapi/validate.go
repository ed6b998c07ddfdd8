package workloadapi

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
)

// maxToken bounds a token before anything parses it.
const maxToken = 8 << 10

// invalidError is why a JWT-SVID is refused: text is one of a few constants that
// the caller may see, cause is for the log.
type invalidError struct {
	text  string
	cause error
}

func (e *invalidError) Error() string {
	if e.cause == nil {
		return e.text
	}
	return fmt.Sprintf("%s: %v", e.text, e.cause)
}

func (e *invalidError) Unwrap() error { return e.cause }

func invalid(text string, cause error) error { return &invalidError{text: text, cause: cause} }

// validate judges a token by the JWT-SVID specification with the bundle of its
// subject's trust domain, and no other. Times are taken without leeway.
func validate(token, audience string, trust *svid.Trust, now time.Time) (spiffeid.ID, map[string]any, error) {
	none := spiffeid.ID{}
	if len(token) > maxToken {
		return none, nil, invalid("token is too long", nil)
	}
	parsed, err := parse(token)
	if err != nil {
		return none, nil, err
	}
	// Who it claims to be decides which bundle judges it; nothing else of it is
	// believed before the signature has been verified.
	var unverified struct {
		Subject string `json:"sub"`
	}
	if err := parsed.UnsafeClaimsWithoutVerification(&unverified); err != nil {
		return none, nil, invalid("token is malformed", err)
	}
	id, err := spiffeid.FromString(unverified.Subject)
	if err != nil {
		return none, nil, invalid("subject is not a SPIFFE ID", err)
	}
	// An unknown trust domain and an empty bundle both end here: distrusted.
	bundle, _ := trust.Bundle(id.TrustDomain())
	key, ok := bundle.JWTKeys[parsed.Headers[0].KeyID]
	if !ok {
		return none, nil, invalid("no key of the trust domain has signed it", fmt.Errorf("trust domain %q, key id %q", id.TrustDomain().Name(), parsed.Headers[0].KeyID))
	}
	claims := map[string]any{}
	if err := parsed.Claims(key.Key, &claims); err != nil {
		return none, nil, invalid("signature does not verify", err)
	}
	if err := checkClaims(claims, audience, now); err != nil {
		return none, nil, err
	}
	return id, claims, nil
}

// parse accepts a compact JWS with an algorithm of the specification, and no
// header but alg, kid and typ: a token that wants more to be understood (crit),
// or brings its own key (jwk, jku, x5c), is refused.
func parse(token string) (*jwt.JSONWebToken, error) {
	parsed, err := jwt.ParseSigned(token, caclient.SignatureAlgorithms())
	if err != nil {
		return nil, invalid("token is malformed or of an algorithm that is not allowed", err)
	}
	if len(parsed.Headers) != 1 {
		return nil, invalid("token is malformed", fmt.Errorf("%d signatures", len(parsed.Headers)))
	}
	// The library does not show every parameter, so the header is read once more.
	raw, err := base64.RawURLEncoding.DecodeString(token[:strings.IndexByte(token, '.')])
	if err != nil {
		return nil, invalid("token is malformed", err)
	}
	header := map[string]any{}
	if err := json.Unmarshal(raw, &header); err != nil {
		return nil, invalid("token is malformed", err)
	}
	for name := range header {
		if name != "alg" && name != "kid" && name != "typ" {
			return nil, invalid("header has parameters that are not allowed", fmt.Errorf("%q", name))
		}
	}
	if typ, ok := header["typ"]; ok && typ != "JWT" && typ != "JOSE" {
		return nil, invalid("header typ is not allowed", nil)
	}
	if parsed.Headers[0].KeyID == "" {
		return nil, invalid("header has no key id", nil)
	}
	return parsed, nil
}

// checkClaims wants aud to hold the audience, exp to be ahead, and nbf, where
// it is given, to be past.
func checkClaims(claims map[string]any, audience string, now time.Time) error {
	if !slices.Contains(audiences(claims["aud"]), audience) {
		return invalid("audience is another", nil)
	}
	exp, ok := claims["exp"]
	if !ok {
		return invalid("token has no expiry", nil)
	}
	end, ok := seconds(exp)
	if !ok {
		return invalid("token is malformed", fmt.Errorf("exp is %T", exp))
	}
	at := float64(now.UnixNano()) / float64(time.Second)
	if at >= end {
		return invalid("token is expired", nil)
	}
	for _, name := range []string{"nbf", "iat"} {
		v, ok := claims[name]
		if !ok {
			continue
		}
		// iat is a date, not a condition; what is no date at all is refused.
		start, ok := seconds(v)
		if !ok {
			return invalid("token is malformed", fmt.Errorf("%s is %T", name, v))
		}
		if name == "nbf" && at < start {
			return invalid("token is not valid yet", nil)
		}
	}
	return nil
}

func audiences(v any) []string {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		out := make([]string, 0, len(v))
		for _, a := range v {
			s, ok := a.(string)
			if !ok {
				return nil // aud of anything but strings names nobody
			}
			out = append(out, s)
		}
		return out
	}
	return nil
}

// seconds reads a NumericDate up to the year 9999.
func seconds(v any) (float64, bool) {
	var f float64
	switch v := v.(type) {
	case float64:
		f = v
	case json.Number:
		var err error
		if f, err = v.Float64(); err != nil {
			return 0, false
		}
	default:
		return 0, false
	}
	return f, f >= 0 && f <= 253402300799
}
