package ca_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"castellan.dev/ca"
	"castellan.dev/ca/ledger/ledgertest"
)

var orders = spiffeid.RequireFromString(ordersID)

func mint(t *testing.T, a *ca.Authority, ttl time.Duration, audience ...string) *ca.JWTSVID {
	t.Helper()
	s, err := a.JWTIssuer().Mint(t.Context(), orders, audience, ttl)
	if err != nil {
		t.Fatalf("mint: %v", err)
	}
	return s
}

func part(t *testing.T, token string, i int) map[string]any {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("spiffe-16: %d parts", len(parts))
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[i])
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]any{}
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestJWTSVID(t *testing.T) {
	e := newEnv(t, func(c *ca.Config) { c.JWTIssuer = "https://castellan.example" })
	a := e.Open()
	s := mint(t, a, 0, "one", "two")
	header, claims := part(t, s.Token, 0), part(t, s.Token, 1)
	t.Run("spiffe-16 headers are alg, kid and typ", func(t *testing.T) {
		if len(header) != 3 || header["alg"] != "ES256" || header["typ"] != "JWT" || header["kid"] == "" {
			t.Error(header)
		}
	})
	t.Run("spiffe-17 alg and typ", func(t *testing.T) {
		if header["alg"] != "ES256" || header["typ"] != "JWT" {
			t.Error(header)
		}
	})
	t.Run("spiffe-18 sub", func(t *testing.T) {
		if claims["sub"] != ordersID {
			t.Error(claims)
		}
	})
	t.Run("spiffe-19 aud and exp", func(t *testing.T) {
		if fmt.Sprint(claims["aud"]) != "[one two]" || int64(claims["exp"].(float64)) != e.clock.Now().Add(5*time.Minute).Unix() {
			t.Error(claims)
		}
	})
	t.Run("iat now, iss as configured, no nbf in the future", func(t *testing.T) {
		if int64(claims["iat"].(float64)) != e.clock.Now().Unix() || claims["iss"] != "https://castellan.example" || claims["nbf"] != nil || len(claims) != 5 {
			t.Error(claims)
		}
	})
	t.Run("times in the answer", func(t *testing.T) {
		if !s.ExpiresAt.Equal(e.clock.Now().Add(5*time.Minute)) || !s.IssuedAt.Equal(e.clock.Now()) {
			t.Error(s.IssuedAt, s.ExpiresAt)
		}
	})
	t.Run("hidden in logs", func(t *testing.T) {
		if got := fmt.Sprintf("%v %s", *s, s); strings.Contains(got, s.Token) {
			t.Error(got)
		}
	})
	t.Run("no iss unless configured", func(t *testing.T) {
		if c := part(t, mint(t, newEnv(t).Open(), 0, "a").Token, 1); c["iss"] != nil {
			t.Error(c)
		}
	})
}

func TestJWTSVIDVerifiesByOthers(t *testing.T) {
	a := plainAuthority(t)
	s := mint(t, a, 0, "me")
	td := orders.TrustDomain()
	whole, err := spiffebundle.Parse(td, a.Bundle().MarshalJWKS())
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jwtsvid.ParseAndValidate(s.Token, whole, []string{"me"})
	if err != nil || parsed.ID != orders {
		t.Fatalf("go-spiffe, whole bundle: %v", err)
	}
	keys, err := jwtbundle.Parse(td, a.Bundle().MarshalJWTAuthorities())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(s.Token, keys, []string{"me"}); err != nil {
		t.Fatalf("go-spiffe, JWT authorities: %v", err)
	}
	if _, err := jwtsvid.ParseAndValidate(s.Token, keys, []string{"other"}); err == nil {
		t.Fatal("valid for another audience")
	}
	sig, err := jose.ParseSignedCompact(s.Token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sig.Verify(a.Bundle().JWTAuthorities[sig.Signatures[0].Header.KeyID]); err != nil {
		t.Fatal(err)
	}
}

func TestMintRefused(t *testing.T) {
	a := newEnv(t).Open()
	many := make([]string, 17)
	for i := range many {
		many[i] = "a"
	}
	for name, c := range map[string]struct {
		id       spiffeid.ID
		audience []string
		ttl      time.Duration
		want     string
	}{
		"spiffe-51 no audience":  {orders, nil, 0, "ca: audience: at least one is required"},
		"empty audience":         {orders, []string{"a", ""}, 0, "ca: audience: value 1 is empty"},
		"too many":               {orders, many, 0, "ca: audience: 17 values, at most 16 are taken"},
		"too long":               {orders, []string{strings.Repeat("a", 256)}, 0, "ca: audience: value 0 has 256 bytes, at most 255 are taken"},
		"not UTF-8":              {orders, []string{"\xff"}, 0, "ca: audience: value 0 is not UTF-8"},
		"control character":      {orders, []string{"a\nb"}, 0, "ca: audience: value 0 has a control character"},
		"tiny TTL":               {orders, []string{"a"}, time.Microsecond, "ca: ttl: 1µs is shorter than 1s"},
		"another trust domain":   {spiffeid.RequireFromString("spiffe://other.example/ns/a/sa/b"), []string{"a"}, 0, "is no workload of this trust domain"},
		"the trust domain's own": {spiffeid.RequireFromString("spiffe://cluster.local"), []string{"a"}, 0, "is no workload of this trust domain"},
		"nobody":                 {spiffeid.ID{}, []string{"a"}, 0, "is no workload of this trust domain"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := a.JWTIssuer().Mint(t.Context(), c.id, c.audience, c.ttl)
			if s != nil {
				t.Error("minted")
			}
			contains(t, err, c.want)
		})
	}
}

func TestJWTTTL(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	for asked, want := range map[time.Duration]time.Duration{0: 5 * time.Minute, -1: 5 * time.Minute, time.Minute: time.Minute, 48 * time.Hour: time.Hour} {
		if got := mint(t, a, asked, "a").ExpiresAt.Sub(e.clock.Now()); got != want {
			t.Errorf("asked %v: got %v, want %v", asked, got, want)
		}
	}
}

func kid(t *testing.T, s *ca.JWTSVID) string { return part(t, s.Token, 0)["kid"].(string) }

// Keys are published before use and kept until their last token has expired
// (spiffe-34 asks the same of federated bundles).
func TestJWTKeysRotate(t *testing.T) {
	bubble(t, nil, func(t *testing.T, a *ca.Authority, _ *ledgertest.Memory) {
		changed := a.Changed()
		first := kid(t, mint(t, a, 0, "a"))
		known := map[string]time.Time{first: time.Now().Add(-time.Hour)}
		used := map[string]bool{}
		expires := map[string]time.Time{} // the last token of each key
		sequence := a.Bundle().Sequence
		for range 60 * 5 {
			time.Sleep(time.Minute)
			synctest.Wait()
			b := a.Bundle()
			if b.Sequence < sequence {
				t.Fatalf("spiffe-23: sequence %d after %d", b.Sequence, sequence)
			}
			sequence = b.Sequence
			for id := range b.JWTAuthorities {
				if _, ok := known[id]; !ok {
					known[id] = time.Now()
				}
			}
			s := mint(t, a, 10*time.Minute, "a")
			id := kid(t, s)
			if !used[id] && time.Since(known[id]) < 29*time.Minute {
				t.Errorf("key %s signs %v after it was published", id, time.Since(known[id]))
			}
			used[id] = true
			expires[id] = s.ExpiresAt
			for id, at := range expires {
				if at.After(time.Now()) && b.JWTAuthorities[id] == nil {
					t.Fatalf("the key of a token that is valid until %v is gone", at)
				}
			}
			if len(b.JWTAuthorities) > 3 {
				t.Fatalf("%d keys are published", len(b.JWTAuthorities))
			}
		}
		if len(used) < 4 {
			t.Errorf("%d keys in five periods", len(used))
		}
		if a.Bundle().JWTAuthorities[first] != nil {
			t.Error("the first key is still published")
		}
		select {
		case <-changed:
		default:
			t.Error("the change was not announced")
		}
	})
}

func TestJWTKeysSurviveRestart(t *testing.T) {
	e := newEnv(t)
	id := kid(t, mint(t, e.Open(), 0, "a"))
	e.clock.Add(time.Hour)
	if got := kid(t, mint(t, e.Open(), 0, "a")); got != id {
		t.Errorf("key %s, was %s", got, id)
	}
	// Away for long: the old key signs until the new one has been known for a while.
	e.clock.Add(60 * day)
	a := e.Open()
	if got := kid(t, mint(t, a, 0, "a")); got != id || len(a.Bundle().JWTAuthorities) != 2 {
		t.Errorf("key %s of %d", got, len(a.Bundle().JWTAuthorities))
	}
	// A clock set back before every key does not stop tokens.
	e.clock.Add(-60*day - 59*time.Minute)
	mint(t, e.Open(), 0, "a")
}

func TestBundle(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	b := a.Bundle()
	var doc struct {
		Keys     []map[string]any `json:"keys"`
		Sequence any              `json:"spiffe_sequence"`
		Hint     any              `json:"spiffe_refresh_hint"`
	}
	if err := json.Unmarshal(b.MarshalJWKS(), &doc); err != nil {
		t.Fatal(err)
	}
	var x509Keys, jwtKeys []map[string]any
	for _, k := range doc.Keys {
		switch k["use"] {
		case "x509-svid":
			x509Keys = append(x509Keys, k)
		case "jwt-svid":
			jwtKeys = append(jwtKeys, k)
		default:
			t.Errorf("spiffe-25: use %v", k["use"])
		}
	}
	t.Run("spiffe-15 x509-svid without kid, one x5c", func(t *testing.T) {
		if len(x509Keys) != 1 || x509Keys[0]["kid"] != nil || len(x509Keys[0]["x5c"].([]any)) != 1 {
			t.Errorf("%v", x509Keys)
		}
	})
	t.Run("spiffe-21 jwt-svid with kid", func(t *testing.T) {
		if len(jwtKeys) != 1 || jwtKeys[0]["kid"] == "" || jwtKeys[0]["d"] != nil {
			t.Errorf("%v", jwtKeys)
		}
	})
	t.Run("spiffe-22 go-spiffe reads it", func(t *testing.T) {
		p, err := spiffebundle.Parse(b.TrustDomain, b.MarshalJWKS())
		if err != nil || len(p.X509Authorities()) != 1 || !p.X509Authorities()[0].Equal(b.Roots[0]) || len(p.JWTAuthorities()) != 1 {
			t.Errorf("%v", err)
		}
	})
	t.Run("spiffe-23 sequence is an integer, rises with content, survives a lost file", func(t *testing.T) {
		if n, ok := doc.Sequence.(float64); !ok || n != float64(b.Sequence) || n < 1 {
			t.Errorf("%v", doc.Sequence)
		}
		e.clock.Add(5 * day) // past half of the JWT key's period
		a := e.Open()
		if a.Bundle().Sequence <= b.Sequence {
			t.Errorf("sequence %d after %d", a.Bundle().Sequence, b.Sequence)
		}
		last := a.Bundle().Sequence
		e.Close()
		os.Remove(e.path("bundle.json"))
		e.clock.Add(time.Minute)
		if got := e.Open().Bundle().Sequence; got <= last {
			t.Errorf("sequence %d after %d", got, last)
		}
	})
	t.Run("spiffe-24 refresh hint", func(t *testing.T) {
		if doc.Hint != float64(300) {
			t.Errorf("%v", doc.Hint)
		}
	})
	t.Run("spiffe-50 JWT authorities only", func(t *testing.T) {
		var keys struct {
			Keys []map[string]any `json:"keys"`
			Seq  any              `json:"spiffe_sequence"`
		}
		if err := json.Unmarshal(b.MarshalJWTAuthorities(), &keys); err != nil || len(keys.Keys) != 1 || keys.Keys[0]["use"] != "jwt-svid" || keys.Seq != nil {
			t.Errorf("%v, %v", keys, err)
		}
	})
	t.Run("file of roots only", func(t *testing.T) {
		path := t.TempDir() + "/bundle.pem"
		if err := ca.WriteBundleFile(path, b); err != nil {
			t.Fatal(err)
		}
		data, _ := os.ReadFile(path)
		if strings.Count(string(data), "-----BEGIN") != 1 || !strings.Contains(string(data), "CERTIFICATE") || string(data) != string(b.RootsPEM()) {
			t.Errorf("%s", data)
		}
		if info, _ := os.Stat(path); info.Mode().Perm() != 0o644 {
			t.Errorf("mode %v", info.Mode())
		}
		contains(t, ca.WriteBundleFile("/nonexistent/bundle.pem", b), "ca: bundle file: ")
	})
}
