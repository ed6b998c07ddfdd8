package ca

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// JWTIssuer signs JWT-SVIDs with ES256.
type JWTIssuer struct{}

// JWTSVID is a signed token.
type JWTSVID struct {
	// Token is a compact JWS. It is a credential: never log it.
	Token     string
	IssuedAt  time.Time
	ExpiresAt time.Time
}

// Mint signs a token for an identity that has been attested. A TTL of zero or
// less means the default, more than allowed is capped. Errors: *RequestError,
// ErrNoIssuer.
func (j *JWTIssuer) Mint(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (*JWTSVID, error) {
	return nil, ErrNoIssuer
}
