package attest_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca/attest"
	"castellan.dev/ca/attest/attesttest"
	"castellan.dev/identity"
	"castellan.dev/internal/jws/jwstest"
)

// newReviewScene is a scene whose tokens are verified by review.
func newReviewScene(t testing.TB, change ...func(*attest.Config)) (*scene, *attesttest.Reviewer) {
	t.Helper()
	s := newScene(t)
	r := &attesttest.Reviewer{Issuer: issuerName, Keys: s.keys.Keys, Pods: s.file.Load, Now: func() time.Time { return s.now }}
	cfg := attest.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
		Reviewer:    r, ReviewAudiences: []string{"castellan.dev", "istio-ca"}, ReviewCluster: "Kubernetes",
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
	return s, r
}

func TestReviewed(t *testing.T) {
	s, r := newReviewScene(t)
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
	if got, err = s.Attest(t.Context(), c); err != nil || got.Attestor != attest.ByAgentItself || !got.IsAgent {
		t.Errorf("%+v, %v", got, err)
	}
	if n := r.Asked.Load(); n != 2 {
		t.Errorf("%d reviews of two tokens", n)
	}
	_, err = s.Attest(t.Context(), attest.Credentials{WorkloadToken: "x.y.z", AgentToken: c.AgentToken})
	check(t, err, attest.Unauthenticated, "workload token: token malformed")
	if n := r.Asked.Load(); n != 2 {
		t.Error("what is no token was reviewed")
	}
}

// TestReviewIsRememberedBriefly: an answer counts for ten seconds from its question,
// a refusal not at all, and the pod is asked for every time.
func TestReviewIsRememberedBriefly(t *testing.T) {
	s, r := newReviewScene(t)
	c := s.creds(t)
	attestOK := func() {
		t.Helper()
		if _, err := s.Attest(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	attestOK()
	s.now = s.now.Add(9 * time.Second)
	attestOK()
	if n := r.Asked.Load(); n != 2 {
		t.Errorf("%d reviews within ten seconds", n)
	}
	s.now = s.now.Add(time.Second)
	attestOK()
	if n := r.Asked.Load(); n != 4 {
		t.Errorf("%d reviews after ten seconds", n)
	}
	s.now = s.now.Add(-time.Minute) // a clock set back prolongs nothing
	c = s.creds(t)
	s.now = s.now.Add(30 * time.Second)
	attestOK()
	s.now = s.now.Add(-time.Second)
	before := r.Asked.Load()
	attestOK()
	if n := r.Asked.Load() - before; n != 2 {
		t.Errorf("%d reviews with the clock set back", n)
	}
	// The pod is gone: at once, though the review is remembered.
	s.pods()
	before = r.Asked.Load()
	_, err := s.Attest(t.Context(), c)
	check(t, err, attest.Denied, `UID "pod" does not exist`)
	if r.Asked.Load() != before {
		t.Error("reviewed again")
	}
	// And once forgotten, by the review.
	s.now = s.now.Add(11 * time.Second)
	_, err = s.Attest(t.Context(), c)
	check(t, err, attest.Unauthenticated, "token refused by its issuer")
	s.pods(orders())
	attestOK() // the refusal is not remembered
}

// TestReviewerAway: cannot be told now.
func TestReviewerAway(t *testing.T) {
	s, r := newReviewScene(t)
	refused := errors.New("connection refused")
	r.Away.Store(&refused)
	_, err := s.Attest(t.Context(), s.creds(t))
	check(t, err, attest.Unavailable, "agent token: the token's issuer cannot be asked now: connection refused")
	r.Away.Store(nil)
	if _, err := s.Attest(t.Context(), s.creds(t)); err != nil {
		t.Fatal(err)
	}
}

// TestReviewMustSayEverything: an answer without audience, pod, node or UIDs is none.
func TestReviewMustSayEverything(t *testing.T) {
	whole := attest.Review{Namespace: "shop", Account: "orders", AccountUID: "sa", PodName: "orders-1", PodUID: "pod", Node: "node-a", NodeUID: "n", Audiences: []string{"castellan.dev"}}
	for name, tt := range map[string]struct {
		change func(*attest.Review)
		text   string
	}{
		"whole":             {func(*attest.Review) {}, ""},
		"no node UID":       {func(r *attest.Review) { r.NodeUID = "" }, ""},
		"no audience":       {func(r *attest.Review) { r.Audiences = nil }, "accepts the token for []"},
		"other audience":    {func(r *attest.Review) { r.Audiences = []string{"https://kubernetes.default.svc"} }, "accepts the token for"},
		"no namespace":      {func(r *attest.Review) { r.Namespace = "" }, "is not a namespace"},
		"no account":        {func(r *attest.Review) { r.Account = "" }, "is not a service account"},
		"no account UID":    {func(r *attest.Review) { r.AccountUID = "" }, "not bound to a service account with UID"},
		"no pod":            {func(r *attest.Review) { r.PodName = "" }, "not bound to a pod"},
		"no pod UID":        {func(r *attest.Review) { r.PodUID = "" }, "not bound to a pod with UID"},
		"no node":           {func(r *attest.Review) { r.Node = "" }, "not bound to a node"},
		"a huge UID":        {func(r *attest.Review) { r.PodUID = strings.Repeat("x", 300) }, "not bound to a pod with UID"},
		"a huge UID's node": {func(r *attest.Review) { r.NodeUID = strings.Repeat("x", 300) }, "node's UID has 300 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			answer := whole
			tt.change(&answer)
			s, _ := newReviewScene(t, func(c *attest.Config) {
				c.Reviewer = reviewFunc(func() (attest.Review, error) { return answer, nil })
				c.DirectCallers = []identity.Account{account(t, "shop/orders")}
			})
			_, err := s.Attest(t.Context(), attest.Credentials{WorkloadToken: s.creds(t).WorkloadToken})
			if tt.text == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			check(t, err, attest.Unauthenticated, tt.text)
		})
	}
	_, err := attest.New(attest.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), Pods: attest.NewFilePods(nil), Reviewer: reviewFunc(nil),
	})
	if err == nil || !strings.Contains(err.Error(), "at least one audience") {
		t.Error(err)
	}
}

type reviewFunc func() (attest.Review, error)

func (f reviewFunc) Review(context.Context, string, []string) (attest.Review, error) { return f() }

// TestOneQuestionForAll: whoever brings the same token at the same time shares one
// review, and one who gives up takes it from nobody.
func TestOneQuestionForAll(t *testing.T) {
	s, r := newReviewScene(t)
	c := s.creds(t)
	r.Hold = make(chan struct{})
	synctest.Test(t, func(t *testing.T) {
		r.Hold = make(chan struct{})
		var wg sync.WaitGroup
		var ok, gaveUp atomic.Int32
		hasty, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			if _, err := s.Attest(hasty, c); err != nil {
				check(t, err, attest.Unavailable, "context canceled")
				gaveUp.Add(1)
			}
		})
		synctest.Wait()
		for range 100 {
			wg.Go(func() {
				if _, err := s.Attest(t.Context(), c); err == nil {
					ok.Add(1)
				}
			})
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		if gaveUp.Load() != 1 {
			t.Error("who gave up still waits")
		}
		close(r.Hold)
		wg.Wait()
		if ok.Load() != 100 {
			t.Errorf("%d of 100 attested", ok.Load())
		}
		if n := r.Asked.Load(); n != 2 {
			t.Errorf("%d reviews of two tokens", n)
		}
	})
}

// TestSilentReviewer: the question ends by itself.
func TestSilentReviewer(t *testing.T) {
	s, r := newReviewScene(t)
	c := s.creds(t)
	synctest.Test(t, func(t *testing.T) {
		r.Hold = make(chan struct{})
		_, err := s.Attest(t.Context(), c)
		check(t, err, attest.Unavailable, "deadline exceeded")
	})
}

// TestManyReviews: what is remembered is bounded.
func TestManyReviews(t *testing.T) {
	if testing.Short() {
		t.Skip("signs thousands of tokens")
	}
	s, _ := newReviewScene(t)
	c := s.creds(t)
	for i := range 8300 {
		c.WorkloadToken = s.issuer.Sign(t, s.issuer.PodClaims(s.now, orders(), "castellan.dev").With(jwstest.Claims{"jti": fmt.Sprint(i)}))
		if _, err := s.Attest(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if n := attest.Remembered(s.Attestor); n > 8192 || n < 4000 {
		t.Errorf("%d answers are remembered", n)
	}
	s.now = s.now.Add(time.Minute)
	c = s.creds(t)
	if _, err := s.Attest(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if n := attest.Remembered(s.Attestor); n > 2 {
		t.Errorf("%d answers are remembered though stale", n)
	}
}

// TestListedIssuersAreVerifiedHere: the reviewer is for all others.
func TestListedIssuersAreVerifiedHere(t *testing.T) {
	east := jwstest.EC(t, "https://east.test", "k1")
	eastKeys := &keys{}
	eastKeys.set.Store(set(t, east))
	s, r := newReviewScene(t, func(c *attest.Config) {
		c.Issuers = []attest.Issuer{{Name: east.Name, Audiences: []string{"east"}, Cluster: "east", Keys: eastKeys}}
	})
	got, err := s.Attest(t.Context(), attest.Credentials{
		WorkloadToken: east.PodToken(t, s.now, orders(), "east"), AgentToken: east.PodToken(t, s.now, agentPod(), "east"),
	})
	if err != nil || got.Cluster != "east" || r.Asked.Load() != 0 {
		t.Fatal(got, err, r.Asked.Load())
	}
	_, err = s.Attest(t.Context(), attest.Credentials{
		WorkloadToken: s.creds(t).WorkloadToken, AgentToken: east.PodToken(t, s.now, agentPod(), "east"),
	})
	check(t, err, attest.Denied, `workload token is of cluster "Kubernetes", the agent's of "east"`)
}
