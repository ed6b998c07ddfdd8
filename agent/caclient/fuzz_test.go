package caclient_test

import (
	"testing"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
)

// FuzzAnswer: no answer makes the check panic, and none but the good one passes.
func FuzzAnswer(f *testing.F) {
	a, k := agenttest.NewAuthority(f, "fuzz"), key(f)
	w := workload(f, account)
	good := a.Elements(a.Leaf(f, agenttest.ID(account), k.Public(), time.Hour, nil))
	other := a.Leaf(f, agenttest.ID("shop/other"), k.Public(), time.Hour, nil)
	f.Add(good[0], good[1], good[2])
	f.Add(good[0][:100], good[1], good[2])
	f.Add(agenttest.PEM(other), good[1], good[2])
	f.Fuzz(func(t *testing.T, leaf, intermediate, roots string) {
		got, err := caclient.CheckChain([]string{leaf, intermediate, roots}, w, k.Public(), time.Now())
		if (got == nil) == (err == nil) {
			t.Fatalf("got %v and %v", got, err)
		}
		if err == nil && got.ID != w.ID() {
			t.Errorf("accepted %q", got.ID)
		}
	})
}

// FuzzCredential: what is read of a token never panics, and nothing unprintable passes.
func FuzzCredential(f *testing.F) {
	f.Add(agenttest.Token(account, "uid"))
	f.Add("a.e30.c")
	f.Add("a.b\r\nx: y")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := caclient.NewCredential(text)
		if err != nil {
			return
		}
		claims, err := c.Claims()
		if err == nil && claims.Account.IsZero() {
			t.Error("claims of nobody")
		}
	})
}

// FuzzMinted: no token makes the check panic, and none of another passes.
func FuzzMinted(f *testing.F) {
	w := workload(f, account)
	f.Add("eyJhbGciOiJFUzI1NiJ9.e30.AAAA")
	f.Add("")
	f.Fuzz(func(t *testing.T, token string) {
		resp := &castellanv1.MintJWTResponse{Token: token, SpiffeId: w.ID().String()}
		if got, err := caclient.CheckJWT(resp, w, []string{"a"}, time.Now()); err == nil && !got.Expires.After(time.Now()) {
			t.Error("accepted an expired one")
		}
	})
}
