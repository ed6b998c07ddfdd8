package kube_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"k8s.io/client-go/rest"

	"castellan.dev/ca/attest"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
	"castellan.dev/internal/kube"
)

// The keys are what attestation takes.
var _ attest.KeySource = (*jws.Remote)(nil)

// TestIssuer: name and keys come from the API server itself, whatever place its
// discovery document names for others.
func TestIssuer(t *testing.T) {
	is := jwstest.RSA(t, "https://kubernetes.default.svc.cluster.local", "k1")
	var name atomic.Pointer[string]
	name.Store(&is.Name)
	var down atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case down.Load():
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path == "/.well-known/openid-configuration":
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":"https://elsewhere.test/keys"}`, *name.Load())
		case r.URL.Path == "/openid/v1/jwks" && !strings.Contains(r.Header.Get("Accept"), "application/jwk-set+json"):
			w.WriteHeader(http.StatusNotAcceptable) // as the API server does
		case r.URL.Path == "/openid/v1/jwks":
			w.Header().Set("Content-Type", "application/jwk-set+json")
			_, _ = w.Write(jwstest.JWKS(t, is))
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	defer server.Close()
	c, err := kube.New(&rest.Config{Host: server.URL}, namespace)
	if err != nil {
		t.Fatal(err)
	}
	got, err := kube.FindIssuer(t.Context(), c)
	if err != nil || got != is.Name {
		t.Fatal(got, err)
	}
	keys, err := kube.IssuerKeys(c, got, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.Refetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	if set, err := keys.Keys(); err != nil || set.Len() != 1 {
		t.Fatal(set, err)
	}
	other := "https://other.test"
	name.Store(&other)
	keys, err = kube.IssuerKeys(c, got, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.Refetch(t.Context()); err == nil || !strings.Contains(err.Error(), `issues as "https://other.test" now`) {
		t.Error(err)
	}
	empty := ""
	name.Store(&empty)
	if _, err := kube.FindIssuer(t.Context(), c); !kube.MayPass(err) {
		t.Error(err)
	}
	down.Store(true)
	if _, err := kube.FindIssuer(t.Context(), c); !kube.MayPass(err) {
		t.Error(err)
	}
	if _, err := kube.FindIssuer(t.Context(), newCluster(t).client()); err == nil {
		t.Error("a client without a way")
	}
}
