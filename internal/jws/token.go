package jws

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Unverified is a well-formed token of which nothing is known to be true.
type Unverified struct {
	signed    string // header.payload, what the signature is over
	payload   string // base64url
	signature []byte
	alg       algorithm
	keyID     string
	claims    map[string]any
	issuer    string
}

// Parse checks a token's form: size, three parts, header, payload. The algorithm
// is judged before anything after the header is looked at.
func Parse(token string) (*Unverified, error) {
	if len(token) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, %d are allowed", ErrTooLarge, len(token), MaxSize)
	}
	parts := strings.Count(token, ".") + 1
	if parts != 3 {
		// Five would be an encrypted token (JWE), which nobody here can read.
		return nil, fmt.Errorf("%w: %d parts, 3 are wanted", ErrMalformed, parts)
	}
	header, rest, _ := strings.Cut(token, ".")
	payload, signature, _ := strings.Cut(rest, ".")

	u := &Unverified{signed: token[:len(header)+1+len(payload)], payload: payload}
	if err := u.readHeader(header); err != nil {
		return nil, err
	}
	var err error
	if u.signature, err = decode(signature); err != nil {
		return nil, fmt.Errorf("%w: signature: %w", ErrMalformed, err)
	}
	if len(u.signature) == 0 {
		return nil, fmt.Errorf("%w: no signature", ErrMalformed)
	}
	raw, err := decode(payload)
	if err != nil {
		return nil, fmt.Errorf("%w: payload: %w", ErrMalformed, err)
	}
	if u.claims, err = parseObject(raw); err != nil {
		return nil, fmt.Errorf("%w: payload: %w", ErrMalformed, err)
	}
	if u.issuer, err = stringMember(u.claims, "iss"); err != nil {
		return nil, err
	}
	return u, nil
}

// readHeader reads alg, typ and kid. jku, jwk, x5u and x5c are never looked at.
func (u *Unverified) readHeader(encoded string) error {
	raw, err := decode(encoded)
	if err != nil {
		return fmt.Errorf("%w: header: %w", ErrMalformed, err)
	}
	header, err := parseObject(raw)
	if err != nil {
		return fmt.Errorf("%w: header: %w", ErrMalformed, err)
	}
	name, _ := header["alg"].(string)
	alg, ok := algorithmNamed(name)
	if !ok {
		return fmt.Errorf("%w: %q", ErrAlgorithm, clip(name))
	}
	u.alg = alg
	if _, ok := header["crit"]; ok {
		// RFC 7515 4.1.11: an extension that is not understood must be refused,
		// and none is.
		return fmt.Errorf("%w: header has crit", ErrMalformed)
	}
	if typ, ok := header["typ"]; ok {
		if s, _ := typ.(string); !knownType(s) {
			return fmt.Errorf("%w: header typ %q, want JWT, JOSE or at+jwt", ErrMalformed, clip(s))
		}
	}
	u.keyID, err = stringMember(header, "kid")
	return err
}

// knownType keeps apart tokens made for another purpose (RFC 8725 3.11), such as
// logout+jwt.
func knownType(typ string) bool {
	typ = strings.TrimPrefix(strings.ToLower(typ), "application/")
	return typ == "jwt" || typ == "jose" || typ == "at+jwt"
}

// Issuer returns the iss that the token claims, to choose the keys by; "" when it has none.
func (u *Unverified) Issuer() string { return u.issuer }

// Verify checks, in this order, issuer, signature, times and audience, and
// returns the token: so ErrAudience says that everything else held.
func (u *Unverified) Verify(keys *KeySet, want Expect, now time.Time) (*Token, error) {
	if want.Issuer != "" && u.issuer != want.Issuer {
		return nil, fmt.Errorf("%w: %q", ErrIssuer, clip(u.issuer))
	}
	if err := u.verifySignature(keys); err != nil {
		return nil, err
	}
	t := &Token{Issuer: u.issuer, KeyID: u.keyID, Claims: u.claims, EncodedPayload: u.payload}
	var err error
	if t.Subject, err = stringMember(u.claims, "sub"); err != nil {
		return nil, err
	}
	if t.Audience, err = audience(u.claims["aud"]); err != nil {
		return nil, err
	}
	if err := t.readTimes(); err != nil {
		return nil, err
	}
	if err := t.CheckTimes(now); err != nil {
		return nil, err
	}
	if len(want.Audiences) > 0 && !overlap(t.Audience, want.Audiences) {
		return nil, fmt.Errorf("%w: token is for %s", ErrAudience, clip(fmt.Sprintf("%q", t.Audience)))
	}
	return t, nil
}

// verifySignature tries the keys that the token may be signed by.
func (u *Unverified) verifySignature(keys *KeySet) error {
	if keys == nil {
		return ErrUnavailable
	}
	candidates := keys.candidates(u.keyID)
	if len(candidates) == 0 {
		return fmt.Errorf("%w: kid %q, %d keys are known", ErrUnknownKey, clip(u.keyID), keys.Len())
	}
	fits := false
	for i := range candidates {
		if !candidates[i].fits(u.alg) {
			continue
		}
		fits = true
		if candidates[i].verify(u.alg, u.signed, u.signature) {
			return nil
		}
	}
	if !fits {
		return fmt.Errorf("%w: %s is not what the key %q is for", ErrAlgorithm, u.alg.name, clip(u.keyID))
	}
	return ErrSignature
}

// readTimes reads exp, nbf and iat; exp is always required.
func (t *Token) readTimes() error {
	exp, ok, err := numericDate(t.Claims, "exp")
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: no exp", ErrMalformed)
	}
	t.Expiry = exp
	for _, name := range []string{"nbf", "iat"} {
		at, ok, err := numericDate(t.Claims, name)
		if err != nil {
			return err
		}
		if ok && at.After(t.NotBefore) {
			t.NotBefore = at
		}
	}
	return nil
}

// CheckTimes says whether the token is valid at now; for tokens that are kept.
func (t *Token) CheckTimes(now time.Time) error {
	if !now.Before(t.Expiry) {
		return fmt.Errorf("%w: at %s", ErrExpired, t.Expiry.UTC().Format(time.RFC3339))
	}
	if t.NotBefore.After(now.Add(Leeway)) {
		return fmt.Errorf("%w: before %s; are the clocks right?", ErrNotYetValid, t.NotBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

// maxNumericDate is the last second of the year 9999, past which times cannot be written.
const maxNumericDate = 253402300799

// numericDate reads whole seconds. RFC 7519 would allow fractions; they are
// refused, as are exponents and what does not fit: no issuer needs them, and
// readers differ on them.
func numericDate(claims map[string]any, name string) (time.Time, bool, error) {
	v, ok := claims[name]
	if !ok {
		return time.Time{}, false, nil
	}
	n, isNumber := v.(json.Number)
	seconds, err := strconv.ParseInt(string(n), 10, 64)
	if !isNumber || err != nil || seconds < 0 || seconds > maxNumericDate {
		return time.Time{}, false, fmt.Errorf("%w: %s is not a time in whole seconds", ErrMalformed, name)
	}
	return time.Unix(seconds, 0), true, nil
}

// maxAudiences bounds aud.
const maxAudiences = 64

// audience reads aud: a string or an array of strings (RFC 7519 4.1.3).
func audience(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		if len(v) > maxAudiences {
			return nil, fmt.Errorf("%w: %d audiences, %d are allowed", ErrMalformed, len(v), maxAudiences)
		}
		list := make([]string, len(v))
		for i := range v {
			s, ok := v[i].(string)
			if !ok {
				return nil, fmt.Errorf("%w: aud holds something else than strings", ErrMalformed)
			}
			list[i] = s
		}
		return list, nil
	}
	return nil, fmt.Errorf("%w: aud is neither a string nor a list", ErrMalformed)
}

func overlap(a, b []string) bool {
	return slices.ContainsFunc(a, func(s string) bool { return slices.Contains(b, s) })
}

// stringMember reads an optional member that must be a string.
func stringMember(m map[string]any, name string) (string, error) {
	v, ok := m[name]
	if !ok {
		return "", nil
	}
	s, ok := v.(string)
	if !ok {
		return "", fmt.Errorf("%w: %s is not a string", ErrMalformed, name)
	}
	return s, nil
}

// decode reads base64url without padding, strictly: unlike encoding/base64 it
// refuses line breaks.
func decode(s string) ([]byte, error) {
	if i := strings.IndexAny(s, "\r\n"); i >= 0 {
		return nil, base64.CorruptInputError(i)
	}
	return base64.RawURLEncoding.Strict().DecodeString(s)
}

// clip keeps what a peer wrote short in our logs.
func clip(s string) string {
	const limit = 256
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "..."
}
