package svid_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/svid"
)

func roots(certs ...*x509.Certificate) [][]byte {
	var out [][]byte
	for _, c := range certs {
		out = append(out, c.Raw)
	}
	return out
}

func TestRootsOfTheBundleWinOverThoseOfAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		r, source := rotate(t, i, nil)
		a, b := i.authority, agenttest.NewAuthority(t, "next")
		holds := func(when string, want ...*x509.Certificate) {
			t.Helper()
			got := state(source).Trust.Own.X509
			if len(got) != len(want) {
				t.Fatalf("%s: %d roots, want %d", when, len(got), len(want))
			}
			for n, w := range want {
				if !bytes.Equal(got[n], w.Raw) {
					t.Errorf("%s: root %d is another", when, n)
				}
			}
		}
		renew := func() {
			time.Sleep(35 * time.Minute)
			synctest.Wait()
		}
		holds("from the answer", a.Root)
		i.set(func(i *issuer) { i.roots = roots(a.Root, b.Root) })
		renew()
		holds("from the next answer", a.Root, b.Root)
		if err := r.SetBundle(trustDomain(), roots(a.Root), nil, 1, 0); err != nil {
			t.Fatal(err)
		}
		holds("the bundle wins", a.Root)
		renew()
		holds("and still does after another answer", a.Root)
		// The server signs under a root that the stream, down since, has not brought.
		i.set(func(i *issuer) { i.authority, i.roots = b, roots(b.Root) })
		renew()
		holds("a chain under a newer root is served with that root", a.Root, b.Root)
		if err := r.SetBundle(trustDomain(), roots(b.Root), nil, 2, 0); err != nil {
			t.Fatal(err)
		}
		holds("until the next bundle", b.Root)
	})
}

func TestADroppedRootBringsOnTheRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		r, source := rotate(t, i, nil)
		a, b := i.authority, agenttest.NewAuthority(t, "next")
		serial := state(source).SVID.Serial
		for _, bundle := range [][][]byte{roots(a.Root), roots(a.Root, b.Root)} {
			if err := r.SetBundle(trustDomain(), bundle, nil, 1, 0); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if state(source).SVID.Serial != serial {
				t.Error("renewed although its root is still trusted")
			}
		}
		i.set(func(i *issuer) { i.authority = b })
		if err := r.SetBundle(trustDomain(), roots(b.Root), nil, 2, 0); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if state(source).SVID.Serial == serial {
			t.Error("not renewed although its root was dropped")
		}
	})
}

func TestBundlesRefused(t *testing.T) {
	r, err := svid.NewRotator(svid.Config{Issuer: newIssuer(t, time.Hour), TrustDomain: trustDomain()})
	if err != nil {
		t.Fatal(err)
	}
	a := agenttest.NewAuthority(t, "a")
	leaf := a.Leaf(t, agenttest.ID(account), a.Root.PublicKey, time.Hour, nil)
	if err := r.SetBundle(trustDomain(), roots(a.Root), nil, 1, 0); err != nil {
		t.Fatal(err)
	}
	before := r.Trust()
	for _, test := range []struct {
		name  string
		td    spiffeid.TrustDomain
		roots [][]byte
		jwks  string
		want  string
	}{
		{"no roots", trustDomain(), nil, "", `bundle of "cluster.local" has 0 roots, want 1 to 64`},
		{"too many", trustDomain(), make([][]byte, 65), "", `bundle of "cluster.local" has 65 roots, want 1 to 64`},
		{"garbage", trustDomain(), [][]byte{[]byte("garbage")}, "", `bundle of "cluster.local": root 0: x509: `},
		{"a leaf", trustDomain(), roots(a.Root, leaf), "", `bundle of "cluster.local": root 1 is no CA`},
		{"no trust domain", spiffeid.TrustDomain{}, roots(a.Root), "", `bundle without a trust domain`},
		{"spiffe-22 a JWKS without keys", trustDomain(), roots(a.Root), `{}`, `bundle of "cluster.local": JWKS without keys`},
		{"no JWKS", trustDomain(), roots(a.Root), `[]`, `bundle of "cluster.local": JWKS: `},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := r.SetBundle(test.td, test.roots, []byte(test.jwks), 2, 0)
			if err == nil || !strings.HasPrefix(err.Error(), test.want) {
				t.Errorf("got %v, want %s", err, test.want)
			}
			if r.Trust() != before {
				t.Error("it changed something")
			}
		})
	}
}

func TestForeignBundles(t *testing.T) {
	r, err := svid.NewRotator(svid.Config{Issuer: newIssuer(t, time.Hour), TrustDomain: trustDomain()})
	if err != nil {
		t.Fatal(err)
	}
	a, b := agenttest.NewAuthority(t, "a"), agenttest.NewAuthority(t, "b")
	foreign := spiffeid.RequireTrustDomainFromString("other.example")
	for _, err := range []error{
		r.SetBundle(trustDomain(), roots(a.Root), nil, 1, 0), r.SetBundle(foreign, roots(b.Root), nil, 1, 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Run("spiffe-36 are never merged with ours", func(t *testing.T) {
		trust := r.Trust()
		if len(trust.Own.X509) != 1 || len(trust.Federated[foreign].X509) != 1 || !bytes.Equal(trust.Federated[foreign].X509[0], b.Root.Raw) {
			t.Errorf("got %+v", trust)
		}
	})
	r.RemoveBundle(foreign)
	r.RemoveBundle(trustDomain())
	if trust := r.Trust(); len(trust.Federated) != 0 || len(trust.Own.X509) != 1 {
		t.Errorf("after removal: %+v", trust)
	}
}

func TestJWTKeys(t *testing.T) {
	s := agenttest.New(t)
	r, err := svid.NewRotator(svid.Config{Issuer: newIssuer(t, time.Hour), TrustDomain: trustDomain()})
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(s.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	nokid := map[string]any{}
	for k, v := range set.Keys[0] {
		if k != "kid" {
			nokid[k] = v
		}
	}
	set.Keys = append(set.Keys, nokid, map[string]any{"kty": "unheard-of", "kid": "x", "use": "jwt-svid"},
		map[string]any{"kty": "oct", "kid": "shared", "use": "jwt-svid", "k": "c2VjcmV0c2VjcmV0c2VjcmV0"})
	jwks, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.SetBundle(trustDomain(), roots(s.Authority().Root), jwks, 1, 0); err != nil {
		t.Fatal(err)
	}
	t.Run("spiffe-21 only keys with use jwt-svid and a kid, spiffe-25 others are passed over", func(t *testing.T) {
		own := r.Trust().Own
		if len(own.JWTKeys) != 1 || own.JWTKeys["jwt-1"].Key == nil {
			t.Errorf("keys: %v", own.JWTKeys)
		}
		if text := string(own.JWT); strings.Contains(text, "x509") || strings.Contains(text, "oct") || !strings.Contains(text, "jwt-1") {
			t.Errorf("published: %s", text)
		}
	})
}

func TestKeyNeverShowsItself(t *testing.T) {
	key, err := svid.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", key, "in", svid.SVID{Key: key}, "any", []any{key})
	js, err := json.Marshal(map[string]any{"key": key})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{fmt.Sprintf("%v|%+v|%#v|%s|%q|%d|%x", key, key, key, key, key, key, key), fmt.Sprintf("%v", &svid.SVID{Key: key}), log.String(), string(js)} {
		for _, word := range []string{"D:", "ecdsa", "PublicKey", "Curve"} {
			if strings.Contains(text, word) {
				t.Errorf("shown: %s", text)
			}
		}
		if strings.Count(text, "redacted") == 0 && !strings.Contains(text, "0x") {
			t.Errorf("got %s", text)
		}
	}
	other, err := svid.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if !key.Equal(key) || key.Equal(other) || key.Equal(nil) {
		t.Error("Equal is wrong")
	}
	der, err := key.PKCS8()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x509.ParsePKCS8PrivateKey(der); err != nil {
		t.Error(err)
	}
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		i := newIssuer(t, time.Hour)
		r, _ := rotate(t, i, func(c *svid.Config) { c.Metrics = svid.NewMetrics(reg) })
		reg.MustRegister(r.ExpiryCollector())
		time.Sleep(10 * time.Second)
		want := `
# HELP castellan_agent_svid_expiry_seconds Seconds until the workload's certificate expires.
# TYPE castellan_agent_svid_expiry_seconds gauge
castellan_agent_svid_expiry_seconds{namespace="shop",pod_uid="uid-1",service_account="orders"} 3590
`
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "castellan_agent_svid_expiry_seconds"); err != nil {
			t.Error(err)
		}
		if n := testutil.CollectAndCount(reg, "castellan_agent_rotations_total"); n != 7 {
			t.Errorf("%d results are counted, want all 7 from the start", n)
		}
	})
}
