package cli_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// decided is the JSON of can-i.
type decided struct {
	Allowed bool     `json:"allowed"`
	Code    int      `json:"code"`
	Action  string   `json:"action"`
	Policy  string   `json:"policy"`
	Rule    int      `json:"rule"`
	Reason  string   `json:"reason"`
	From    string   `json:"from"`
	To      string   `json:"to"`
	Request string   `json:"request"`
	Shadow  string   `json:"shadow"`
	Steps   []string `json:"steps"`
	// On a cluster.
	Pods      []string  `json:"pods"`
	Enforced  string    `json:"enforced"`
	Warnings  []string  `json:"warnings"`
	Endpoints []decided `json:"endpoints"`
}

// users is an issuer of end-user tokens.
type users struct {
	signer jose.Signer
	jwks   string
}

const usersIssuer = "https://users.example"

func newUsers(t testing.TB) *users {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	return &users{signer: signer, jwks: string(jwks)}
}

// token writes a token of subject alice to a file.
func (u *users) token(t testing.TB, expiry time.Duration, audience string, more map[string]any) string {
	t.Helper()
	claims := jwt.Claims{Issuer: usersIssuer, Subject: "alice", Audience: jwt.Audience{audience}, Expiry: jwt.NewNumericDate(time.Now().Add(expiry))}
	token, err := jwt.Signed(u.signer).Claims(claims).Claims(more).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "token", []byte(token+"\n"))
}

func (u *users) policy() string {
	return `
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: users, namespace: shop}
spec:
  selector: {matchLabels: {app: payments}}
  jwtRules: [{issuer: "` + usersIssuer + `", audiences: [payments], jwks: '` + u.jwks + `', outputClaimToHeaders: [{header: x-group, claim: group}]}]
`
}

// policyOf is one AuthorizationPolicy of the namespace shop.
func policyOf(name, spec string) string {
	return fmt.Sprintf("---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: %s, namespace: shop}\nspec: %s\n", name, spec)
}

func modeOf(namespace, name, spec string) string {
	return fmt.Sprintf("---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: %s, namespace: %s}\nspec: %s\n", name, namespace, spec)
}

func TestCanI(t *testing.T) {
	issuer, others := newUsers(t), newUsers(t)
	valid := issuer.token(t, time.Hour, "payments", map[string]any{"groups": []string{"finance"}, "group": "finance"})
	strict := modeOf("castellan-system", "default", "{mtls: {mode: STRICT}}")
	orders := policyOf("orders", `{selector: {matchLabels: {app: orders}}, rules: [{from: [{source: {principals: ["cluster.local/ns/shop/sa/frontend"]}}], to: [{operation: {methods: [GET]}}]}]}`)
	payments := issuer.policy() + policyOf("payments", `{selector: {matchLabels: {app: payments}}, rules: [{from: [{source: {requestPrincipals: ["`+usersIssuer+`/*"]}}], when: [{key: "request.auth.claims[groups]", values: [finance]}]}]}`)
	rule := func(spec string) string { return policyOf("p", "{rules: ["+spec+"]}") }
	deny := func(spec string) string { return policyOf("p", "{action: DENY, rules: ["+spec+"]}") }
	from := func(args ...string) []string {
		return append([]string{"--from", "shop/frontend", "--to", "shop/orders"}, args...)
	}
	mesh := func(text string) string { return writeFile(t, "mesh.yaml", []byte(text)) }

	tests := map[string]struct {
		policies string
		args     []string
		code     int    // of HTTP
		policy   string // that decided
		reason   string
		request  string
	}{
		"no policy at all":  {"", from("GET", "/"), 200, "", "no ALLOW policy", "GET /"},
		"allowed by rule":   {orders, from("GET", "/"), 200, "shop/orders", "allowed by rule", ""},
		"no rule matches":   {orders, from("POST", "/"), 403, "", "no ALLOW rule matches", ""},
		"denied by rule":    {deny(`{to: [{operation: {paths: ["/admin*"]}}]}`), from("GET", "/admin/x"), 403, "shop/p", "denied by rule", ""},
		"nothing is denied": {deny(`{to: [{operation: {paths: ["/admin*"]}}]}`), from("GET", "/adm"), 200, "", "no ALLOW policy", ""},

		// Callers.
		"by SPIFFE ID":                 {orders, []string{"--from", frontendID, "--to", "shop/orders", "GET", "/"}, 200, "shop/orders", "", ""},
		"anonymous, STRICT":            {strict, []string{"--from", "none", "--to", "shop/orders", "GET", "/"}, 403, "", "mutual TLS is required (STRICT) and the caller has no certificate", ""},
		"anonymous, PERMISSIVE":        {"", []string{"--from", "none", "--to", "shop/orders", "GET", "/"}, 200, "", "no ALLOW policy", ""},
		"anonymous, rule wants one":    {orders, []string{"--from", "none", "--to", "shop/orders", "GET", "/"}, 403, "", "no ALLOW rule matches", ""},
		"foreign trust domain":         {"", []string{"--from", "spiffe://evil.example/ns/shop/sa/frontend", "--to", "shop/orders", "GET", "/"}, 403, "", `the handshake fails: trust domain "evil.example" is neither the mesh's ("cluster.local") nor an alias of it`, ""},
		"alias of the trust domain":    {orders, []string{"--from", "spiffe://old.example/ns/shop/sa/frontend", "--to", "shop/orders", "GET", "/", "--mesh", mesh("trustDomainAliases: [old.example]")}, 200, "shop/orders", "", ""},
		"an identity of another shape": {"", []string{"--from", "spiffe://cluster.local/vm/7", "--to", "shop/orders", "GET", "/"}, 200, "", "", ""},
		"DISABLE hides the caller":     {modeOf("shop", "default", "{mtls: {mode: DISABLE}}") + orders, from("GET", "/"), 403, "", "no ALLOW rule matches", ""},

		// Modes by port.
		"portLevelMtls, its port":    {modeOf("shop", "m", "{selector: {matchLabels: {app: orders}}, mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: PERMISSIVE}}}"), []string{"--from", "none", "--to", "shop/orders", "--port", "9090", "GET", "/"}, 200, "", "", ""},
		"portLevelMtls, other port":  {modeOf("shop", "m", "{selector: {matchLabels: {app: orders}}, mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: PERMISSIVE}}}"), []string{"--from", "none", "--to", "shop/orders", "GET", "/"}, 403, "", "STRICT", ""},
		"namespace's mode over mesh": {strict + modeOf("shop", "default", "{mtls: {mode: PERMISSIVE}}"), []string{"--from", "none", "--to", "shop/orders", "GET", "/"}, 200, "", "", ""},

		// Receivers.
		"labelled by account":    {orders, []string{"--from", "shop/frontend", "--to", "shop/payments", "POST", "/"}, 200, "", "no ALLOW policy", ""},
		"labels as given":        {orders, []string{"--from", "shop/frontend", "--to", "shop/payments", "--to-labels", "app=orders", "POST", "/"}, 403, "", "", ""},
		"labels, several at one": {policyOf("v2", `{selector: {matchLabels: {app: orders, version: v2}}}`), []string{"--from", "shop/frontend", "--to", "shop/orders", "--to-labels", "app=orders,version=v2", "GET", "/"}, 403, "", "no ALLOW rule matches", ""},
		"labels, repeated":       {policyOf("v2", `{selector: {matchLabels: {app: orders, version: v2}}}`), []string{"--from", "shop/frontend", "--to", "shop/orders", "--to-labels", "app=orders", "--to-labels", "version=v2", "GET", "/"}, 403, "", "", ""},
		"root namespace of mesh": {strings.ReplaceAll(policyOf("all", "{}"), "shop", "ops"), from("GET", "/", "--mesh", mesh("rootNamespace: ops")), 403, "", "no ALLOW rule matches", ""},

		// Attributes of the request.
		"port":                  {rule(`{to: [{operation: {ports: ["9090"]}}]}`), from("GET", "/", "--port", "9090"), 200, "shop/p", "", ""},
		"port by default":       {rule(`{to: [{operation: {ports: ["8080"]}}]}`), from("GET", "/"), 200, "shop/p", "", ""},
		"host":                  {rule(`{to: [{operation: {hosts: ["api.example"]}}]}`), from("GET", "/", "--host", "API.example"), 200, "shop/p", "", ""},
		"host by default":       {rule(`{to: [{operation: {hosts: ["orders.shop"]}}]}`), from("GET", "/"), 200, "shop/p", "", ""},
		"header":                {rule(`{when: [{key: "request.headers[x-team]", values: [blue]}]}`), from("GET", "/", "--header", "X-Team=blue"), 200, "shop/p", "", ""},
		"header, other value":   {rule(`{when: [{key: "request.headers[x-team]", values: [blue]}]}`), from("GET", "/", "--header", "x-team=red"), 403, "", "", ""},
		"header, twice":         {deny(`{when: [{key: "request.headers[x-team]", values: [blue]}]}`), from("GET", "/", "--header", "x-team=red", "--header", "x-team=blue"), 403, "shop/p", "", ""},
		"header with = in it":   {rule(`{when: [{key: "request.headers[x-q]", values: ["a=b"]}]}`), from("GET", "/", "--header", "x-q=a=b"), 200, "shop/p", "", ""},
		"source address":        {rule(`{from: [{source: {ipBlocks: ["10.0.0.0/8"]}}]}`), from("GET", "/", "--source-ip", "10.1.2.3"), 200, "shop/p", "", ""},
		"source address, IPv6":  {rule(`{from: [{source: {ipBlocks: ["2001:db8::/32"]}}]}`), from("GET", "/", "--source-ip", "2001:db8::1"), 200, "shop/p", "", ""},
		"remote address":        {rule(`{from: [{source: {remoteIpBlocks: ["203.0.113.0/24"]}}]}`), from("GET", "/", "--remote-ip", "203.0.113.9"), 200, "shop/p", "", ""},
		"remote is source":      {rule(`{from: [{source: {remoteIpBlocks: ["10.0.0.0/8"]}}]}`), from("GET", "/", "--source-ip", "10.1.2.3"), 200, "shop/p", "", ""},
		"forwarded, trusted":    {rule(`{from: [{source: {remoteIpBlocks: ["203.0.113.0/24"]}}]}`), from("GET", "/", "--header", "x-forwarded-for=203.0.113.9, 10.0.0.1", "--mesh", mesh("numTrustedProxies: 2")), 200, "shop/p", "", ""},
		"forwarded, untrusted":  {rule(`{from: [{source: {remoteIpBlocks: ["203.0.113.0/24"]}}]}`), from("GET", "/", "--header", "x-forwarded-for=203.0.113.9"), 403, "", "", ""},
		"SNI":                   {rule(`{when: [{key: connection.sni, values: ["orders.example"]}]}`), from("GET", "/", "--sni", "orders.example"), 200, "shop/p", "", ""},
		"SNI, none":             {rule(`{when: [{key: connection.sni, values: ["orders.example"]}]}`), from("GET", "/"), 403, "", "", ""},
		"a caller's own XFCC":   {rule(`{when: [{key: "request.headers[x-forwarded-client-cert]", values: ["*admin"]}]}`), from("GET", "/", "--header", "x-forwarded-client-cert=URI=spiffe://cluster.local/ns/x/sa/admin"), 403, "", "no ALLOW rule matches", ""},
		"the proxy's own XFCC":  {rule(`{when: [{key: "request.headers[x-forwarded-client-cert]", values: ["*URI=` + frontendID + `"]}]}`), from("GET", "/"), 200, "shop/p", "", ""},
		"several sources: ORed": {rule(`{from: [{source: {namespaces: [ops]}}, {source: {namespaces: [shop]}}]}`), from("GET", "/"), 200, "shop/p", "", ""},

		// Paths.
		"dots and slashes":       {rule(`{to: [{operation: {paths: ["/b"]}}]}`), from("GET", "/a/../b"), 200, "shop/p", "", "GET /b"},
		"query is not path":      {rule(`{to: [{operation: {paths: ["/b"]}}]}`), from("GET", "/b?x=/c"), 200, "shop/p", "", "GET /b"},
		"merged slashes":         {rule(`{to: [{operation: {paths: ["/a/b"]}}]}`), from("GET", "//a///b", "--mesh", mesh("pathNormalization: MERGE_SLASHES")), 200, "shop/p", "", "GET /a/b"},
		"encoded slash, decoded": {rule(`{to: [{operation: {paths: ["/a/b"]}}]}`), from("GET", "/a%2Fb", "--mesh", mesh("pathNormalization: DECODE_AND_MERGE_SLASHES")), 200, "shop/p", "", "GET /a/b"},
		"not normalised":         {rule(`{to: [{operation: {paths: ["/a/../b"]}}]}`), from("GET", "/a/../b", "--mesh", mesh("pathNormalization: NONE")), 200, "shop/p", "", "GET /a/../b"},
		"NUL in the path":        {"", from("GET", "/a%00"), 400, "", "the proxy refuses the request before policy is asked", ""},
		"bad percent":            {"", from("GET", "/a%2"), 400, "", "", ""},
		"above the root":         {"", from("GET", "/../../etc/passwd"), 200, "", "", "GET /etc/passwd"},
		"space":                  {"", from("GET", "/a b"), 400, "", "malformed request target", ""},
		"lower-case method":      {"", from("get", "/"), 400, "", "method is not an upper-case token", ""},
		"bad header name":        {"", from("GET", "/", "--header", "a b=c"), 400, "", "malformed field name", ""},
		"smuggling":              {"", from("GET", "/", "--header", "transfer-encoding=chunked", "--header", "content-length=3"), 400, "", "Content-Length and Transfer-Encoding", ""},
		"OPTIONS *":              {"", from("OPTIONS", "*"), 200, "", "", "OPTIONS *"},
		"absolute form":          {rule(`{to: [{operation: {paths: ["/b"]}}]}`), from("GET", "http://orders.shop/b"), 200, "shop/p", "", "GET /b"},

		// TCP.
		"tcp, allowed by port":        {rule(`{to: [{operation: {ports: ["9000"]}}]}`), from("--tcp", "--port", "9000"), 200, "shop/p", "", "tcp port 9000"},
		"tcp, other port":             {rule(`{to: [{operation: {ports: ["9000"]}}]}`), from("--tcp", "--port", "9001"), 403, "", "", ""},
		"tcp, ALLOW on HTTP fields":   {rule(`{to: [{operation: {methods: [GET]}}]}`), from("--tcp"), 403, "", "port 8080 declares no protocol and has rules about HTTP: what is not HTTP is refused there", ""},
		"tcp, DENY on HTTP fields":    {deny(`{to: [{operation: {methods: [GET]}}]}`), from("--tcp"), 403, "", "what is not HTTP is refused there", ""},
		"tcp, end-user tokens":        {strings.ReplaceAll(issuer.policy(), "payments}", "orders}"), from("--tcp"), 403, "", "what is not HTTP is refused there", ""},
		"tcp, HTTP on another port":   {rule(`{to: [{operation: {ports: ["9000"]}}]}, {to: [{operation: {methods: [GET], ports: ["8080"]}}]}`), from("--tcp", "--port", "9000"), 200, "shop/p", "", "tcp port 9000"},
		"tcp, a rule means bytes":     {rule(`{to: [{operation: {ports: ["9000"]}}]}, {to: [{operation: {methods: [GET]}}]}`), from("--tcp", "--port", "9000"), 200, "shop/p", "", "tcp port 9000"},
		"no request is GET /":         {rule(`{to: [{operation: {methods: [GET], paths: ["/"]}}]}`), from(), 200, "shop/p", "", "GET /"},
		"request by flags":            {rule(`{to: [{operation: {methods: [POST], paths: ["/pay"]}}]}`), from("--method", "POST", "--path", "/pay"), 200, "shop/p", "", "POST /pay"},
		"path by flag":                {rule(`{to: [{operation: {methods: [GET], paths: ["/pay"]}}]}`), from("--path", "/pay"), 200, "shop/p", "", "GET /pay"},
		"tcp, remote address":         {rule(`{from: [{source: {remoteIpBlocks: ["203.0.113.0/24"]}}]}`), from("--tcp", "--remote-ip", "203.0.113.9"), 200, "shop/p", "", ""},
		"tcp, anonymous under STRICT": {strict, []string{"--from", "none", "--to", "shop/orders", "--tcp"}, 403, "", "STRICT", "tcp port 8080"},
		"tcp, SNI":                    {rule(`{when: [{key: connection.sni, values: [db]}]}`), from("--tcp", "--sni", "db"), 200, "shop/p", "", ""},
		"CUSTOM is denied, unasked":   {policyOf("c", "{action: CUSTOM, provider: {name: ext}, rules: [{}]}"), from("GET", "/", "--mesh", mesh("extensionProviders: [{name: ext, address: '127.0.0.1:9'}]")), 403, "shop/c", "custom: provider ext is not asked here", ""},
		"CUSTOM, provider not known":  {policyOf("c", "{action: CUSTOM, provider: {name: ext}, rules: [{}]}"), from("GET", "/"), 403, "shop/c", "custom provider unresolved", ""},
		"AUDIT decides nothing":       {policyOf("a", "{action: AUDIT, rules: [{}]}"), from("GET", "/"), 200, "", "no ALLOW policy", ""},

		// End-user tokens.
		"token":                       {payments, []string{"--from", "none", "--to", "shop/payments", "--jwt", valid, "POST", "/"}, 200, "shop/payments", "allowed by rule", ""},
		"token as a header":           {payments, []string{"--from", "none", "--to", "shop/payments", "--header", "authorization=Bearer " + readFile(t, valid), "POST", "/"}, 200, "shop/payments", "", ""},
		"no token":                    {payments, []string{"--from", "none", "--to", "shop/payments", "POST", "/"}, 403, "", "no ALLOW rule matches", ""},
		"token without the group":     {payments, []string{"--from", "none", "--to", "shop/payments", "--jwt", issuer.token(t, time.Hour, "payments", nil), "POST", "/"}, 403, "", "no ALLOW rule matches", ""},
		"expired token":               {payments, []string{"--from", "none", "--to", "shop/payments", "--jwt", issuer.token(t, -time.Hour, "payments", nil), "POST", "/"}, 401, "", "expired", ""},
		"token for others":            {payments, []string{"--from", "none", "--to", "shop/payments", "--jwt", issuer.token(t, time.Hour, "orders", nil), "POST", "/"}, 403, "", "audience", ""},
		"token of another key":        {payments, []string{"--from", "none", "--to", "shop/payments", "--jwt", others.token(t, time.Hour, "payments", nil), "POST", "/"}, 401, "", "", ""},
		"no token at all in the file": {payments, []string{"--from", "none", "--to", "shop/payments", "--jwt", writeFile(t, "garbage", []byte("hello")), "POST", "/"}, 401, "", "", ""},
		"claim header, verified":      {payments + rule(`{when: [{key: "request.headers[x-group]", values: [finance]}]}`), []string{"--from", "none", "--to", "shop/payments", "--jwt", issuer.token(t, time.Hour, "payments", map[string]any{"group": "finance"}), "POST", "/"}, 200, "shop/p", "", ""},
		"claim header, spoofed":       {payments + rule(`{when: [{key: "request.headers[x-group]", values: [finance]}]}`), []string{"--from", "none", "--to", "shop/payments", "--header", "x-group=finance", "POST", "/"}, 403, "", "", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if tt.policies != "" {
				if err := os.WriteFile(filepath.Join(dir, "p.yaml"), []byte(tt.policies), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want := 2
			if tt.code == 200 {
				want = 0
			}
			args := append(append([]string{"authz", "can-i"}, tt.args...), "-f", dir)
			var d decided
			castellanRun(t, append(args, "-o", "json")...).want(t, want).decode(t, &d)
			if d.Code != tt.code || d.Allowed != (tt.code == 200) || d.Policy != tt.policy || !strings.Contains(d.Reason, tt.reason) || d.Reason == "" {
				t.Fatalf("%+v", d)
			}
			if (d.Policy == "" || strings.HasPrefix(d.Reason, "no ")) && d.Rule != -1 || d.Policy != "" && d.Rule != 0 || d.Steps != nil {
				t.Errorf("%+v", d)
			}
			if tt.request != "" && d.Request != tt.request {
				t.Errorf("request %q, want %q", d.Request, tt.request)
			}
			// The same in words, with and without the steps.
			verdict := fmt.Sprintf("denied (%d): ", tt.code)
			if d.Allowed {
				verdict = "allowed: "
			}
			r := castellanRun(t, args...).want(t, want)
			if !strings.HasPrefix(r.out, verdict+d.From+" -> "+d.To+" "+d.Request+": "+d.Reason) || strings.Count(r.out, "\n") != 1 {
				t.Errorf("%s", r.out)
			}
			explained := castellanRun(t, append(args, "--explain")...).want(t, want)
			if !strings.HasPrefix(explained.out, r.out) || !strings.Contains(explained.out, "\n  decision: ") {
				t.Errorf("%s", explained.out)
			}
		})
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// --explain names for every rule the fields that keep it from matching.
func TestCanIExplain(t *testing.T) {
	issuer := newUsers(t)
	dir := t.TempDir()
	policies := modeOf("shop", "default", "{mtls: {mode: STRICT}}") + "---" + issuer.policy() +
		policyOf("guests", `{action: DENY, rules: [{from: [{source: {namespaces: [guest]}}]}]}`) +
		policyOf("payments", `{rules: [
  {from: [{source: {principals: ["cluster.local/ns/shop/sa/admin"], ipBlocks: ["127.0.0.0/8"]}}, {source: {namespaces: [ops]}}], to: [{operation: {methods: [POST], paths: ["/pay"]}}]},
  {when: [{key: "request.headers[x-a]", values: [b]}, {key: "request.auth.claims[groups]", values: [finance]}]},
  {to: [{operation: {methods: [POST]}}]}]}`) +
		"---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: try, namespace: shop, annotations: {istio.io/dry-run: \"true\"}}\nspec: {action: DENY, rules: [{to: [{operation: {methods: [POST]}}]}]}\n"
	if err := os.WriteFile(filepath.Join(dir, "p.yaml"), []byte(policies), 0o600); err != nil {
		t.Fatal(err)
	}
	token := issuer.token(t, time.Hour, "payments", map[string]any{"groups": []string{"finance"}})
	var d decided
	castellanRun(t, "authz", "can-i", "--from", "shop/frontend", "--to", "shop/payments", "-f", dir, "--jwt", token, "--explain", "-o", "json", "POST", "/x/..//pay").want(t, 0).decode(t, &d)
	for _, want := range []string{
		"selects shop/payments: PeerAuthentication shop/default",
		"selects shop/payments: AuthorizationPolicy shop/guests (DENY)",
		"selects shop/payments: RequestAuthentication shop/users",
		"mutual TLS on port 8080: STRICT",
		`path "/x/..//pay" is judged and forwarded as "//pay"`,
		`token of issuer "` + usersIssuer + `" verified: subject "alice"`,
		"DENY shop/guests rule 0: does not match: from[0].source.namespaces",
		"ALLOW shop/payments rule 0: does not match: from[0].source.principals, from[1].source.namespaces, to[0].operation.paths",
		"ALLOW shop/payments rule 1: does not match: when[0] (request.headers[x-a])",
		"ALLOW shop/payments rule 2: matches",
		"DENY shop/try rule 0: matches",
		"decision: allowed by rule (ALLOW shop/payments, rule 2)",
		"with the dry-run policies enforced: denied: denied by rule (shop/try)",
	} {
		if !slices.Contains(d.Steps, want) {
			t.Errorf("no step %q in\n%s", want, strings.Join(d.Steps, "\n"))
		}
	}
	if d.Shadow != "denied: denied by rule (shop/try)" || d.Rule != 2 {
		t.Errorf("%+v", d)
	}
}

func TestCanIInvalid(t *testing.T) {
	good := writeFile(t, "good.yaml", []byte(policyOf("p", "{}")))
	tests := map[string]struct {
		args []string
		want string
	}{
		"no caller":             {[]string{"--to", "shop/orders", "GET", "/"}, "--from and --to are required"},
		"no receiver":           {[]string{"--from", "shop/frontend", "GET", "/"}, "--from and --to are required"},
		"caller of one word":    {[]string{"--from", "frontend", "--to", "shop/orders", "GET", "/"}, `--from: identity: "frontend" is not of the form NAMESPACE/ACCOUNT; want NAMESPACE/ACCOUNT, a SPIFFE ID, or none`},
		"caller in upper case":  {[]string{"--from", "Shop/frontend", "--to", "shop/orders", "GET", "/"}, `"Shop" is not a namespace`},
		"caller is no ID":       {[]string{"--from", "spiffe://Cluster/ns/a/sa/b", "--to", "shop/orders", "GET", "/"}, `--from "spiffe://Cluster/ns/a/sa/b"`},
		"caller is a domain":    {[]string{"--from", "spiffe://cluster.local", "--to", "shop/orders", "GET", "/"}, "names a trust domain, not a workload"},
		"receiver is a service": {[]string{"--from", "shop/frontend", "--to", "orders", "GET", "/"}, "services are known only with a running mesh (--up, or a cluster)"},
		"method only":           {[]string{"--from", "shop/frontend", "--to", "shop/orders", "GET"}, "give METHOD and /path, as in GET /, or --tcp"},
		"twice":                 {[]string{"--from", "shop/frontend", "--to", "shop/orders", "GET", "/", "--path", "/x"}, "give METHOD and /path, or --method and --path, not both"},
		"tcp and path":          {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--tcp", "--path", "/x"}, "--tcp takes no method and path"},
		"empty path":            {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--path", "x"}, `"x" is no path`},
		"three":                 {[]string{"--from", "shop/frontend", "--to", "shop/orders", "GET", "/", "/"}, "accepts at most 2 arg(s)"},
		"no slash":              {[]string{"--from", "shop/frontend", "--to", "shop/orders", "GET", "orders"}, `"orders" is no path; it begins with a slash`},
		"line break":            {[]string{"--from", "shop/frontend", "--to", "shop/orders", "GET", "/a\r\nX-Team: blue"}, "holds a line break"},
		"line break in header":  {[]string{"--from", "shop/frontend", "--to", "shop/orders", "GET", "/", "--header", "a=b\nc: d"}, "holds a line break"},
		"tcp and method":        {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--tcp", "GET", "/"}, "--tcp takes no method and path"},
		"tcp and token":         {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--tcp", "--jwt", "x"}, "--tcp has no token, headers or host"},
		"port":                  {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--port", "70000", "GET", "/"}, `invalid argument "70000" for "--port" flag`},
		"source":                {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--source-ip", "10.0.0.0/8", "GET", "/"}, `--source-ip "10.0.0.0/8": not an IP address`},
		"remote":                {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--remote-ip", "x", "GET", "/"}, `--remote-ip "x": not an IP address`},
		"header":                {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--header", "x-team", "GET", "/"}, `--header "x-team": want k=v`},
		"host header":           {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--header", "Host=x", "GET", "/"}, "use --host"},
		"labels":                {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--to-labels", "orders", "GET", "/"}, `--to-labels "orders": want k=v`},
		"token is missing":      {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--jwt", "/nothing", "GET", "/"}, `--jwt: there is no file "/nothing"`},
		"token is empty":        {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--jwt", writeFile(t, "t", []byte("\n")), "GET", "/"}, "is empty"},
		"token of two lines":    {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--jwt", writeFile(t, "t", []byte("a\nb")), "GET", "/"}, "holds several lines; a token is one"},
		"token is a directory":  {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--jwt", t.TempDir(), "GET", "/"}, "is a directory"},
		"mesh is missing":       {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--mesh", "/nothing", "GET", "/"}, `--mesh: there is no file "/nothing"`},
		"mesh, unknown key":     {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--mesh", writeFile(t, "m.yaml", []byte("mesh: {}")), "GET", "/"}, "unknown field \"mesh\"; the keys of `mesh:` stand at top level"},
		"mesh, bad domain":      {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--mesh", writeFile(t, "m.yaml", []byte("trustDomain: 10.0.0.1")), "GET", "/"}, "trustDomain: identity: trust domain \"10.0.0.1\" looks like an IP address"},
		"mesh, bad option":      {[]string{"--from", "shop/frontend", "--to", "shop/orders", "--mesh", writeFile(t, "m.yaml", []byte("pathNormalization: base")), "GET", "/"}, `pathNormalization: "base", want NONE, BASE`},
		"format":                {[]string{"--from", "shop/frontend", "--to", "shop/orders", "-o", "pem", "GET", "/"}, `-o "pem"`},
		"policies missing":      {[]string{"--from", "shop/frontend", "--to", "shop/orders", "-f", "/nothing", "GET", "/"}, "-f /nothing: there is no such file or directory"},
		"policies empty":        {[]string{"--from", "shop/frontend", "--to", "shop/orders", "-f", writeFile(t, "e.yaml", []byte("# nothing\n")), "GET", "/"}, "holds no policy"},
		"policies, twice":       {[]string{"--from", "shop/frontend", "--to", "shop/orders", "-f", writeFile(t, "copy.yaml", []byte(policyOf("p", "{}"))), "GET", "/"}, "another AuthorizationPolicy of this name"},
		"policies, bad YAML":    {[]string{"--from", "shop/frontend", "--to", "shop/orders", "-f", writeFile(t, "b.yaml", []byte("a: [")), "GET", "/"}, "not YAML"},
		"policies, bad field":   {[]string{"--from", "shop/frontend", "--to", "shop/orders", "-f", writeFile(t, "b.yaml", []byte(policyOf("q", "{rule: []}"))), "GET", "/"}, "INVALID"},
		"policies, bad kind":    {[]string{"--from", "shop/frontend", "--to", "shop/orders", "-f", writeFile(t, "b.yaml", []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n")), "GET", "/"}, "1 of 2 documents are invalid"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := castellanRun(t, append([]string{"authz", "can-i", "-f", good}, tt.args...)...).want(t, 3, tt.want)
			if r.out != "" || !strings.HasPrefix(r.err, "castellan: ") && !strings.Contains(r.err, "\ncastellan: ") {
				t.Errorf("stdout %q, stderr %q", r.out, r.err)
			}
		})
	}
}

func TestCanIPolicySources(t *testing.T) {
	deny := policyOf("p", "{action: DENY, rules: [{to: [{operation: {methods: [POST]}}]}]}")
	ask := []string{"authz", "can-i", "--from", "shop/frontend", "--to", "shop/orders", "POST", "/"}
	dir := t.TempDir()
	for name, data := range map[string]string{"a.yaml": deny, "b.json": `{"apiVersion":"security.istio.io/v1","kind":"PeerAuthentication","metadata":{"name":"x","namespace":"shop"},"spec":{}}`, "README.md": "no policy", ".hidden.yaml": "no: policy"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "a.yaml")
	t.Run("file, directory, several, stdin", func(t *testing.T) {
		castellanRun(t, append(ask, "-f", file)...).want(t, 2, "DENY shop/p, rule 0")
		castellanRun(t, append(ask, "-f", dir)...).want(t, 2, "DENY shop/p, rule 0")
		castellanRun(t, append(ask, "-f", filepath.Join(dir, "b.json"), "-f", file)...).want(t, 2, "DENY shop/p, rule 0")
		castellanWith(t, deny, append(ask, "-f", "-")...).want(t, 2, "DENY shop/p, rule 0")
		castellanWith(t, "", append(ask, "-f", "-")...).want(t, 3, "-f - holds no policy")
	})
	t.Run("an empty directory is a mesh without policy, and said so", func(t *testing.T) {
		r := castellanRun(t, append(ask, "-f", t.TempDir())...).want(t, 0, "no ALLOW policy")
		if !strings.Contains(r.err, "no policy there; the decision is that of a mesh without any") {
			t.Errorf("%s", r.err)
		}
	})
	t.Run("warnings do not count, and are among the steps", func(t *testing.T) {
		risky := writeFile(t, "w.yaml", []byte(policyOf("w", "{action: ALLOW}")))
		r := castellanRun(t, append(ask, "-f", risky)...).want(t, 2, "no ALLOW rule matches")
		if r.err != "" {
			t.Errorf("%s", r.err)
		}
		castellanRun(t, append(ask, "-f", risky, "--explain")...).want(t, 2, "  warning: spec")
	})
	t.Run("token from stdin", func(t *testing.T) {
		issuer := newUsers(t)
		token := readFile(t, issuer.token(t, time.Hour, "payments", nil))
		p := writeFile(t, "u.yaml", []byte(issuer.policy()+policyOf("payments", `{rules: [{from: [{source: {requestPrincipals: ["*"]}}]}]}`)))
		castellanWith(t, token, "authz", "can-i", "--from", "none", "--to", "shop/payments", "GET", "/", "-f", p, "--jwt", "-").want(t, 0, "allowed by rule")
	})
}

// Keys are fetched only when a token wants them, and a failure is said.
func TestCanIFetchesKeys(t *testing.T) {
	issuer := newUsers(t)
	fetched := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fetched++
		_, _ = w.Write([]byte(issuer.jwks))
	}))
	defer server.Close()
	p := writeFile(t, "u.yaml", []byte(`
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: users, namespace: shop}
spec: {jwtRules: [{issuer: "`+usersIssuer+`", jwksUri: "`+server.URL+`/keys"}]}
`))
	ask := []string{"authz", "can-i", "--from", "none", "--to", "shop/payments", "GET", "/", "-f", p}
	allow := writeFile(t, "mesh.yaml", []byte("jwks: {allow: [http, 127.0.0.0/8]}"))
	token := issuer.token(t, time.Hour, "payments", nil)

	castellanRun(t, append(ask, "--mesh", allow)...).want(t, 0)
	if fetched != 0 {
		t.Errorf("%d fetches although there is no token", fetched)
	}
	castellanRun(t, append(ask, "--mesh", allow, "--jwt", token)...).want(t, 0)
	if fetched != 1 {
		t.Errorf("%d fetches", fetched)
	}
	// Loopback and plain http only where the mesh settings allow it.
	r := castellanRun(t, append(ask, "--jwt", token)...).want(t, 2, "denied (401)")
	if fetched != 1 || !strings.Contains(r.err, "keys of jwks:"+server.URL+"/keys could not be fetched, its tokens are refused: ") {
		t.Errorf("%d fetches, %s", fetched, r.err)
	}
}
