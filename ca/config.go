package ca

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca/ledger"
	"castellan.dev/identity"
)

// Config is what an authority needs. Zero durations mean the defaults of trust
// rule 10.
type Config struct {
	// TrustDomain is the one this authority signs for.
	TrustDomain spiffeid.TrustDomain
	// DataDir holds the authority's keys in its folder "ca", made 0700, and the lock
	// that keeps a second server out.
	DataDir string
	// Keys, if set, keeps the authority's keys in place of that folder. Then Ledger
	// must be able to tell what it holds.
	Keys Blobs
	// ChainDir holds a plugged-in chain in Istio's cacerts file names; empty
	// means a root of our own.
	ChainDir string
	// ChainOfVolume says that ChainDir is a volume of a pod, whose files its group reads.
	ChainOfVolume bool
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

const (
	day = 24 * time.Hour
	// maxServingNames bounds the server's own certificate.
	maxServingNames = 64
)

// checked returns the configuration with defaults filled in, or what is wrong
// with it.
func (c Config) checked() (Config, error) {
	setDefault(&c.LeafTTL, time.Hour)
	setDefault(&c.MaxLeafTTL, max(day, c.LeafTTL))
	setDefault(&c.IntermediateTTL, 7*day)
	setDefault(&c.RootTTL, 365*day)
	setDefault(&c.Backdate, 30*time.Second)
	setDefault(&c.JWTTTL, 5*time.Minute)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	// Names that look like an address cannot be constrained: identity says why.
	if _, err := identity.ParseTrustDomain(c.TrustDomain.Name()); err != nil {
		return c, err
	}
	switch {
	case c.DataDir == "":
		return c, errors.New("no data directory")
	case c.Ledger == nil:
		return c, errors.New("no ledger: nothing may be signed without one")
	case c.JWTTTL < minTTL:
		return c, fmt.Errorf("jwtTTL %v is shorter than %v", c.JWTTTL, minTTL)
	case c.JWTTTL > c.MaxLeafTTL:
		return c, fmt.Errorf("jwtTTL %v is longer than maxLeafTTL %v", c.JWTTTL, c.MaxLeafTTL)
	case len(c.ServingNames)+len(c.ServingIPs) > maxServingNames:
		return c, fmt.Errorf("%d serving names, at most %d are possible", len(c.ServingNames)+len(c.ServingIPs), maxServingNames)
	}
	if err := c.lifetimes().validate(); err != nil {
		return c, err
	}
	return c, c.normalizeServing()
}

func (c Config) lifetimes() lifetimes {
	return lifetimes{leaf: c.LeafTTL, maxLeaf: c.MaxLeafTTL, intermediate: c.IntermediateTTL, root: c.RootTTL, backdate: c.Backdate}
}

// normalizeServing sorts names and addresses, so that a reordered configuration
// is the same one, and refuses names that verifiers trip over.
func (c *Config) normalizeServing() error {
	names := slices.Clone(c.ServingNames)
	for i, n := range names {
		names[i] = strings.ToLower(n)
		if !dnsName(names[i]) {
			return fmt.Errorf("serving name %q is not a DNS name (letters, digits and hyphens in labels; no wildcard, no underscore)", n)
		}
	}
	slices.Sort(names)
	c.ServingNames = slices.Compact(names)
	ips := make([]netip.Addr, 0, len(c.ServingIPs))
	for _, ip := range c.ServingIPs {
		if !ip.IsValid() || ip.Zone() != "" {
			return fmt.Errorf("serving address %q is not an IP address without a zone", ip)
		}
		ips = append(ips, ip.Unmap())
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	c.ServingIPs = slices.Compact(ips)
	return nil
}

func dnsName(s string) bool {
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return true
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}
