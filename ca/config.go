package ca

import (
	"log/slog"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca/ledger"
)

// Config is what an authority needs. Zero durations mean the defaults of trust
// rule 10.
type Config struct {
	// TrustDomain is the one this authority signs for.
	TrustDomain spiffeid.TrustDomain
	// DataDir holds the authority's keys in its folder "ca"; made 0700.
	DataDir string
	// ChainDir holds a plugged-in chain in Istio's cacerts file names; empty
	// means a root of our own.
	ChainDir string
	// AllowUnconstrainedIssuer accepts a plugged-in CA without name constraints.
	AllowUnconstrainedIssuer bool
	// PermittedURI adds the trust domain as a permitted URI name constraint.
	PermittedURI bool

	LeafTTL         time.Duration // default 1h
	MaxLeafTTL      time.Duration // default 24h
	IntermediateTTL time.Duration // default 7d
	RootTTL         time.Duration // default 1y
	Backdate        time.Duration // default 30s, at most a tenth of the TTL
	JWTTTL          time.Duration // default 5m
	// JWTIssuer is the iss claim of JWT-SVIDs; empty leaves it out.
	JWTIssuer string

	// ServingNames and ServingIPs go into the server's own certificate; without
	// either there is none.
	ServingNames []string
	ServingIPs   []netip.Addr

	// Ledger records every signature; required.
	Ledger ledger.Recorder
	// Log is where causes go; nil discards.
	Log *slog.Logger
	// Registerer takes the metrics; nil drops them.
	Registerer prometheus.Registerer
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}
