package jws

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// FetchedConfig says how a key set is got by somebody who knows the way better
// than a URL says, such as a client of the API server.
type FetchedConfig struct {
	// Name is for messages.
	Name string
	// Fetch returns a JWK Set. It must end by itself.
	Fetch func(ctx context.Context) ([]byte, error)
	// Every is how often, default 20 minutes; after a failure FirstRetry, default
	// one minute, and doubling to Every.
	Every, FirstRetry time.Duration
	Log               *slog.Logger
	Now               func() time.Time
}

// NewFetched checks cfg; nothing is fetched before Run or Refetch. Who writes Fetch
// decides where it goes: the guard of NewRemote is not in the way.
func NewFetched(cfg FetchedConfig) (*Remote, error) {
	if cfg.Fetch == nil || cfg.Name == "" {
		return nil, errors.New("jws: a name and a way to fetch are needed")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Remote{log: cfg.Log, every: cfg.Every, firstRetry: cfg.FirstRetry, longestRetry: cfg.Every}
	r.source = newSource(cfg.Name, cfg.Now, func(ctx context.Context) (*KeySet, error) {
		data, err := cfg.Fetch(ctx)
		var keys *KeySet
		if err == nil {
			keys, err = ParseJWKS(data)
		}
		if err != nil {
			return nil, fmt.Errorf("jws: fetch %s: %w", cfg.Name, err)
		}
		return keys, nil
	})
	return r, nil
}
