package caclient

import (
	"encoding/json"
	"log/slog"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/identity"
)

// SignatureAlgorithms are those a JWT-SVID may have (JWT-SVID 2.1).
func SignatureAlgorithms() []jose.SignatureAlgorithm {
	return []jose.SignatureAlgorithm{
		jose.RS256, jose.RS384, jose.RS512,
		jose.ES256, jose.ES384, jose.ES512,
		jose.PS256, jose.PS384, jose.PS512,
	}
}

// JWT is one JWT-SVID as the server minted it. It hides its token when logged.
type JWT struct {
	ID spiffeid.ID
	// Received and Expires are by this machine's clock and the token's claim.
	Received, Expires time.Time
	token             string
}

// Marshal returns the token itself, for its workload.
func (j *JWT) Marshal() string { return j.token }

// String hides the token.
func (j *JWT) String() string { return "JWT-SVID of " + j.ID.String() }

// GoString hides the token from %#v.
func (j *JWT) GoString() string { return j.String() }

// LogValue hides the token from slog.
func (j *JWT) LogValue() slog.Value { return slog.StringValue(j.String()) }

// checkJWT compares what was minted with what was asked. The signature is not
// checked: the server has just proved itself by TLS, and its newest key may not
// have reached this agent's bundle yet.
func checkJWT(resp *castellanv1.MintJWTResponse, workload identity.Workload, audience []string, now time.Time) (*JWT, error) {
	if n := len(resp.GetToken()); n == 0 || n > maxCredential {
		return nil, badAnswer("JWT-SVID of %d bytes", n)
	}
	if resp.GetSpiffeId() != workload.ID().String() {
		return nil, badAnswer("JWT-SVID is said to name %q, the workload is %q", resp.GetSpiffeId(), workload)
	}
	sig, err := jose.ParseSignedCompact(resp.GetToken(), SignatureAlgorithms())
	if err != nil {
		return nil, badAnswer("JWT-SVID is not a signed token of an algorithm that is allowed")
	}
	var claims struct {
		Subject  string          `json:"sub"`
		Audience json.RawMessage `json:"aud"`
		Expiry   float64         `json:"exp"`
	}
	if json.Unmarshal(sig.UnsafePayloadWithoutVerification(), &claims) != nil {
		return nil, badAnswer("JWT-SVID claims are not the JSON of one")
	}
	got, ok := readAudience(claims.Audience)
	switch {
	case claims.Subject != workload.ID().String():
		return nil, badAnswer("JWT-SVID names %q, the workload is %q", claims.Subject, workload)
	case !ok || !sameSet(got, audience):
		return nil, badAnswer("JWT-SVID is for audience %q, asked was %q", got, audience)
	case claims.Expiry <= float64(now.Unix()) || claims.Expiry > maxUnix:
		return nil, badAnswer("JWT-SVID is expired or has no expiry; are the clocks right?")
	}
	return &JWT{ID: workload.ID(), Received: now, Expires: time.Unix(int64(claims.Expiry), 0), token: resp.GetToken()}, nil
}

// maxUnix is the last second of the year 9999.
const maxUnix = 253402300799

// readAudience takes the two forms of aud: a string, or an array of them.
func readAudience(raw json.RawMessage) ([]string, bool) {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		return []string{one}, true
	}
	var many []string
	return many, json.Unmarshal(raw, &many) == nil
}

func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}
