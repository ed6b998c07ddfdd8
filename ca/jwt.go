package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	algES256     = "ES256"
	maxAudiences = 16
	maxAudience  = 255
	// longestJWT bounds a bearer token where the default TTL is shorter.
	longestJWT = time.Hour
)

// JWTIssuer signs JWT-SVIDs with ES256.
type JWTIssuer struct {
	trustDomain spiffeid.TrustDomain
	issuer      string
	ttl, max    time.Duration
	now         func() time.Time
	metrics     *metrics

	ring *keyRing
	// live are the keys whose public half is in the published bundle.
	live atomic.Pointer[[]jwtKey]
}

// JWTSVID is a signed token.
type JWTSVID struct {
	// Token is a compact JWS. It is a credential: never log it.
	Token     string
	IssuedAt  time.Time
	ExpiresAt time.Time
}

// String hides the token from logs.
func (s JWTSVID) String() string { return "JWT-SVID (hidden), expires " + s.ExpiresAt.String() }

func openJWT(ctx context.Context, cfg Config, blobs Blobs, m *metrics) (*JWTIssuer, error) {
	longest := min(max(cfg.JWTTTL, longestJWT), cfg.MaxLeafTTL)
	ring, err := loadKeyRing(ctx, blobs, cfg.IntermediateTTL, longest, cfg.Now)
	if err != nil {
		return nil, err
	}
	return &JWTIssuer{trustDomain: cfg.TrustDomain, issuer: cfg.JWTIssuer, ttl: cfg.JWTTTL, max: longest, now: cfg.Now, metrics: m, ring: ring}, nil
}

// published lets the keys of b sign, and no others.
func (j *JWTIssuer) published(b *Bundle) {
	var live []jwtKey
	for _, k := range j.ring.keys {
		if _, ok := b.JWTAuthorities[k.id]; ok {
			live = append(live, k)
		}
	}
	j.live.Store(&live)
}

// claims are in the order they are written. There is no nbf: it could only say
// what iat says, and a verifier without leeway whose clock is a second behind
// would refuse the token for it.
type claims struct {
	Issuer   string   `json:"iss,omitempty"`
	Subject  string   `json:"sub"`
	Audience []string `json:"aud"`
	Expires  int64    `json:"exp"`
	IssuedAt int64    `json:"iat"`
}

// Mint signs a token for an identity that has been attested. A TTL of zero or
// less means the default, more than allowed is capped. Errors: *RequestError,
// ErrNoIssuer, ErrLint for an identity of another trust domain, the context's.
func (j *JWTIssuer) Mint(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (*JWTSVID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if id.TrustDomain() != j.trustDomain || id.Path() == "" {
		return nil, fmt.Errorf("%w: %q is no workload of this trust domain", ErrLint, id)
	}
	if err := checkAudience(audience); err != nil {
		return nil, err
	}
	switch {
	case ttl <= 0:
		ttl = j.ttl
	case ttl < minTTL:
		return nil, refuse("ttl", "%v is shorter than %v", ttl, minTTL)
	}
	now := j.now()
	key, ok := j.active(now)
	if !ok {
		return nil, ErrNoIssuer
	}
	issued := now.Truncate(time.Second).UTC()
	expires := now.Add(min(ttl, j.max)).Truncate(time.Second).UTC()
	payload, err := json.Marshal(claims{Issuer: j.issuer, Subject: id.String(), Audience: audience, Expires: expires.Unix(), IssuedAt: issued.Unix()})
	if err != nil {
		return nil, err
	}
	token, err := key.sign(payload)
	if err != nil {
		return nil, err
	}
	j.metrics.jwts.Inc()
	return &JWTSVID{Token: token, IssuedAt: issued, ExpiresAt: expires}, nil
}

// active is the newest live key whose time has come; with a clock set back
// before all of them, the oldest, which everybody knows longest.
func (j *JWTIssuer) active(now time.Time) (jwtKey, bool) {
	live := j.live.Load()
	if live == nil || len(*live) == 0 {
		return jwtKey{}, false
	}
	key := (*live)[0]
	for _, k := range (*live)[1:] {
		if !now.Before(k.activeFrom) {
			key = k
		}
	}
	return key, true
}

func checkAudience(audience []string) error {
	if len(audience) == 0 {
		return refuse("audience", "at least one is required")
	}
	if len(audience) > maxAudiences {
		return refuse("audience", "%d values, at most %d are taken", len(audience), maxAudiences)
	}
	for i, a := range audience {
		switch {
		case a == "":
			return refuse("audience", "value %d is empty", i)
		case len(a) > maxAudience:
			return refuse("audience", "value %d has %d bytes, at most %d are taken", i, len(a), maxAudience)
		case !utf8.ValidString(a):
			return refuse("audience", "value %d is not UTF-8", i)
		}
		for _, r := range a {
			if unicode.IsControl(r) {
				return refuse("audience", "value %d has a control character", i)
			}
		}
	}
	return nil
}

// sign makes a compact JWS whose header is alg, kid and typ, no more (spiffe-16).
func (k jwtKey) sign(payload []byte) (string, error) {
	input := make([]byte, 0, len(k.header)+1+base64.RawURLEncoding.EncodedLen(len(payload))+1+86)
	input = append(append(input, k.header...), '.')
	input = base64.RawURLEncoding.AppendEncode(input, payload)
	digest := sha256.Sum256(input)
	r, s, err := ecdsa.Sign(rand.Reader, k.key, digest[:])
	if err != nil {
		return "", err
	}
	var signature [64]byte
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	input = append(input, '.')
	return string(base64.RawURLEncoding.AppendEncode(input, signature[:])), nil
}
