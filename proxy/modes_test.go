package proxy_test

import (
	"net/http"
	"strings"
	"testing"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// authz-31: the workload port decides, not the listener's own.
func TestPortLevelMode(t *testing.T) {
	const policies = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: orders, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  mtls: {mode: STRICT}
  portLevelMtls: {"PORT": {mode: PERMISSIVE}}
`
	for port, want := range map[string]bool{"8080": true, "9090": false} {
		r, _ := mesh(t, strings.Replace(policies, "PORT", port, 1))
		c, _ := httpClient(t, nil)
		resp, err := c.Get("http://" + r.inbound + "/")
		served := err == nil && resp.StatusCode == 200
		if err == nil {
			resp.Body.Close()
		}
		if served != want {
			t.Errorf("portLevelMtls on %s: plaintext served %v", port, served)
		}
	}
}

// Peers of an alias of the trust domain are of the mesh, and a policy that names
// the mesh's domain means them too (authz-11).
func TestPeersOfAnAlias(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Policy.Mesh = []byte(`{"trustDomain":"cluster.local","trustDomainAliases":["old.example"],"rootNamespace":"castellan-system"}`)
	a.Publish(strict + frontendMayGet)
	r := start(t, a, newApp(t)).ready()
	old := a.Issuer.Leaf(t, "spiffe://old.example/ns/shop/sa/frontend")
	if got := get(t, r.inbound, old, "/"); got.status != 200 || !strings.HasSuffix(got.echo.Header.Get("X-Forwarded-Client-Cert"), "URI=spiffe://old.example/ns/shop/sa/frontend") {
		t.Fatalf("%d %q", got.status, got.body)
	}
	// The alias goes, and with it the live connections of its peers.
	live := dialTLS(t, r.inbound, old, "http/1.1")
	live.mustGet(200)
	a.Policy.Mesh = []byte(`{"trustDomain":"cluster.local","rootNamespace":"castellan-system"}`)
	a.Publish(strict + frontendMayGet)
	live.closed()
}

func TestIDsInTheLog(t *testing.T) {
	r, ca := mesh(t, strict)
	get(t, r.inbound, ca.Leaf(t, frontend), "/secret?token=abc", "X-Request-Id", "req-1", "Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	line := r.logged(`"requestId":"req-1"`, `"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"`)
	if strings.Contains(line, "abc") {
		t.Fatalf("the query is in the log: %s", line)
	}
}

// HTTP/2 by prior knowledge: plaintext under PERMISSIVE, and inside TLS without ALPN.
func TestHTTP2PriorKnowledge(t *testing.T) {
	r, _ := mesh(t, mode("PERMISSIVE"))
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get("http://" + r.inbound + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 || resp.ProtoMajor != 2 {
		t.Fatalf("%s %s", resp.Status, resp.Proto)
	}
	r.logged(`"protocol":"HTTP/2"`, `"status":200`)
}

func TestAnonymousFailsPrincipalRules(t *testing.T) {
	r, ca := mesh(t, mode("PERMISSIVE")+frontendMayGet)
	if got := get(t, r.inbound, nil, "/"); got.status != 403 {
		t.Fatalf("plaintext: %d", got.status)
	}
	c, scheme := httpClient(t, ca.Leaf(t, frontend), "istio")
	req, _ := http.NewRequest("GET", scheme+"://"+r.inbound+"/", nil)
	if got := ask(t, c, req); got.status != 200 {
		t.Fatalf("mutual TLS: %d", got.status)
	}
}
