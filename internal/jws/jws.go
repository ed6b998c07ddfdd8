// Package jws verifies signed tokens (JWTs in JWS compact form) and finds the
// keys they are signed with. It serves the attestation of workloads, the
// request authentication of proxies and `authz can-i` alike.
//
// It refuses before anything else what is over 8 KiB, then what is not exactly
// three parts of strict base64url, then every algorithm outside RS, PS and ES
// with 256, 384 and 512. It takes keys from a KeySet only: the header members
// jku, jwk, x5u and x5c are never read, "crit" is refused whole because no
// extension is known here, and duplicate members, non-integer times and missing
// expiry are errors. A token is either verified or not usable: its claims cannot
// be reached before.
//
// It assumes that whoever configured a key source vouches for its keys, and that
// the clock is right: exp has no leeway, iat and nbf have Leeway.
package jws

import (
	"errors"
	"time"
)

// MaxSize is the length in bytes past which a token is refused unread.
const MaxSize = 8 << 10

// Leeway is how far nbf and iat may lie in the future, for clocks that differ a
// little. Expiry has none: a token that has expired here is expired.
const Leeway = 5 * time.Second

// Reasons a token is refused; test with errors.Is. The text of an error is for
// logs, never for peers.
var (
	ErrTooLarge    = errors.New("token too large")
	ErrMalformed   = errors.New("token malformed")
	ErrAlgorithm   = errors.New("token algorithm not allowed")
	ErrUnavailable = errors.New("no keys to verify the token with")
	ErrUnknownKey  = errors.New("token signed by an unknown key")
	ErrSignature   = errors.New("token signature wrong")
	ErrIssuer      = errors.New("token issuer not accepted")
	ErrAudience    = errors.New("token audience not accepted")
	ErrExpired     = errors.New("token expired")
	ErrNotYetValid = errors.New("token not yet valid")
)

// Expect says what a token must be besides well signed.
type Expect struct {
	// Issuer must equal iss; empty accepts any (rule 28 of docs/conformance.md: a rule without issuer).
	Issuer string
	// Audiences, of which aud must hold one; empty accepts any (authz 29).
	Audiences []string
}

// Token is a verified token.
type Token struct {
	Issuer  string
	Subject string
	// Audience is aud as a list, whichever form it had.
	Audience []string
	Expiry   time.Time
	// NotBefore is zero when there is none.
	NotBefore time.Time
	KeyID     string
	// Claims is the whole payload. Numbers are json.Number.
	Claims map[string]any
	// EncodedPayload is the payload as it stood in the token, base64url.
	EncodedPayload string
}

// Verify parses and verifies a token in one step.
func Verify(token string, keys *KeySet, want Expect, now time.Time) (*Token, error) {
	u, err := Parse(token)
	if err != nil {
		return nil, err
	}
	return u.Verify(keys, want, now)
}
