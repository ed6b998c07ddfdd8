package jws

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// TestSetTimeout: the next fetch has the new timeout, though the remote was made
// with another.
func TestSetTimeout(t *testing.T) {
	idp := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer idp.Close()
	r, err := NewRemote(RemoteConfig{Source: "jwks:" + idp.URL, Allow: []string{"http", "127.0.0.0/8"}, Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	r.SetTimeout(10 * time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := r.Refetch(ctx); !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		t.Errorf("fetch: %v", err)
	}
	r.SetTimeout(0)
	if got := time.Duration(r.fetcher.timeout.Load()); got != DefaultTimeout {
		t.Errorf("no timeout means %v", got)
	}
}
