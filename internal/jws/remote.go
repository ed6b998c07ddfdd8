package jws

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"strings"
	"time"
)

// How often a source is fetched (rule 28 of docs/conformance.md).
const (
	refreshEvery = 20 * time.Minute
	firstBackoff = time.Minute
	longestWait  = time.Hour
)

// DefaultTimeout is how long one fetch may take unless something else is said.
const DefaultTimeout = 5 * time.Second

// RemoteConfig says where a key set is fetched from, and how carefully.
type RemoteConfig struct {
	// Source is "jwks:URL" or "oidc:ISSUER", as SourceName returns.
	Source string
	// Allow lists what the guard lets through besides public https (policy.JWKSFetch.Allow):
	// CIDRs of loopback or private addresses, and "http".
	Allow []string
	// RootCAs verifies https servers; nil: the system's.
	RootCAs *x509.CertPool
	// Timeout of one fetch; default DefaultTimeout.
	Timeout time.Duration
	Log     *slog.Logger
	Now     func() time.Time
}

// Remote keeps the key set of one source fresh. The last good set is kept while
// the source fails.
type Remote struct {
	*source
	log     *slog.Logger
	fetcher *fetcher // nil: somebody else fetches
	// Zero means the schedule of the rules.
	every, firstRetry, longestRetry time.Duration
}

func orDefault(d, def time.Duration) time.Duration {
	if d <= 0 {
		return def // never a loop without a wait
	}
	return d
}

// NewRemote checks cfg; nothing is fetched before Run or Refetch.
func NewRemote(cfg RemoteConfig) (*Remote, error) {
	g, err := newGuard(cfg.Allow)
	if err != nil {
		return nil, err
	}
	_, url, ok := strings.Cut(cfg.Source, ":")
	if !ok || !strings.HasPrefix(cfg.Source, "jwks:") && !strings.HasPrefix(cfg.Source, "oidc:") {
		return nil, fmt.Errorf("jws: %q is no source of keys; jwks:URL or oidc:ISSUER is wanted", clip(cfg.Source))
	}
	if err := g.checkURL(url); err != nil {
		return nil, fmt.Errorf("jws: %w", err)
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	f := newFetcher(g, cfg.RootCAs, cfg.Timeout)
	r := &Remote{log: cfg.Log, fetcher: f}
	r.source = newSource(cfg.Source, cfg.Now, func(ctx context.Context) (*KeySet, error) {
		keys, err := f.keySet(ctx, cfg.Source)
		if err != nil {
			return nil, fmt.Errorf("jws: fetch %s: %w", cfg.Source, err)
		}
		return keys, nil
	})
	return r, nil
}

// SetTimeout changes the timeout from the next fetch on; the keys stay.
func (r *Remote) SetTimeout(d time.Duration) {
	if r.fetcher != nil {
		r.fetcher.timeout.Store(int64(orDefault(d, DefaultTimeout)))
	}
}

// Run fetches now, every 20 minutes, and after a failure in 1 minute, doubling
// to 60, until ctx ends; of NewFetched as configured.
func (r *Remote) Run(ctx context.Context) error {
	every, first, longest := orDefault(r.every, refreshEvery), orDefault(r.firstRetry, firstBackoff), orDefault(r.longestRetry, longestWait)
	backoff := first
	for {
		wait := every
		err := r.refresh(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			wait, backoff = backoff, min(2*backoff, longest)
			keys, _ := r.Keys()
			r.log.Warn("token keys could not be fetched", "source", r.name, "error", err, "retryIn", wait.String(), "lastGood", keys.Version())
		default:
			backoff = first
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}
