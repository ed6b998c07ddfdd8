package discovery

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"castellan.dev/api/policy"
	"castellan.dev/internal/jws"
)

// tokens is a document of rules with the given key sets.
func tokens(namespace string, rules ...policy.JWTRule) *inForce {
	d := &inForce{ref: Ref{Kind: policy.KindRequestAuthentication, Namespace: namespace, Name: "r"}}
	d.doc.RequestAuthentication = &policy.RequestAuthentication{JWTRules: rules}
	return d
}

func ownTokens(namespace string, n int) *inForce {
	d := tokens(namespace)
	for i := range n {
		rule := policy.JWTRule{Issuer: fmt.Sprint("https://i", i), JwksURI: fmt.Sprintf("https://%s%d.test/keys", namespace, i)}
		d.doc.RequestAuthentication.JWTRules = append(d.doc.RequestAuthentication.JWTRules, rule)
	}
	return d
}

// TestKeySourcesOfANamespace: one namespace's owner cannot name so many key sets
// that those of others are not fetched.
func TestKeySourcesOfANamespace(t *testing.T) {
	wanted, refused := wantedSources([]*inForce{ownTokens("evil", 600), ownTokens("evil", 600), ownTokens("shop", 2)}, "root")
	if len(wanted) != maxSourcesOfNamespace+2 || refused["evil"] == "" || refused["shop"] != "" {
		t.Errorf("%d wanted, refused %v", len(wanted), refused)
	}
}

// TestKeySourcesInTurn: nor can the owners of some, whatever they are called; and
// who is left out is no matter of chance.
func TestKeySourcesInTurn(t *testing.T) {
	docs := []*inForce{ownTokens("zzz-root", 40), ownTokens("shop", 5)}
	for i := range 6 {
		docs = append(docs, ownTokens(fmt.Sprint("evil", i), 250))
	}
	for range 3 {
		wanted, refused := wantedSources(docs, "zzz-root")
		if len(wanted) != maxKeySources || refused["shop"] != "" || refused["zzz-root"] != "" {
			t.Errorf("%d wanted, refused %v", len(wanted), refused)
		}
		// What the two leave is shared by the six: 955 of 6, of which one has one more.
		if refused["evil0"] != "jwks:https://evil0160.test/keys" || refused["evil1"] != "jwks:https://evil1159.test/keys" || refused["evil5"] != "jwks:https://evil5159.test/keys" || len(refused) != 6 {
			t.Errorf("refused %v", refused)
		}
	}
}

// TestTimeoutOfSharedSource: whoever names a source too cannot make its timeout
// shorter than it is for others.
func TestTimeoutOfSharedSource(t *testing.T) {
	rule := func(timeout string) policy.JWTRule {
		return policy.JWTRule{Issuer: "i", JwksURI: "https://idp/keys", Timeout: timeout}
	}
	for name, row := range map[string]struct {
		docs []*inForce
		want time.Duration
	}{
		"default":     {[]*inForce{tokens("shop", rule(""))}, jws.DefaultTimeout},
		"with evil":   {[]*inForce{tokens("evil", rule("1ms")), tokens("shop", rule(""))}, jws.DefaultTimeout},
		"evil comes":  {[]*inForce{tokens("evil", rule("1ms"))}, jws.DefaultTimeout},
		"the longest": {[]*inForce{tokens("evil", rule("1ms")), tokens("shop", rule("20s")), tokens("web", rule("7s"))}, 20 * time.Second},
	} {
		if wanted, _ := wantedSources(row.docs, "root"); len(wanted) != 1 || wanted["jwks:https://idp/keys"] != row.want {
			t.Errorf("%s: %v", name, wanted)
		}
	}
}

// TestTimeoutChanges: a source takes its new timeout, and keeps its keys meanwhile.
func TestTimeoutChanges(t *testing.T) {
	slow := make(chan struct{})
	idp := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-slow }))
	defer idp.Close()
	defer close(slow)
	k := newKeySets(policy.Mesh{JWKS: policy.JWKSFetch{Allow: []string{"http", "127.0.0.0/8"}}}, slog.New(slog.DiscardHandler), time.Now)
	ctx, cancel := context.WithCancel(t.Context())
	defer k.stop()
	defer cancel()
	follow := func(timeout string) *keySource {
		k.follow(ctx, []*inForce{tokens("shop", policy.JWTRule{Issuer: "i", JwksURI: idp.URL, Timeout: timeout})})
		return k.sources["jwks:"+idp.URL]
	}
	first := follow("")
	if first.timeout != jws.DefaultTimeout {
		t.Errorf("at first %v", first.timeout)
	}
	for _, timeout := range []time.Duration{time.Minute, 10 * time.Second} {
		if s := follow(timeout.String()); s != first || s.timeout != timeout {
			t.Errorf("then %v, another source %t", s.timeout, s != first)
		}
	}
}
