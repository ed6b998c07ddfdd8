package proxy

import (
	"strings"
	"sync"

	"castellan.dev/internal/judge"
	"castellan.dev/proxy/engine"
)

// inFlight holds the requests of one connection that were let through and have
// not ended. Their memory is the engine's and stays as it is until End returns;
// whoever reads it from elsewhere holds the lock, which End takes first.
type inFlight struct {
	mu   sync.Mutex
	head *exchange
}

// enter adds x, which was judged by pol.
func (f *inFlight) enter(x *exchange, pol *policyState) {
	f.mu.Lock()
	x.policy, x.open = pol, true
	x.next = f.head
	if f.head != nil {
		f.head.prev = x
	}
	f.head = x
	f.mu.Unlock()
}

// leave takes x out; nobody else looks at it from then on.
func (f *inFlight) leave(x *exchange) {
	if !x.open {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if x.prev != nil {
		x.prev.next = x.next
	} else {
		f.head = x.next
	}
	if x.next != nil {
		x.next.prev = x.prev
	}
	x.prev, x.next, x.open = nil, nil, false
}

// received is a request's head as it was judged, read without the request's own
// arena: this is not the request's goroutine.
type received struct{ x *exchange }

// Values gives header values as they were judged (engine.Request.Values).
func (h received) Values(name string) []string {
	r := h.x.request
	switch name {
	case headerXFCC:
		return h.x.xfcc
	case ":authority", "host":
		return []string{r.Host}
	case ":method":
		return []string{r.Method}
	case ":path":
		return []string{r.Target}
	case "upgrade":
		if r.WebSocket {
			return []string{"websocket"}
		}
		return nil
	}
	var values []string
	for _, f := range r.Fields() {
		if strings.EqualFold(f.Name, name) {
			values = append(values, f.Value)
		}
	}
	return values
}

// rejudge judges the requests in flight by the policy of st, and ends those it
// would refuse: a stream or a WebSocket is one request that goes on, so that
// policy could say nothing to it any more (trust rule 9). Everything counts as if
// it were asked anew, the end user's token included, but only where the policy is
// another one: the mere passing of time ends nothing.
func (s *inboundSession) rejudge(st *state) {
	s.flying.mu.Lock()
	defer s.flying.mu.Unlock()
	for x := s.flying.head; x != nil; x = x.next {
		if x.policy != st.policy && !x.ended && !s.stillAllowed(x, st.policy) {
			x.ended = true
			s.abort(x.request)
		}
		x.policy = st.policy
	}
}

// abort ends a request in flight. That of HTTP/1 ends with its connection.
func (s *inboundSession) abort(r *engine.Request) {
	p := s.in.p
	p.metrics.deniedBy[judge.KindPolicy].Inc()
	if r.Proto != engine.HTTP2 {
		p.end(s.live, closedPolicy, nil)
		return
	}
	p.log.Info("request in flight ended", "reason", closedPolicy, "peer", s.peer, "source", s.source)
	r.Abort()
}

// stillAllowed reports whether x would be let through under pol. The caller holds
// the lock.
func (s *inboundSession) stillAllowed(x *exchange, pol *policyState) bool {
	if pol == nil || pol.broken != "" {
		return false // fails closed, as a request would (trust rule 8)
	}
	r, h := x.request, received{x}
	var c judge.Case
	c.Judge(judge.Request{
		Method: r.Method, Host: r.Host, Path: r.Path, RawQuery: r.RawQuery, Header: h, RemoteIP: x.remoteIP,
	}, pol.mesh.PathNormalization, pol.tokens, s.judgeNow(pol))
	return c.Status == 200
}

// entered adds a request that pol let through, and reports whether it still is:
// a change between the judgement and here has passed it by.
func (s *inboundSession) entered(x *exchange, pol *policyState) bool {
	s.flying.enter(x, pol)
	now := s.in.p.store.load().policy
	if now == pol {
		return true
	}
	s.flying.mu.Lock()
	defer s.flying.mu.Unlock()
	x.policy = now
	return !x.ended && s.stillAllowed(x, now)
}
