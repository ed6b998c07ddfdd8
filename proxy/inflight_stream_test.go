package proxy_test

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// streamMesh is a mesh whose application answers with what it is sent, as it
// comes, and with events that do not end where it is sent nothing.
func streamMesh(t *testing.T, protocol, policies string) (*running, *tlsconftest.CA) {
	t.Helper()
	root := tlsconftest.NewRoot(t)
	a := newAgent(t, root, orders)
	a.Secrets(a.Issuer.Leaf(t, orders), root)
	a.Policy.Ports[0].Protocol = protocol
	a.Publish(policies)
	app := newStreamApp(t, func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		_ = c.EnableFullDuplex()
		_, _ = io.WriteString(w, "begun\n")
		_ = c.Flush()
		lines := bufio.NewReader(r.Body)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				break
			}
			_, _ = io.WriteString(w, line)
			_ = c.Flush()
		}
		if r.Method == http.MethodGet {
			<-r.Context().Done()
		}
	})
	return start(t, a, app).ready(), a.Issuer
}

// stream is one request in flight, whose body is written line by line.
type stream struct {
	t    *testing.T
	body *io.PipeWriter
	r    *bufio.Reader
}

// open sends a request and waits until the application has begun to answer.
func openStream(t *testing.T, c *http.Client, method, url string) *stream {
	t.Helper()
	s := &stream{t: t}
	var body io.Reader
	if method != http.MethodGet {
		body, s.body = io.Pipe()
		t.Cleanup(func() { s.body.Close() })
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Room", "lobby")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	s.r = bufio.NewReader(resp.Body)
	if line, err := s.r.ReadString('\n'); err != nil || line != "begun\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return s
}

func (s *stream) echo(line string) {
	s.t.Helper()
	if _, err := io.WriteString(s.body, line+"\n"); err != nil {
		s.t.Fatal(err)
	}
	if got, err := s.r.ReadString('\n'); err != nil || got != line+"\n" {
		s.t.Fatalf("%q, %v", got, err)
	}
}

// cut waits until the response ends as a whole one does not.
func (s *stream) cut() {
	s.t.Helper()
	done := make(chan error, 1)
	go func() { _, err := io.ReadAll(s.r); done <- err }()
	select {
	case err := <-done:
		if err == nil {
			s.t.Fatal("the response ended as if it were whole")
		}
	case <-time.After(patience):
		s.t.Fatal("the request goes on")
	}
}

func streamClients(t *testing.T, ca *tlsconftest.CA) map[string]*http.Client {
	t.Helper()
	cert := ca.Leaf(t, frontend)
	h1 := &http.Transport{TLSClientConfig: clientTLS(cert, "http/1.1"), TLSNextProto: nil}
	h2 := &http2.Transport{TLSClientConfig: clientTLS(cert, "h2")}
	t.Cleanup(func() { h1.CloseIdleConnections(); h2.CloseIdleConnections() })
	return map[string]*http.Client{"HTTP/1.1": {Transport: h1}, "HTTP/2": {Transport: h2}}
}

const everybody = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: everybody, namespace: shop}
spec: {rules: [{}]}
---
`

func denyRule(rule string) string {
	return strict + everybody + strings.Replace(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec: {action: DENY, rules: [RULE]}
`, "RULE", rule, 1)
}

// Trust rule 9: a request that goes on is judged again when policy changes, in
// whatever protocol and direction its bytes go, and ended if it would be refused.
func TestPolicyChangeEndsRequestsInFlight(t *testing.T) {
	for _, protocol := range []string{"http", "http2"} {
		for _, version := range []string{"HTTP/1.1", "HTTP/2"} {
			t.Run(version+" to "+protocol, func(t *testing.T) {
				r, ca := streamMesh(t, protocol, strict+everybody)
				c := streamClients(t, ca)[version]
				url := "https://" + r.inbound
				up, events, other := openStream(t, c, "POST", url+"/up"), openStream(t, c, "GET", url+"/events"), openStream(t, c, "POST", url+"/other")
				up.echo("one")
				r.agent.Publish(denyRule(`{to: [{operation: {paths: ["/elsewhere"]}}]}`))
				r.agent.Settled()
				up.echo("two")
				other.echo("one")
				r.agent.Publish(denyRule(`{to: [{operation: {paths: ["/up", "/events"]}}], when: [{key: "request.headers[x-room]", values: ["lobby"]}]}`))
				up.cut()
				events.cut()
				r.agent.Settled()
				other.echo("two") // another request, of HTTP/2 on the same connection
				r.logged(`"path":"/up"`, `"reason":"policy"`, `"protocol":"`+version+`"`)
				r.logged(`"path":"/events"`, `"reason":"policy"`)
			})
		}
	}
}

// A policy that cannot be enforced ends what is in flight as well.
func TestDenyAllEndsRequestsInFlight(t *testing.T) {
	r, ca := streamMesh(t, "http", strict+everybody)
	s := openStream(t, streamClients(t, ca)["HTTP/2"], "POST", "https://"+r.inbound+"/")
	s.echo("one")
	r.agent.Policy.DenyAll, r.agent.Policy.DenyReason = true, "test"
	r.agent.Publish(strict + everybody)
	s.cut()
}

// Judging what is in flight and serving go on side by side: whatever the policy
// of the moment, a request is answered by it or cut off.
func TestPolicyChangesUnderLoad(t *testing.T) {
	r, ca := streamMesh(t, "http", strict+everybody)
	ctx, cancel := context.WithCancel(context.Background())
	var loading sync.WaitGroup
	var served atomic.Int64
	for _, c := range streamClients(t, ca) {
		for range 4 {
			loading.Go(func() {
				for ctx.Err() == nil {
					req, _ := http.NewRequestWithContext(ctx, "POST", "https://"+r.inbound+"/up", strings.NewReader("a line\n"))
					resp, err := c.Do(req)
					if err != nil {
						continue
					}
					_, err = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					switch {
					case resp.StatusCode == 200 && err == nil:
						served.Add(1)
					case resp.StatusCode != 200 && resp.StatusCode != 403:
						t.Errorf("%s", resp.Status)
					}
				}
			})
		}
	}
	for range 10 {
		r.agent.Publish(denyRule(`{to: [{operation: {paths: ["/up"]}}]}`))
		r.agent.Settled()
		r.agent.Publish(strict + everybody)
		r.agent.Settled()
		before := served.Load()
		eventually(t, "served again", func() bool { return served.Load() > before })
	}
	cancel()
	loading.Wait()
}
