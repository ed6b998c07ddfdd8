package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestCaller(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
	if got := caller(r); got != "somebody without a certificate" {
		t.Error(got)
	}
	r.Header.Set("X-Forwarded-Client-Cert", "By=spiffe://a/b;Hash=00;URI=spiffe://cluster.local/ns/shop/sa/frontend")
	if got := caller(r); got != "spiffe://cluster.local/ns/shop/sa/frontend" {
		t.Error(got)
	}
}

func TestGetTellsRefusals(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			http.Error(w, "denied", http.StatusForbidden)
		}
	}))
	defer server.Close()
	var out bytes.Buffer
	err := run(t.Context(), []string{"get", server.URL + "/yes", server.URL + "/no"}, &out)
	if err == nil || !strings.Contains(err.Error(), "1 of 2") || out.String() != "200 \n403 denied\n" {
		t.Errorf("%v %q", err, out.String())
	}
}

func TestGetWaitsForWhatIsNew(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch asked.Add(1) {
		case 1:
			w.WriteHeader(http.StatusBadGateway)
		case 2:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 3:
			panic(http.ErrAbortHandler) // the connection ends without an answer
		}
	}))
	defer server.Close()
	a, err := settled(t.Context(), server.URL, time.Hour)
	if err != nil || a.status != http.StatusOK || asked.Load() != 4 {
		t.Errorf("%+v after %d: %v", a, asked.Load(), err)
	}
	// What stays so is the answer.
	asked.Store(0)
	if a, err := settled(t.Context(), server.URL, 0); err != nil || a.status != http.StatusBadGateway || asked.Load() != 1 {
		t.Errorf("%+v after %d: %v", a, asked.Load(), err)
	}
}
