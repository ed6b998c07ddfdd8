package proxy_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// openWebSocket is a mesh with one WebSocket of the frontend's to /chat, whose
// application sends bytes back.
func openWebSocket(t *testing.T, policies string) (*running, *session) {
	t.Helper()
	app := newTCPApp(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = io.Copy(c, r)
	})
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Publish(policies)
	r := start(t, a, app).ready()
	s := dialTLS(t, r.inbound, a.Issuer.Leaf(t, frontend), "http/1.1")
	if _, err := io.WriteString(s.conn, "GET /chat HTTP/1.1\r\nHost: orders\r\nX-Room: lobby\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(s.r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", resp, err)
	}
	s.echo("hello")
	return r, s
}

// A WebSocket is one request that does not end: policy closes it when it would
// refuse that request now, by whatever of it the policy names, and only then.
func TestPolicyChangeClosesWebSockets(t *testing.T) {
	deny := func(rule string) string {
		return strict + frontendMayGet + "\n---\n" + strings.Replace(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec: {action: DENY, rules: [RULE]}
`, "RULE", rule, 1)
	}
	for name, c := range map[string]struct {
		change string
		closes bool
	}{
		"the path":        {deny(`{to: [{operation: {paths: ["/chat"]}}]}`), true},
		"another path":    {deny(`{to: [{operation: {paths: ["/other"]}}]}`), false},
		"a header":        {deny(`{when: [{key: "request.headers[x-room]", values: ["lobby"]}]}`), true},
		"another value":   {deny(`{when: [{key: "request.headers[x-room]", values: ["hall"]}]}`), false},
		"no longer named": {strict + strings.Replace(frontendMayGet, "sa/frontend", "sa/payments", 1), true},
		"nothing changed": {strict + frontendMayGet, false},
	} {
		t.Run(name, func(t *testing.T) {
			r, live := openWebSocket(t, strict+frontendMayGet)
			r.agent.Publish(c.change)
			r.agent.Settled()
			if !c.closes {
				live.echo("still here")
				return
			}
			live.closed()
			r.logged(`"status":101`, `"reason":"policy"`, `"path":"/chat"`)
		})
	}
}
