package proxy_test

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"net/http"
	"strings"
	"testing"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// mesh starts one inbound proxy as orders with the given policies.
func mesh(t testing.TB, policies string, options ...option) (*running, *tlsconftest.CA) {
	t.Helper()
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Publish(policies)
	return start(t, a, newApp(t), options...).ready(), a.Issuer
}

func TestInboundAllowsAndDenies(t *testing.T) {
	r, ca := mesh(t, strict+frontendMayGet)
	caller := ca.Leaf(t, frontend)

	a := get(t, r.inbound, caller, "/orders/1?x=y")
	if a.status != 200 || a.echo.Path != "/orders/1" || a.echo.Query != "x=y" {
		t.Fatalf("%d %s", a.status, a.body)
	}
	sum := sha256.Sum256(caller.Certificate[0])
	want := "By=" + orders + ";Hash=" + hex.EncodeToString(sum[:]) + ";URI=" + frontend
	if got := a.echo.Header.Values("X-Forwarded-Client-Cert"); len(got) != 1 || got[0] != want {
		t.Fatalf("x-forwarded-client-cert %q, want %q", got, want)
	}
	r.logged(`"direction":"inbound"`, `"peer":"`+frontend+`"`, `"method":"GET"`, `"path":"/orders/1"`, `"status":200`, `"policy":"shop/orders"`, `"rule":0`)

	a = get(t, r.inbound, ca.Leaf(t, intruder), "/")
	if a.status != 403 || a.body != "access denied\n" {
		t.Fatalf("%d %q", a.status, a.body)
	}
	r.logged(`"peer":"`+intruder+`"`, `"status":403`, `"reason":"no ALLOW rule matches"`)
	if n := r.metric("castellan_proxy_denied_total"); n != 1 {
		t.Fatalf("denied %v", n)
	}
	c, scheme := httpClient(t, caller)
	req, _ := http.NewRequest("POST", scheme+"://"+r.inbound+"/", strings.NewReader("body"))
	if a := ask(t, c, req); a.status != 403 {
		t.Fatalf("POST: %d", a.status)
	}
}

func TestXFCCFromOutsideIsReplaced(t *testing.T) {
	r, ca := mesh(t, mode("PERMISSIVE"))
	spoofed := "By=spiffe://cluster.local/ns/shop/sa/orders;URI=spiffe://cluster.local/ns/shop/sa/admin"
	for _, name := range []string{"x-forwarded-client-cert", "X-Forwarded-Client-Cert", "X-FORWARDED-CLIENT-CERT"} {
		c, scheme := httpClient(t, ca.Leaf(t, frontend), "istio")
		req, _ := http.NewRequest("GET", scheme+"://"+r.inbound+"/", nil)
		req.Header[name] = []string{spoofed, spoofed}
		a := ask(t, c, req)
		got := a.echo.Header.Values("X-Forwarded-Client-Cert")
		if a.status != 200 || len(got) != 1 || strings.Contains(got[0], "admin") || !strings.HasSuffix(got[0], "URI="+frontend) {
			t.Fatalf("%s: %d %q", name, a.status, got)
		}
	}
	a := get(t, r.inbound, nil, "/", "x-forwarded-client-cert", spoofed)
	if got := a.echo.Header.Values("X-Forwarded-Client-Cert"); a.status != 200 || len(got) != 0 {
		t.Fatalf("plaintext: %d %q", a.status, got)
	}
}

// A policy that trusts x-forwarded-client-cert must not see the caller's own.
func TestPolicyNeverSeesForeignXFCC(t *testing.T) {
	r, ca := mesh(t, strict+`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: by-header, namespace: shop}
spec:
  rules:
  - when: [{key: "request.headers[x-forwarded-client-cert]", values: ["*admin"]}]
`)
	if a := get(t, r.inbound, ca.Leaf(t, frontend), "/", "x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/admin"); a.status != 403 {
		t.Fatalf("%d", a.status)
	}
}

func TestModes(t *testing.T) {
	tests := map[string]struct {
		mode, mtls, plaintext string
		// foreignTLS: TLS that is not the mesh's reaches the application.
		foreignTLS bool
	}{
		"authz-32 STRICT":     {mode: "STRICT", mtls: "200", plaintext: "refused"},
		"authz-32 PERMISSIVE": {mode: "PERMISSIVE", mtls: "200", plaintext: "200", foreignTLS: true},
		"authz-31 DISABLE":    {mode: "DISABLE", mtls: "refused", plaintext: "200"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r, ca := mesh(t, mode(tt.mode))
			outcome := func(c *http.Client, scheme string) string {
				resp, err := c.Get(scheme + "://" + r.inbound + "/")
				if err != nil {
					return "refused"
				}
				defer resp.Body.Close()
				switch resp.StatusCode {
				case 200:
					return "200"
				}
				return "refused"
			}
			c, scheme := httpClient(t, ca.Leaf(t, frontend), "istio-http/1.1", "istio", "http/1.1")
			if got := outcome(c, scheme); got != tt.mtls {
				t.Errorf("mtls: %s", got)
			}
			c, scheme = httpClient(t, nil)
			if got := outcome(c, scheme); got != tt.plaintext {
				t.Errorf("plaintext: %s", got)
			}
			// Without an ALPN of the mesh, TLS under PERMISSIVE is the application's own.
			conn, err := tls.Dial("tcp", r.inbound, clientTLS(nil, "h2", "http/1.1"))
			if err == nil {
				conn.Close()
			}
			if tt.foreignTLS {
				r.logged(`"protocol":"TCP"`, `"bytesReceived":1`)
			} else if strings.Contains(r.access.String(), `"protocol":"TCP"`) {
				t.Error("foreign TLS reached the application")
			}
		})
	}
}

func TestStrictTakesAnyALPNOrNone(t *testing.T) {
	r, ca := mesh(t, strict)
	for _, protos := range [][]string{nil, {"http/1.1"}, {"istio"}, {"istio-peer-exchange", "istio"}, {"istio-peer-exchange"}, {"istio-http/1.0"}, {"istio-http/1.1", "istio", "http/1.1"}, {"something-else"}} {
		cert := ca.Leaf(t, frontend)
		transport := &http.Transport{TLSClientConfig: clientTLS(cert, protos...), TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}}
		c := &http.Client{Transport: transport, Timeout: patience}
		resp, err := c.Get("https://" + r.inbound + "/")
		if err != nil {
			t.Errorf("%q: %v", protos, err)
			continue
		}
		resp.Body.Close()
		transport.CloseIdleConnections()
		if resp.StatusCode != 200 {
			t.Errorf("%q: %d", protos, resp.StatusCode)
		}
	}
}

func TestForeignPeersAreRefused(t *testing.T) {
	r, ca := mesh(t, strict)
	for name, cert := range map[string]*tls.Certificate{
		"other root":           tlsconftest.NewRoot(t).SVIDIssuer(t).Leaf(t, frontend),
		"other trust domain":   ca.Leaf(t, "spiffe://evil.example/ns/shop/sa/frontend"),
		"serving intermediate": r.agent.Root.ServingIssuer(t).Leaf(t, frontend),
	} {
		c, _ := httpClient(t, cert)
		resp, err := c.Get("https://" + r.inbound + "/")
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s: %d", name, resp.StatusCode)
		}
	}
	eventually(t, "refusals counted", func() bool { return r.metric("castellan_proxy_connections_refused_total") >= 3 })
}

// Trust rule 8: no policy, no bundle, a policy for somebody else: denied.
func TestFailsClosed(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	r := start(t, a, newApp(t))
	caller := a.Issuer.Leaf(t, frontend)
	c, _ := httpClient(t, caller)
	if resp, err := c.Get("https://" + r.inbound + "/"); err == nil {
		resp.Body.Close()
		t.Fatalf("served without a certificate: %d", resp.StatusCode)
	}
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	eventually(t, "identity", func() bool { return r.CheckIdentity() == nil })
	if got := get(t, r.inbound, caller, "/"); got.status != 403 || got.body != "access denied\n" {
		t.Fatalf("without a policy: %d %q", got.status, got.body)
	}
	r.logged(`"status":403`, `"reason":"no policy received yet"`)
	if r.CheckPolicy() == nil {
		t.Fatal("ready without a policy")
	}

	a.Policy.ServiceAccount = "payments"
	a.Publish(strict)
	waitLine(t, r.log, "no policy of our own; everything is denied")
	if got := get(t, r.inbound, caller, "/"); got.status != 403 {
		t.Fatalf("somebody else's policy: %d", got.status)
	}
	a.Policy.ServiceAccount = "orders"
	a.Publish(strict)
	r.ready()
	if got := get(t, r.inbound, caller, "/"); got.status != 200 {
		t.Fatalf("own policy: %d", got.status)
	}

	a.Policy.DenyAll, a.Policy.DenyReason = true, "orders.yaml cannot be read"
	a.Publish(strict)
	eventually(t, "deny_all in force", func() bool { return get(t, r.inbound, caller, "/").status == 403 })
	r.logged("orders.yaml cannot be read")
}

// authz-21: what cannot be represented is enforced closed and told to the server.
func TestUnreadablePolicyDeniesAndIsRefused(t *testing.T) {
	r, ca := mesh(t, strict+frontendMayGet)
	caller := ca.Leaf(t, frontend)
	r.agent.Publish(strict + frontendMayGet + `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: newer, namespace: shop}
spec:
  action: DENY
  rules: [{from: [{source: {unheardOf: [x]}}]}]
`)
	eventually(t, "refusal at the server", func() bool {
		for _, rec := range r.agent.Recorder.Records() {
			if rec.TypeURL == policyType && strings.Contains(rec.Reason, "unheardOf") {
				return true
			}
		}
		return false
	})
	if got := get(t, r.inbound, caller, "/"); got.status != 403 {
		t.Fatalf("%d", got.status)
	}
	r.agent.Publish(strict + frontendMayGet)
	eventually(t, "good policy again", func() bool { return get(t, r.inbound, caller, "/").status == 200 })
}
