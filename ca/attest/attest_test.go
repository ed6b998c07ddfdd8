package attest_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"castellan.dev/ca/attest"
	"castellan.dev/identity"
	"castellan.dev/internal/config"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
	"castellan.dev/internal/workloads"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const issuerName = "https://workloads.test"

// keys is a KeySource whose content and failures the test sets.
type keys struct {
	set       atomic.Pointer[jws.KeySet]
	next      atomic.Pointer[jws.KeySet] // what a refetch brings
	err       error
	refetches atomic.Int32
}

func (k *keys) Keys() (*jws.KeySet, error) {
	if s := k.set.Load(); s != nil {
		return s, nil
	}
	return nil, errors.New("never fetched")
}

func (k *keys) Err() error { return k.err }

func (k *keys) Refetch(context.Context) error {
	k.refetches.Add(1)
	if n := k.next.Load(); n != nil {
		k.set.Store(n)
	}
	return k.err
}

func set(t testing.TB, issuers ...*jwstest.Issuer) *jws.KeySet {
	t.Helper()
	s, err := jws.ParseJWKS(jwstest.JWKS(t, issuers...))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func account(t testing.TB, s string) identity.Account {
	t.Helper()
	a, err := identity.ParseAccount(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func orders() jwstest.Pod {
	return jwstest.Pod{Namespace: "shop", Account: "orders", AccountUID: "sa", Name: "orders-1", UID: "pod", Node: "node-a", NodeUID: "n"}
}

func agentPod() jwstest.Pod {
	return jwstest.Pod{Namespace: "castellan-system", Account: "castellan-agent", AccountUID: "sa-agent", Name: "agent-1", UID: "pod-agent", Node: "node-a", NodeUID: "n"}
}

// scene is an attestor with a clock, keys and pods that the test moves.
type scene struct {
	*attest.Attestor
	issuer *jwstest.Issuer
	keys   *keys
	file   atomic.Pointer[workloads.File]
	now    time.Time
}

func newScene(t testing.TB, change ...func(*attest.Config)) *scene {
	t.Helper()
	s := &scene{issuer: jwstest.EC(t, issuerName, "k1"), keys: &keys{}, now: time.Unix(1_800_000_000, 0)}
	s.keys.set.Store(set(t, s.issuer))
	s.pods(orders())
	cfg := attest.Config{
		TrustDomain:   spiffeid.RequireTrustDomainFromString("cluster.local"),
		Issuers:       []attest.Issuer{{Name: issuerName, Audiences: []string{"castellan.dev"}, Cluster: "Kubernetes", Keys: s.keys}},
		Pods:          attest.NewFilePods(s.file.Load),
		AgentAccounts: []identity.Account{account(t, "castellan-system/castellan-agent")},
		Now:           func() time.Time { return s.now },
	}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if s.Attestor, err = attest.New(cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *scene) pods(pods ...jwstest.Pod) {
	f := &workloads.File{}
	for _, p := range pods {
		f.Workloads = append(f.Workloads, workloads.Workload{Namespace: p.Namespace, ServiceAccount: p.Account,
			ServiceAccountUID: p.AccountUID, PodName: p.Name, PodUID: p.UID, Node: p.Node})
	}
	s.file.Store(f)
}

func (s *scene) creds(t testing.TB) attest.Credentials {
	return attest.Credentials{
		WorkloadToken: s.issuer.PodToken(t, s.now, orders(), "castellan.dev"),
		AgentToken:    s.issuer.PodToken(t, s.now, agentPod(), "castellan.dev"),
	}
}

func check(t *testing.T, err error, kind attest.Kind, text string) {
	t.Helper()
	var e *attest.Error
	if !errors.As(err, &e) || e.Kind != kind || !strings.Contains(err.Error(), text) || e.Reason == "" {
		t.Fatalf("error %v (%+v), want kind %d %q", err, e, kind, text)
	}
}

func TestAttested(t *testing.T) {
	s := newScene(t)
	c := s.creds(t)
	got, err := s.Attest(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if got.Workload.String() != "spiffe://cluster.local/ns/shop/sa/orders" || got.PodUID != "pod" || got.Node != "node-a" ||
		got.Cluster != "Kubernetes" || got.Attestor != attest.ByAgent || got.IsAgent {
		t.Errorf("%+v", got)
	}
	c.WorkloadToken = c.AgentToken
	got, err = s.Attest(t.Context(), c)
	if err != nil || got.Attestor != attest.ByAgentItself || !got.IsAgent || got.Workload.Account().Name() != "castellan-agent" {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestReservedIdentities: who may impersonate the pods of its node gets none of the
// mesh's own identities, though their pods run there.
func TestReservedIdentities(t *testing.T) {
	pod := func(namespace, name string) jwstest.Pod {
		return jwstest.Pod{Namespace: namespace, Account: name, AccountUID: "sa-" + name, Name: name, UID: "pod-" + name, Node: "node-a", NodeUID: "n"}
	}
	ztunnel, other := pod("mesh", "ztunnel"), pod("elsewhere", "node-proxy")
	s := newScene(t, func(c *attest.Config) {
		c.AgentAccounts = append(c.AgentAccounts, account(t, "infra/agent"))
		c.TrustedNodeAccounts = []identity.Account{account(t, "mesh/ztunnel"), account(t, "elsewhere/node-proxy")}
		c.ReservedNamespaces = []string{"root"}
	})
	s.pods(orders(), agentPod(), ztunnel, other, pod("castellan-system", "castellan-server"), pod("infra", "agent"), pod("infra", "grafana"), pod("root", "anything"))
	for asked, allowed := range map[string]bool{
		"shop/sa/orders":                       true,
		"infra/sa/grafana":                     true, // the namespace of an agent is not reserved by that
		"castellan-system/sa/castellan-agent":  false,
		"castellan-system/sa/castellan-server": false,
		"infra/sa/agent":                       false,
		"root/sa/anything":                     false,
		"mesh/sa/ztunnel":                      false,
		"elsewhere/sa/node-proxy":              false,
	} {
		t.Run("trust-02 impersonating "+asked, func(t *testing.T) {
			got, err := s.Attest(t.Context(), attest.Credentials{
				WorkloadToken: s.issuer.PodToken(t, s.now, ztunnel, "castellan.dev"),
				Impersonate:   "spiffe://cluster.local/ns/" + asked,
			})
			if !allowed {
				check(t, err, attest.Denied, "never impersonated")
				return
			}
			if err != nil || got.Attestor != attest.ByImpersonation {
				t.Fatalf("%+v, %v", got, err)
			}
		})
	}
}

// TestRotatingKeys: an unknown kid fetches the keys anew, and a withdrawn key
// ends what was verified with it, remembered agents included.
func TestRotatingKeys(t *testing.T) {
	s := newScene(t)
	old := s.creds(t)
	if _, err := s.Attest(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	next := jwstest.EC(t, issuerName, "k2")
	s.keys.next.Store(set(t, s.issuer, next))
	fresh := attest.Credentials{WorkloadToken: next.PodToken(t, s.now, orders(), "castellan.dev"), AgentToken: old.AgentToken}
	if _, err := s.Attest(t.Context(), fresh); err != nil {
		t.Fatalf("token of the new key: %v", err)
	}
	if n := s.keys.refetches.Load(); n != 1 {
		t.Errorf("%d refetches", n)
	}
	s.keys.set.Store(set(t, next))
	s.keys.next.Store(nil)
	_, err := s.Attest(t.Context(), fresh)
	check(t, err, attest.Unauthenticated, `agent token: token signed by an unknown key: kid "k1"`)
	fresh.AgentToken = next.PodToken(t, s.now, agentPod(), "castellan.dev")
	if _, err := s.Attest(t.Context(), fresh); err != nil {
		t.Fatal(err)
	}
}

// TestUnknownNow: what cannot be decided is Unavailable, never a refusal for good.
func TestUnknownNow(t *testing.T) {
	t.Run("keys never fetched", func(t *testing.T) {
		s := newScene(t)
		c := s.creds(t)
		s.keys.set.Store(nil)
		s.keys.err = errors.New("connection refused")
		_, err := s.Attest(t.Context(), c)
		check(t, err, attest.Unavailable, `keys of "https://workloads.test": connection refused`)
	})
	t.Run("unknown kid while the issuer is away", func(t *testing.T) {
		s := newScene(t)
		s.keys.err = errors.New("connection refused")
		other := jwstest.EC(t, issuerName, "k2")
		c := s.creds(t)
		c.WorkloadToken = other.PodToken(t, s.now, orders(), "castellan.dev")
		_, err := s.Attest(t.Context(), c)
		check(t, err, attest.Unavailable, "connection refused")
	})
	t.Run("known kid while the issuer is away", func(t *testing.T) {
		s := newScene(t)
		s.keys.err = errors.New("connection refused")
		if _, err := s.Attest(t.Context(), s.creds(t)); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("no view of pods", func(t *testing.T) {
		s := newScene(t)
		s.file.Store(nil)
		_, err := s.Attest(t.Context(), s.creds(t))
		check(t, err, attest.Unavailable, "pods are not known now")
	})
}

// TestRememberedAgent holds what is asked anew about a remembered agent token.
func TestRememberedAgent(t *testing.T) {
	s := newScene(t, func(c *attest.Config) { c.AgentsAreListed = true })
	s.pods(orders(), agentPod())
	c := s.creds(t)
	for range 3 {
		if _, err := s.Attest(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	s.pods(orders())
	_, err := s.Attest(t.Context(), c)
	check(t, err, attest.Denied, `UID "pod-agent" does not exist`)
	s.pods(orders(), agentPod())
	start := s.now
	s.now = start.Add(11 * time.Minute)
	c.WorkloadToken = s.creds(t).WorkloadToken
	_, err = s.Attest(t.Context(), c)
	check(t, err, attest.Unauthenticated, "agent token: token expired")
	s.now = start.Add(-time.Hour)
	c.WorkloadToken = s.creds(t).WorkloadToken
	_, err = s.Attest(t.Context(), c)
	check(t, err, attest.Unauthenticated, "agent token: token not yet valid")
}

func TestManyAgents(t *testing.T) {
	if testing.Short() {
		t.Skip("signs thousands of tokens")
	}
	s := newScene(t)
	c := s.creds(t)
	for i := range 4200 {
		c.AgentToken = s.issuer.Sign(t, s.issuer.PodClaims(s.now, agentPod(), "castellan.dev").With(jwstest.Claims{"jti": i}))
		if _, err := s.Attest(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
}

// TestIssuersAreApart: each issuer's keys, audiences and cluster are its own.
func TestIssuersAreApart(t *testing.T) {
	east := jwstest.EC(t, "https://east.test", "k1")
	eastKeys := &keys{}
	eastKeys.set.Store(set(t, east))
	s := newScene(t, func(c *attest.Config) {
		c.Issuers = append(c.Issuers, attest.Issuer{Name: east.Name, Audiences: []string{"east"}, Cluster: "east", Keys: eastKeys})
	})
	tests := map[string]struct {
		workload, agent string
		cluster         string
		kind            attest.Kind
		text            string
	}{
		"both of the other cluster": {east.PodToken(t, s.now, orders(), "east"), east.PodToken(t, s.now, agentPod(), "east"), "east", 0, ""},
		"audience of the other":     {east.PodToken(t, s.now, orders(), "castellan.dev"), east.PodToken(t, s.now, agentPod(), "east"), "", attest.Unauthenticated, "token audience"},
		"agent of another cluster":  {s.creds(t).WorkloadToken, east.PodToken(t, s.now, agentPod(), "east"), "", attest.Denied, `workload token is of cluster "Kubernetes", the agent's of "east"`},
		"says another cluster":      {s.creds(t).WorkloadToken, s.creds(t).AgentToken, "east", attest.Unauthenticated, `caller says cluster "east"`},
		"key of the other issuer": {
			(&jwstest.Issuer{Name: issuerName, KeyID: "k1", Alg: east.Alg, Key: east.Key}).PodToken(t, s.now, orders(), "castellan.dev"),
			s.creds(t).AgentToken, "", attest.Unauthenticated, "token signature wrong",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := s.Attest(t.Context(), attest.Credentials{WorkloadToken: tt.workload, AgentToken: tt.agent, ClusterID: tt.cluster})
			if tt.kind == 0 {
				if err != nil || got.Cluster != "east" {
					t.Fatalf("%+v, %v", got, err)
				}
				return
			}
			check(t, err, tt.kind, tt.text)
		})
	}
}

// TestClaimShapes: every part of the private claim is needed, of the right type.
func TestClaimShapes(t *testing.T) {
	s := newScene(t)
	k8s := func(change func(map[string]any)) jwstest.Claims {
		c := s.issuer.PodClaims(s.now, orders(), "castellan.dev")
		m := c["kubernetes.io"].(map[string]any)
		change(m)
		return c
	}
	tests := map[string]struct {
		claims jwstest.Claims
		text   string
	}{
		"claim a string":           {s.issuer.Base(s.now, "castellan.dev").With(jwstest.Claims{"kubernetes.io": "x"}), "no claim kubernetes.io"},
		"no namespace":             {k8s(func(m map[string]any) { delete(m, "namespace") }), `"" is not a namespace`},
		"namespace a number":       {k8s(func(m map[string]any) { m["namespace"] = 7 }), `"" is not a namespace`},
		"namespace a path":         {k8s(func(m map[string]any) { m["namespace"] = "shop/sa/x" }), "is not a namespace"},
		"no service account":       {k8s(func(m map[string]any) { delete(m, "serviceaccount") }), "not bound to a serviceaccount"},
		"service account a string": {k8s(func(m map[string]any) { m["serviceaccount"] = "orders" }), "not bound to a serviceaccount"},
		"no account UID":           {k8s(func(m map[string]any) { m["serviceaccount"] = map[string]any{"name": "orders"} }), "does not say the UIDs"},
		"no pod":                   {k8s(func(m map[string]any) { delete(m, "pod") }), "not bound to a pod"},
		"pod null":                 {k8s(func(m map[string]any) { m["pod"] = nil }), "not bound to a pod"},
		"no node":                  {k8s(func(m map[string]any) { delete(m, "node") }), "not bound to a node"},
		"a secret in place of one": {k8s(func(m map[string]any) { delete(m, "pod"); m["secret"] = map[string]any{"name": "x", "uid": "y"} }), "not bound to a pod"},
		"long pod UID":             {k8s(func(m map[string]any) { m["pod"] = map[string]any{"name": "orders-1", "uid": strings.Repeat("x", 300)} }), "no usable name or UID"},
		"sub of another account":   {k8s(func(m map[string]any) { m["serviceaccount"] = map[string]any{"name": "admin", "uid": "sa"} }), `sub is "system:serviceaccount:shop:orders"`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := s.creds(t)
			c.WorkloadToken = s.issuer.Sign(t, tt.claims)
			_, err := s.Attest(t.Context(), c)
			check(t, err, attest.Unauthenticated, tt.text)
		})
	}
}

func TestConfig(t *testing.T) {
	good := func() attest.Config {
		return attest.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
			Pods:        attest.NewFilePods(func() *workloads.File { return nil }),
			Issuers:     []attest.Issuer{{Name: issuerName, Audiences: []string{"x"}, Keys: &keys{}}},
		}
	}
	for name, tt := range map[string]struct {
		change func(*attest.Config)
		text   string
	}{
		"no trust domain": {func(c *attest.Config) { c.TrustDomain = spiffeid.TrustDomain{} }, "no trust domain"},
		"no pods":         {func(c *attest.Config) { c.Pods = nil }, "nothing to ask for pods"},
		"no issuer":       {func(c *attest.Config) { c.Issuers = nil }, "nobody could be attested"},
		"no audience":     {func(c *attest.Config) { c.Issuers[0].Audiences = nil }, "issuers[0]: at least one audience"},
		"twice":           {func(c *attest.Config) { c.Issuers = append(c.Issuers, c.Issuers[0]) }, "issuers[1]"},
	} {
		t.Run(name, func(t *testing.T) {
			c := good()
			tt.change(&c)
			if _, err := attest.New(c); err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("error %v, want %q", err, tt.text)
			}
		})
	}
}

// TestOpenIssuers fetches keys as configuration says: file, URL and discovery.
func TestOpenIssuers(t *testing.T) {
	is := jwstest.EC(t, issuerName, "k1")
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/.well-known/openid-configuration" {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, server.URL, server.URL+"/keys")
			return
		}
		_, _ = w.Write(jwstest.JWKS(t, is))
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(file, jwstest.JWKS(t, is), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		issuer config.TokenIssuer
		text   string
	}{
		"file":          {config.TokenIssuer{Issuer: "https://a.test", JWKSFile: file}, ""},
		"no file":       {config.TokenIssuer{Issuer: "https://a.test", JWKSFile: file + "x"}, "attestation.issuers[0].jwksFile: jws: open"},
		"url":           {config.TokenIssuer{Issuer: "https://a.test", JWKSURI: server.URL + "/keys", InsecureAllowHTTP: true}, ""},
		"url, http":     {config.TokenIssuer{Issuer: "https://a.test", JWKSURI: server.URL + "/keys"}, "attestation.issuers[0]: jws: blocked"},
		"discovery":     {config.TokenIssuer{Issuer: server.URL, OIDC: true, InsecureAllowHTTP: true}, ""},
		"no roots":      {config.TokenIssuer{Issuer: "https://a.test", JWKSURI: "https://a.test", CAFile: file}, "holds no certificate as PEM"},
		"no roots file": {config.TokenIssuer{Issuer: "https://a.test", JWKSURI: "https://a.test", CAFile: file + "x"}, "caFile: open"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			issuers, runs, err := attest.OpenIssuers([]config.TokenIssuer{tt.issuer}, nil, nil)
			if tt.text != "" {
				if err == nil || !strings.Contains(err.Error(), tt.text) {
					t.Fatalf("error %v, want %q", err, tt.text)
				}
				return
			}
			if err != nil || len(issuers) != 1 || len(runs) != 1 {
				t.Fatal(issuers, runs, err)
			}
			if err := issuers[0].Keys.Refetch(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s, err := issuers[0].Keys.Keys(); err != nil || s.Len() != 1 {
				t.Fatal(s, err)
			}
		})
	}
}
