package discovery

import (
	"fmt"
	"testing"

	"castellan.dev/api/policy"
)

// TestKeySourcesOfANamespace: one namespace's owner cannot name so many key sets
// that those of others are not fetched.
func TestKeySourcesOfANamespace(t *testing.T) {
	doc := func(namespace string, n int) *inForce {
		request := &policy.RequestAuthentication{}
		for i := range n {
			request.JWTRules = append(request.JWTRules, policy.JWTRule{Issuer: fmt.Sprint("https://i", i), JwksURI: fmt.Sprintf("https://%s%d.test/keys", namespace, i)})
		}
		d := &inForce{ref: Ref{Kind: policy.KindRequestAuthentication, Namespace: namespace, Name: "r"}}
		d.doc.RequestAuthentication = request
		return d
	}
	wanted, refused := wantedSources([]*inForce{doc("evil", 600), doc("evil", 600), doc("shop", 2)})
	if len(wanted) != maxSourcesOfNamespace+2 || refused["evil"] == "" || refused["shop"] != "" {
		t.Errorf("%d wanted, refused %v", len(wanted), refused)
	}
}
