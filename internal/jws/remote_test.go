package jws_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
)

// keyServer answers as an issuer does.
func keyServer(t *testing.T, handler http.HandlerFunc) (*httptest.Server, *x509.CertPool) {
	t.Helper()
	s := httptest.NewTLSServer(handler)
	s.Config.ErrorLog = nil
	t.Cleanup(s.Close)
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	return s, pool
}

func loopback() []string { return []string{"127.0.0.0/8"} }

func TestRemoteFetch(t *testing.T) {
	is := jwstest.EC(t, issuerName, "k1")
	keys := string(jwstest.JWKS(t, is))
	var elsewhere atomic.Bool
	other, _ := keyServer(t, func(w http.ResponseWriter, _ *http.Request) { elsewhere.Store(true) })
	var self string
	server, pool := keyServer(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/keys", "/oidc/keys":
			fmt.Fprint(w, keys)
		case "/redirect":
			http.Redirect(w, r, other.URL, http.StatusFound)
		case "/large":
			fmt.Fprint(w, `{"keys":[]}`, strings.Repeat(" ", 65<<10))
		case "/endless":
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		case "/slow":
			<-r.Context().Done()
		case "/html":
			fmt.Fprint(w, "<html>")
		case "/oidc/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"issuer":"%s/oidc","jwks_uri":"%s/oidc/keys"}`, self, self)
		case "/liar/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"issuer":"%s/oidc","jwks_uri":"%s/oidc/keys"}`, self, self)
		case "/inward/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"issuer":"%s/inward","jwks_uri":"https://169.254.169.254/latest"}`, self)
		case "/plain/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"issuer":"%s/plain","jwks_uri":"http://127.0.0.1/keys"}`, self)
		case "/mute/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"issuer":"%s/mute"}`, self)
		default:
			http.NotFound(w, r)
		}
	})
	self = server.URL

	tests := map[string]struct {
		source string
		allow  []string
		roots  *x509.CertPool
		text   string
	}{
		"jwks":                    {"jwks:" + self + "/keys", loopback(), pool, ""},
		"oidc":                    {"oidc:" + self + "/oidc", loopback(), pool, ""},
		"loopback without leave":  {"jwks:" + self + "/keys", nil, pool, "127.0.0.1 is not a public address; add its range to jwks.allow"},
		"name of loopback":        {"jwks:" + strings.Replace(self, "127.0.0.1", "localhost", 1) + "/keys", nil, pool, "is not a public address"},
		"metadata":                {"jwks:https://169.254.169.254/keys", append(loopback(), "0.0.0.0/0", "::/0"), pool, "which no setting allows"},
		"unknown certificate":     {"jwks:" + self + "/keys", loopback(), x509.NewCertPool(), "certificate signed by unknown authority"},
		"redirect":                {"jwks:" + self + "/redirect", loopback(), pool, "answered with a redirect, which is not followed"},
		"not found":               {"jwks:" + self + "/nothing", loopback(), pool, "answered 404"},
		"too large":               {"jwks:" + self + "/large", loopback(), pool, "more than 65536 bytes"},
		"endless":                 {"jwks:" + self + "/endless", loopback(), pool, "more than 65536 bytes"},
		"slow":                    {"jwks:" + self + "/slow", loopback(), pool, "context deadline exceeded"},
		"authz-28 no JWKS":        {"jwks:" + self + "/html", loopback(), pool, "not a JSON key set"},
		"oidc of another":         {"oidc:" + self + "/liar", loopback(), pool, "is of issuer"},
		"oidc points inward":      {"oidc:" + self + "/inward", loopback(), pool, "which no setting allows"},
		"oidc points at http":     {"oidc:" + self + "/plain", loopback(), pool, "is plain http"},
		"oidc without keys":       {"oidc:" + self + "/mute", loopback(), pool, "has no jwks_uri"},
		"oidc without a document": {"oidc:" + self + "/nothing", loopback(), pool, "answered 404"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			timeout := 10 * time.Second
			if name == "slow" {
				timeout = 100 * time.Millisecond
			}
			r, err := jws.NewRemote(jws.RemoteConfig{Source: tt.source, Allow: tt.allow, RootCAs: tt.roots, Timeout: timeout})
			if err != nil {
				t.Fatal(err)
			}
			err = r.Refetch(t.Context())
			if tt.text != "" {
				if err == nil || !strings.Contains(err.Error(), tt.text) {
					t.Fatalf("error %v, want %q", err, tt.text)
				}
				if _, err := r.Keys(); err == nil {
					t.Error("there are keys")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			set, err := r.Keys()
			if err != nil || set.Len() != 1 || string(set.JWKS()) != keys {
				t.Fatalf("%v, %v", set, err)
			}
		})
	}
	if elsewhere.Load() {
		t.Error("a redirect was followed")
	}
}

func TestRemoteConfig(t *testing.T) {
	for name, tt := range map[string]struct {
		cfg  jws.RemoteConfig
		text string
	}{
		"no kind":   {jws.RemoteConfig{Source: "https://x.test"}, "is no source of keys"},
		"empty":     {jws.RemoteConfig{}, "is no source of keys"},
		"http":      {jws.RemoteConfig{Source: "jwks:http://x.test"}, "is plain http"},
		"bad allow": {jws.RemoteConfig{Source: "jwks:https://x.test", Allow: []string{"10/8"}}, `allow[0]: "10/8"`},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := jws.NewRemote(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("error %v, want %q", err, tt.text)
			}
		})
	}
}

func TestFile(t *testing.T) {
	one, two := jwstest.EC(t, issuerName, "k1"), jwstest.EC(t, issuerName, "k2")
	path := filepath.Join(t.TempDir(), "keys.json")
	if _, err := jws.NewFile(path, nil, nil); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Fatalf("missing: %v", err)
	}
	write := func(data string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	write("<html>")
	if _, err := jws.NewFile(path, nil, nil); err == nil || !strings.Contains(err.Error(), "keys.json") {
		t.Fatalf("broken: %v", err)
	}
	write(string(jwstest.JWKS(t, one)))
	f, err := jws.NewFile(path, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = f.Run(ctx) }()
	defer func() { cancel(); <-done }()
	await := func(what string, cond func() bool) {
		t.Helper()
		deadline := time.After(20 * time.Second)
		for {
			changed := f.Changed()
			if cond() {
				return
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("%s: it did not happen", what)
			}
		}
	}
	has := func(n int) func() bool {
		return func() bool { set, _ := f.Keys(); return set.Len() == n && f.Err() == nil }
	}
	await("first", has(1))
	write(string(jwstest.JWKS(t, one, two)))
	await("a second key", has(2))
	write(`{"keys":`)
	await("broken", func() bool { set, _ := f.Keys(); return f.Err() != nil && set.Len() == 2 })
	write(string(jwstest.JWKS(t, two)))
	await("whole again", has(1))
}
