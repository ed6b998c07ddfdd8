package proxy_test

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/jws/jwstest"
	"castellan.dev/internal/tlsconf/tlsconftest"
	"castellan.dev/internal/xds"
)

const (
	jwksURI = "https://issuer.example/keys"

	tokenPolicy = `
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: users, namespace: shop}
spec:
  jwtRules:
  - issuer: https://issuer.example
    jwksUri: https://issuer.example/keys
    audiences: [orders]
    fromHeaders: [{name: authorization, prefix: "Bearer "}]
    fromParams: [token]
    outputPayloadToHeader: x-user-payload
    outputClaimToHeaders: [{header: x-user, claim: sub}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: finance, namespace: shop}
spec:
  rules:
  - from: [{source: {requestPrincipals: ["https://issuer.example/*"]}}]
    when: [{key: "request.auth.claims[groups]", values: [finance]}]
---
`
)

func tokenMesh(t testing.TB) (*running, *tlsconftest.CA, *jwstest.Issuer) {
	t.Helper()
	r, ca := mesh(t, strict+tokenPolicy)
	issuer := jwstest.EC(t, "https://issuer.example", "k1")
	publishKeys(t, r.agent, jwstest.JWKS(t, issuer))
	r.agent.Settled()
	return r, ca, issuer
}

func publishKeys(t testing.TB, a *agent, keys []byte) {
	a.Table.Set(jwksType, xds.NewSnapshot(resource(t, "jwks:"+jwksURI, &castellanv1.Jwks{Source: "jwks:" + jwksURI, Jwks: keys})))
}

func TestTokens(t *testing.T) {
	r, ca, issuer := tokenMesh(t)
	caller := ca.Leaf(t, frontend)
	claims := issuer.Base(time.Now(), "orders").With(jwstest.Claims{"sub": "alice", "groups": []string{"finance"}})
	other := jwstest.EC(t, "https://issuer.example", "k1")
	good := issuer.Sign(t, claims)

	tests := map[string]struct {
		token    string
		status   int
		inReason string
	}{
		"authz-25 valid":            {token: good, status: 200},
		"authz-25 none":             {status: 403, inReason: "no ALLOW rule matches"},
		"authz-25 not in the group": {token: issuer.Sign(t, claims.With(jwstest.Claims{"groups": []string{"sales"}})), status: 403},
		"authz-25 expired":          {token: issuer.Sign(t, claims.With(jwstest.Claims{"exp": time.Now().Add(-time.Minute).Unix()})), status: 401, inReason: "expired"},
		"authz-25 wrong key":        {token: other.Sign(t, claims), status: 401},
		"authz-25 unknown issuer":   {token: issuer.Sign(t, claims.With(jwstest.Claims{"iss": "https://evil.example"})), status: 401},
		"authz-25 malformed":        {token: "a.b.c", status: 401},
		"authz-25 wrong audience":   {token: issuer.Sign(t, claims.With(jwstest.Claims{"aud": "payments"})), status: 403},
		"no expiry":                 {token: issuer.Sign(t, claims.With(jwstest.Claims{"exp": nil})), status: 401},
		"over 8 KiB":                {token: issuer.Sign(t, claims.With(jwstest.Claims{"x": strings.Repeat("x", 9000)})), status: 401},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var header []string
			if tt.token != "" {
				header = []string{"Authorization", "Bearer " + tt.token}
			}
			a := get(t, r.inbound, caller, "/?a=b", header...)
			if a.status != tt.status {
				t.Fatalf("%d %q, want %d", a.status, a.body, tt.status)
			}
			switch tt.status {
			case 401:
				if a.body != "authentication required\n" || a.header.Get("Www-Authenticate") != "Bearer" {
					t.Fatalf("%q, %v", a.body, a.header)
				}
			case 403:
				if a.body != "access denied\n" {
					t.Fatalf("%q", a.body)
				}
			}
			if tt.inReason != "" {
				r.logged(`"status":`, tt.inReason)
			}
		})
	}
	if strings.Contains(r.log.String()+r.access.String(), good) || strings.Contains(r.log.String()+r.access.String(), strings.Split(good, ".")[2]) {
		t.Fatal("a token stands in the logs")
	}
}

func TestTokenHeaders(t *testing.T) {
	r, ca, issuer := tokenMesh(t)
	caller := ca.Leaf(t, frontend)
	good := issuer.Sign(t, issuer.Base(time.Now(), "orders").With(jwstest.Claims{"sub": "alice", "groups": []string{"finance"}}))

	a := get(t, r.inbound, caller, "/", "Authorization", "Bearer "+good, "X-User", "root", "X-User-Payload", "forged")
	if got := a.echo.Header.Values("X-User"); a.status != 200 || len(got) != 1 || got[0] != "alice" {
		t.Fatalf("authz-30 claim header: %d %q", a.status, got)
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(a.echo.Header.Get("X-User-Payload"), "="))
	var got map[string]any
	if err != nil || json.Unmarshal(payload, &got) != nil || got["sub"] != "alice" {
		t.Fatalf("authz-30 payload header: %q %v", payload, err)
	}
	if a.echo.Header.Get("Authorization") != "" {
		t.Fatal("authz-30: the token was forwarded")
	}
	a = get(t, r.inbound, caller, "/p?x=1&token="+good+"&y=2")
	if a.status != 200 || a.echo.Query != "x=1&y=2" {
		t.Fatalf("authz-30 parameter: %d %q", a.status, a.echo.Query)
	}
}

// Claim headers of a request without a token are removed as well, and policy does not see them.
func TestClaimHeadersWithoutToken(t *testing.T) {
	r, ca := mesh(t, strict+strings.Split(tokenPolicy, "---\n")[0])
	a := get(t, r.inbound, ca.Leaf(t, frontend), "/", "X-User", "root", "x-user-payload", "forged")
	if a.status != 200 || a.echo.Header.Get("X-User") != "" || a.echo.Header.Get("X-User-Payload") != "" {
		t.Fatalf("%d %v", a.status, a.echo.Header)
	}
}

// authz-28: keys that cannot be had refuse tokens and nothing else; new keys count at once.
func TestTokenKeys(t *testing.T) {
	r, ca := mesh(t, strict+strings.Split(tokenPolicy, "---\n")[0])
	caller := ca.Leaf(t, frontend)
	issuer := jwstest.EC(t, "https://issuer.example", "k1")
	token := issuer.Sign(t, issuer.Base(time.Now(), "orders").With(jwstest.Claims{"sub": "alice"}))
	bearer := []string{"Authorization", "Bearer " + token}
	check := func(when string, with, without int) {
		t.Helper()
		r.agent.Settled()
		if a := get(t, r.inbound, caller, "/", bearer...); a.status != with {
			t.Fatalf("%s: %d with a token", when, a.status)
		}
		if a := get(t, r.inbound, caller, "/"); a.status != without {
			t.Fatalf("%s: %d without", when, a.status)
		}
	}
	check("no keys", 401, 200)
	publishKeys(t, r.agent, jwstest.JWKS(t, issuer))
	check("keys", 200, 200)
	publishKeys(t, r.agent, jwstest.JWKS(t, jwstest.EC(t, "https://issuer.example", "k2")))
	check("other keys", 401, 200)
	publishKeys(t, r.agent, nil)
	check("keys unavailable", 401, 200)
}

// authz-30: a CORS preflight passes without a token.
func TestPreflight(t *testing.T) {
	r, ca := mesh(t, strict+strings.Split(tokenPolicy, "---\n")[0])
	c, _ := httpClient(t, ca.Leaf(t, frontend))
	req, _ := http.NewRequest("OPTIONS", "https://"+r.inbound+"/", nil)
	req.Header.Set("Origin", "https://shop.example")
	req.Header.Set("Access-Control-Request-Method", "POST")
	req.Header.Set("Authorization", "Bearer a.b.c")
	if a := ask(t, c, req); a.status != 200 {
		t.Fatalf("%d", a.status)
	}
}

// authz-24: what is judged is what is forwarded.
func TestPathIsForwardedAsJudged(t *testing.T) {
	r, ca := mesh(t, strict+`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: shop}
spec:
  action: DENY
  rules: [{to: [{operation: {paths: ["/admin", "/admin/*"]}}]}]
`)
	caller := ca.Leaf(t, frontend)
	for path, want := range map[string]struct {
		status  int
		forward string
	}{
		"/a/b":              {200, "/a/b"},
		"/admin":            {403, ""},
		"/x/../admin":       {403, ""},
		"/%61dmin":          {403, ""},
		"/x/%2e%2e/admin/y": {403, ""},
		`/x\..\admin`:       {403, ""},
		"/./a/./b":          {200, "/a/b"},
		"/a%2fb":            {200, "/a%2Fb"},
		"/a%00b":            {400, ""},
	} {
		s := dialTLS(t, r.inbound, caller, "http/1.1")
		_, _ = s.conn.Write([]byte("GET " + path + " HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n"))
		resp, err := http.ReadResponse(s.r, nil)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		var e echo
		_ = json.NewDecoder(resp.Body).Decode(&e)
		resp.Body.Close()
		if resp.StatusCode != want.status || want.status == 200 && !strings.EqualFold(e.Path, want.forward) {
			t.Errorf("%s: %d, forwarded %q", path, resp.StatusCode, e.Path)
		}
	}
}

// authz-16: remote.ip is what the trusted proxies wrote, and no more.
func TestRemoteIP(t *testing.T) {
	const policies = strict + `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: remote, namespace: shop}
spec: {rules: [{from: [{source: {remoteIpBlocks: ["203.0.113.0/24", "2001:db8::/32"]}}]}]}
`
	for name, tt := range map[string]struct {
		trusted string
		xff     []string
		status  int
	}{
		"none trusted, header ignored":          {"0", []string{"203.0.113.9"}, 403},
		"one trusted":                           {"1", []string{"203.0.113.9"}, 200},
		"one trusted, what precedes is forged":  {"1", []string{"203.0.113.9, 198.51.100.1"}, 403},
		"two trusted":                           {"2", []string{"203.0.113.9, 198.51.100.1"}, 200},
		"two trusted, two fields":               {"2", []string{"203.0.113.9", "198.51.100.1"}, 200},
		"two trusted, one there: nobody's word": {"2", []string{"203.0.113.9"}, 403},
		"with a port":                           {"1", []string{"203.0.113.9:4711"}, 200},
		"IPv6":                                  {"1", []string{"2001:db8::1"}, 200},
		"IPv6 with brackets and port":           {"1", []string{"[2001:db8::1]:4711"}, 200},
		"no address":                            {"1", []string{"unknown"}, 403},
		"mapped":                                {"1", []string{"::ffff:203.0.113.9"}, 200},
	} {
		t.Run(name, func(t *testing.T) {
			root := tlsconftest.NewRoot(t)
			a := newAgent(t, root, orders)
			a.Secrets(a.Issuer.Leaf(t, orders), root)
			a.Policy.Mesh = []byte(`{"trustDomain":"cluster.local","rootNamespace":"castellan-system","numTrustedProxies":` + tt.trusted + `}`)
			a.Publish(policies)
			r := start(t, a, newApp(t)).ready()
			var header []string
			for _, v := range tt.xff {
				header = append(header, "X-Forwarded-For", v)
			}
			if got := get(t, r.inbound, a.Issuer.Leaf(t, frontend), "/", header...); got.status != tt.status {
				t.Fatalf("%d, want %d", got.status, tt.status)
			}
		})
	}
}
