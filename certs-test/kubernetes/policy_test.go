package kubernetes_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// Promise: ALLOW policies written with kubectl are enforced: a pod of the wrong
// service account is refused, whatever it speaks.
func TestAllow(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns = "allow"
	namespace(t, ns, injected)
	service(t, ns, "api")
	callee := one(t, ns, pod{Name: "api", Node: "node-2"})
	everyProtocol(t, from.other, "api."+ns, "")
	apply(t, `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web-only, namespace: allow}
spec:
  selector: {matchLabels: {app: api}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/callers/sa/web"]}}]
`)
	from.other.answers(t, 403, "http://api."+ns+"/")
	from.other.answers(t, 403, callee.url(control.HTTP, "/"))
	for _, c := range []control.Call{
		{Kind: "grpc", URL: "api." + ns + ":9090"},
		{Kind: "websocket", URL: "ws://api." + ns + "/ws", Body: "x"},
		{Kind: "tcp", URL: "api." + ns + ":9000", Body: "x"},
		{Kind: "greeting", URL: "api." + ns + ":9001", Body: "x"},
		{Kind: "h2c", URL: "http://api." + ns + ":9002/"},
	} {
		if c.Kind == "grpc" {
			from.other.fails(t, c, "PermissionDenied")
		} else {
			from.other.fails(t, c)
		}
	}
	from.plain.answers(t, 403, callee.url(control.HTTP, "/")) // has no identity at all
	for _, caller := range []*app{from.web, from.far} {
		everyProtocol(t, caller, "api."+ns, "")
	}
}

// Promise: DENY beats ALLOW, and what a policy says of HTTP is enforced.
func TestDeny(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns = "deny"
	namespace(t, ns, injected)
	service(t, ns, "api")
	one(t, ns, pod{Name: "api", Node: "node-1"})
	url := "http://api." + ns
	apply(t, `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: all, namespace: deny}
spec: {rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: deny}
spec:
  selector: {matchLabels: {app: api}}
  action: DENY
  rules:
  - from: [{source: {notPrincipals: ["cluster.local/ns/callers/sa/web"]}}]
    to: [{operation: {paths: ["/admin*"], ports: ["8080"]}}]
  - to: [{operation: {methods: ["DELETE"], ports: ["8080"]}}]
`)
	from.other.answers(t, 403, url+"/admin/x")
	from.other.answers(t, 403, url+"/x/../admin/x")
	from.web.reaches(t, url+"/admin/x")
	from.other.reaches(t, url+"/")
	from.web.hears(t, 403, control.Call{Kind: "http", URL: url + "/", Method: "DELETE"})
	// Taken away, it is no longer enforced.
	if _, err := kubectl("", "delete", "authorizationpolicy", "-n", ns, "no-admin"); err != nil {
		t.Fatal(err)
	}
	from.other.reaches(t, url+"/admin/x")
}

// tokens signs end-user tokens.
type tokens struct {
	t      *testing.T
	signer jose.Signer
	// JWKS is its public key, as a policy holds it.
	JWKS string
}

func newTokens(t *testing.T) *tokens {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public := jose.JSONWebKey{Key: key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}})
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &tokens{t: t, signer: signer, JWKS: string(set)}
}

// bearer is an Authorization header.
func (k *tokens) bearer(issuer, subject string, expires time.Duration, claims any) string {
	k.t.Helper()
	now := time.Now()
	token, err := jwt.Signed(k.signer).Claims(jwt.Claims{
		Issuer: issuer, Subject: subject, Audience: jwt.Audience{"shop"},
		IssuedAt: jwt.NewNumericDate(now.Add(-time.Hour)), Expiry: jwt.NewNumericDate(now.Add(expires)),
	}).Claims(claims).Serialize()
	if err != nil {
		k.t.Fatal(err)
	}
	return "Bearer " + token
}

// Promise: end users' tokens, by RequestAuthentication and AuthorizationPolicy.
func TestJWT(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns, issuer = "jwt", "https://issuer.example.org"
	namespace(t, ns, injected)
	service(t, ns, "api")
	one(t, ns, pod{Name: "api", Node: "node-2"})
	keys := newTokens(t)
	apply(t, fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: users, namespace: jwt}
spec:
  selector: {matchLabels: {app: api}}
  jwtRules:
  - issuer: %q
    audiences: [shop]
    jwks: '%s'
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: users, namespace: jwt}
spec:
  selector: {matchLabels: {app: api}}
  rules:
  - from: [{source: {requestPrincipals: ["%s/*"]}}]
    to: [{operation: {paths: ["/user"], ports: ["8080"]}}]
  - from: [{source: {requestPrincipals: ["*"]}}]
    when: [{key: "request.auth.claims[groups]", values: [admins]}]
    to: [{operation: {paths: ["/admin"], ports: ["8080"]}}]
`, issuer, keys.JWKS, issuer))
	url := "http://api." + ns
	user := keys.bearer(issuer, "ann", time.Hour, object{})
	admin := keys.bearer(issuer, "bob", time.Hour, object{"groups": []string{"admins"}})
	from.web.answers(t, 403, url+"/user")
	from.web.reaches(t, url+"/user", "Authorization", user)
	from.web.answers(t, 403, url+"/admin", "Authorization", user)
	r := from.web.reaches(t, url+"/admin", "Authorization", admin)
	if got := r.Seen.Header["Authorization"]; len(got) > 0 {
		t.Error("the token went on to the application")
	}
	from.web.answers(t, 401, url+"/user", "Authorization", keys.bearer(issuer, "ann", -time.Minute, object{}))
	from.web.answers(t, 401, url+"/user", "Authorization", newTokens(t).bearer(issuer, "ann", time.Hour, object{}))
	from.web.answers(t, 401, url+"/user", "Authorization", "Bearer nonsense")
	from.web.answers(t, 401, url+"/user", "Authorization", keys.bearer("https://other.example.org", "ann", time.Hour, object{}))
}

// Promise: what cannot be represented is refused when it is written, with the field's
// path, the value and what is allowed; what is risky is warned of.
func TestPoliciesAreValidated(t *testing.T) {
	t.Parallel()
	needCluster(t)
	const ns = "validated"
	namespace(t, ns, injected)
	policy := func(kind, name, spec string) string {
		return "apiVersion: security.istio.io/v1\nkind: " + kind + "\nmetadata: {name: " + name + ", namespace: " + ns + "}\nspec: " + spec + "\n"
	}
	for name, c := range map[string]struct {
		kind, spec string
		says       []string
	}{
		"unknown key":   {"AuthorizationPolicy", `{rules: [{when: [{key: "request.body", values: [x]}]}]}`, []string{"spec.rules[0].when[0].key", "request.body", "request.headers[NAME]"}},
		"bad range":     {"AuthorizationPolicy", `{rules: [{from: [{source: {ipBlocks: ["10.0.0.0/99"]}}]}]}`, []string{"spec.rules[0].from[0].source.ipBlocks[0]", "10.0.0.0/99"}},
		"unknown field": {"AuthorizationPolicy", `{rules: [{from: [{source: {principal: ["x"]}}]}]}`, []string{"principal"}},
		"bad action":    {"AuthorizationPolicy", `{action: PERMIT, rules: [{}]}`, []string{"action", "PERMIT", "ALLOW"}},
		"DENY of all":   {"AuthorizationPolicy", `{action: DENY}`, []string{"rules"}},
		"bad port":      {"PeerAuthentication", `{selector: {matchLabels: {app: x}}, portLevelMtls: {"08080": {mode: STRICT}}}`, []string{"validation.castellan.dev", `spec.portLevelMtls["08080"]`, "1 to 65535"}},
		"bad keys":      {"RequestAuthentication", `{jwtRules: [{issuer: a, audiences: [a], jwks: "nonsense"}]}`, []string{"validation.castellan.dev", "spec.jwtRules[0].jwks", `{"keys": [...]}`}},
	} {
		r, err := applied(policy(c.kind, "bad", c.spec))
		if err == nil {
			t.Fatalf("%s is applied: %s", name, r)
		}
		for _, s := range c.says {
			if !strings.Contains(r.err, s) {
				t.Errorf("%s: the refusal lacks %q: %s", name, s, r.err)
			}
		}
	}
	for _, c := range []struct{ spec, warning string }{
		{`{}`, "denies every request"},
		{`{selector: {matchLabels: {app: nobody}}, rules: [{}]}`, "selects no workload"},
		{`{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}`, "HTTP only: on a TCP port this field is dropped"},
	} {
		r := apply(t, policy("AuthorizationPolicy", "risky", c.spec))
		if !strings.Contains(r.err, "Warning: ") || !strings.Contains(r.err, c.warning) {
			t.Errorf("%s: no warning that it %s: %s", c.spec, c.warning, r)
		}
		// Each is told of before the next: the server says the same twice, and may.
		programmed(t, ns, "risky")
	}
	// The older version of the API is served too.
	apply(t, strings.Replace(policy("AuthorizationPolicy", "older", `{rules: [{}]}`), "/v1\n", "/v1beta1\n", 1))
	programmed(t, ns, "older")
}

// Promise: what the kinds' own rules say is refused by the API server itself, also where
// no webhook answers.
func TestSchemaRefuses(t *testing.T) {
	t.Parallel()
	needCluster(t)
	for name, c := range map[string]struct{ kind, spec, says string }{
		"selector and targetRefs":    {"AuthorizationPolicy", `{selector: {matchLabels: {app: x}}, targetRefs: [{group: "", kind: Service, name: x}], rules: [{}]}`, "only one of targetRefs or selector"},
		"accounts and principals":    {"AuthorizationPolicy", `{rules: [{from: [{source: {serviceAccounts: [a], principals: [b]}}]}]}`, "serviceAccounts"},
		"ports without a selector":   {"PeerAuthentication", `{portLevelMtls: {"8080": {mode: STRICT}}}`, "portLevelMtls requires selector"},
		"a port that is none":        {"PeerAuthentication", `{selector: {matchLabels: {app: x}}, portLevelMtls: {"99999": {mode: STRICT}}}`, "port must be between"},
		"keys twice":                 {"RequestAuthentication", `{jwtRules: [{issuer: a, jwks: "{}", jwksUri: "https://example.org"}]}`, "only one of jwks or jwksUri"},
		"keys over another protocol": {"RequestAuthentication", `{jwtRules: [{issuer: a, jwksUri: "ftp://example.org"}]}`, "http"},
		"a wildcard in a selector":   {"AuthorizationPolicy", `{selector: {matchLabels: {app: "x*"}}, rules: [{}]}`, "wildcard"},
	} {
		text := refused(t, "apiVersion: security.istio.io/v1\nkind: "+c.kind+"\nmetadata: {name: bad, namespace: default}\nspec: "+c.spec+"\n")
		if !strings.Contains(text, c.says) || strings.Contains(text, "admission webhook") {
			t.Errorf("%s: %s", name, text)
		}
	}
}
