package workloadapi

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/agent/svid"
)

// FuzzValidate: no token makes the check panic, and none passes that nobody signed.
func FuzzValidate(f *testing.F) {
	key, err := svid.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	trust := &svid.Trust{Domain: td, Own: svid.Bundle{JWTKeys: map[string]jose.JSONWebKey{
		"k": {Key: key.Signer().Public(), KeyID: "k", Use: "jwt-svid"},
	}}}
	f.Add("eyJhbGciOiJFUzI1NiIsImtpZCI6ImsifQ.eyJzdWIiOiJzcGlmZmU6Ly9jbHVzdGVyLmxvY2FsL3gifQ.AAAA")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("..")
	f.Fuzz(func(t *testing.T, token string) {
		if id, _, err := validate(token, "a", trust, time.Now()); err == nil {
			t.Errorf("accepted %q", id)
		}
	})
}

// FuzzClaims: whatever claims are signed, checking them does not panic, and what
// passes has an end that is ahead.
func FuzzClaims(f *testing.F) {
	f.Add(`{"aud":"a","exp":99999999999}`)
	f.Add(`{"aud":["a",1],"exp":1e400}`)
	f.Add(`{"aud":"a","exp":"x","nbf":{}}`)
	f.Fuzz(func(t *testing.T, text string) {
		var claims map[string]any
		if json.Unmarshal([]byte(text), &claims) != nil {
			return
		}
		now := time.Now()
		if checkClaims(claims, "a", now) != nil {
			return
		}
		if exp, ok := seconds(claims["exp"]); !ok || exp <= float64(now.Unix()) {
			t.Errorf("accepted %s", text)
		}
	})
}
