package proxy

import (
	"net/netip"
	"strings"

	"castellan.dev/internal/judge"
	"castellan.dev/proxy/engine"
)

// tunnel is the request that opened a WebSocket, kept as long as that lives: the
// engine uses the memory of the original again. It is immutable.
type tunnel struct {
	method, target, path, query, host string
	fields                            []engine.Field
	xfcc                              []string
	remoteIP                          netip.Addr
	// policy is what it was judged by last.
	policy *policyState
}

func newTunnel(r *engine.Request, xfcc []string, remoteIP netip.Addr, judgedBy *policyState) *tunnel {
	t := &tunnel{
		method: strings.Clone(r.Method), target: strings.Clone(r.Target), path: strings.Clone(r.Path),
		query: strings.Clone(r.RawQuery), host: strings.Clone(r.Host), xfcc: xfcc, remoteIP: remoteIP, policy: judgedBy,
		fields: make([]engine.Field, 0, len(r.Fields())),
	}
	for _, f := range r.Fields() {
		t.fields = append(t.fields, engine.Field{Name: strings.Clone(f.Name), Value: strings.Clone(f.Value)})
	}
	return t
}

// Values gives header values as they were judged (engine.Request.Values).
func (t *tunnel) Values(name string) []string {
	switch name {
	case headerXFCC:
		return t.xfcc
	case ":authority", "host":
		return []string{t.host}
	case ":method":
		return []string{t.method}
	case ":path":
		return []string{t.target}
	case "upgrade":
		return []string{"websocket"}
	}
	var values []string
	for _, f := range t.fields {
		if strings.EqualFold(f.Name, name) {
			values = append(values, f.Value)
		}
	}
	return values
}

// stillTunnels reports whether the WebSocket that lives on the connection, if
// one does, would still be let through: a tunnel is one request that does not
// end, so that policy could say nothing to it any more. Everything counts as if
// it were asked anew, the end user's token included, but only when the policy is
// another one: the mere passing of time closes nothing.
func (s *inboundSession) stillTunnels(st *state) bool {
	t := s.tunnel.Load()
	if t == nil || t.policy == st.policy {
		return true
	}
	pol := st.policy
	if pol == nil || pol.broken != "" {
		return false // fails closed, as a request would (trust rule 8)
	}
	var c judge.Case
	c.Judge(judge.Request{
		Method: t.method, Host: t.host, Path: t.path, RawQuery: t.query, Header: t, RemoteIP: t.remoteIP,
	}, pol.mesh.PathNormalization, pol.tokens, pol.snapshot.Connect(s.live.subject))
	if c.Status != 200 {
		return false
	}
	next := *t
	next.policy = pol
	s.tunnel.CompareAndSwap(t, &next) // it may have ended meanwhile
	return true
}
