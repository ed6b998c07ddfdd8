package jws_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
)

// TestFetched: fetched as configured; the last good set stays while fetching fails,
// which is tried again sooner; an unknown key fetches at most every ten seconds.
func TestFetched(t *testing.T) {
	document := jwstest.JWKS(t, jwstest.EC(t, "https://a.test", "k1"))
	synctest.Test(t, func(t *testing.T) {
		var fetches atomic.Int32
		var fail atomic.Bool
		r, err := jws.NewFetched(jws.FetchedConfig{
			Name: "keys of the API server", Every: 5 * time.Minute, FirstRetry: time.Second,
			Fetch: func(context.Context) ([]byte, error) {
				fetches.Add(1)
				if fail.Load() {
					return nil, errors.New("connection refused")
				}
				return document, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		fail.Store(true)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		after := func(d time.Duration, want int32) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if n := fetches.Load(); n != want {
				t.Fatalf("%d fetches, want %d", n, want)
			}
		}
		after(0, 1)
		if _, err := r.Keys(); err == nil || !strings.Contains(err.Error(), "fetch keys of the API server: connection refused") {
			t.Error(err)
		}
		after(1500*time.Millisecond, 2)
		fail.Store(false)
		after(2*time.Second, 3)
		if keys, err := r.Keys(); err != nil || keys.Len() != 1 || r.Err() != nil {
			t.Fatal(keys, err)
		}
		after(4*time.Minute, 3)
		fail.Store(true)
		after(time.Minute, 4)
		if keys, err := r.Keys(); err != nil || keys.Len() != 1 || r.Err() == nil {
			t.Fatal(keys, err)
		}
		if err := r.Refetch(ctx); err == nil {
			t.Error("no error")
		}
		after(0, 4) // too soon after the last
		cancel()
		<-done
	})
	if _, err := jws.NewFetched(jws.FetchedConfig{Name: "x"}); err == nil {
		t.Error("nothing to fetch with")
	}
}
