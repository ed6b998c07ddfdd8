package proxy

import (
	"context"
	"net"

	"castellan.dev/proxy/engine"
)

// Bodies of failures the application sees: constant, the cause is in the log.
const (
	bodyNoDestination = "destination not available"
	bodyNoIdentity    = "no identity yet"
)

// outboundSession chooses where an application's requests go. HTTP/2 calls it concurrently.
type outboundSession struct {
	out    *outbound
	source string
}

// Begin chooses the endpoint.
func (s *outboundSession) Begin(r *engine.Request) engine.Verdict {
	p := s.out.p
	x := p.exchanges.get(r)
	r.Aux = x
	st := p.store.load()
	anonymous := st.svid == nil || st.trust == nil
	at, refused := s.out.resolve(st)
	switch {
	case refused != nil && anonymous:
		return s.fail(x, 503, bodyNoIdentity, failedNoOwn)
	case refused != nil:
		v := s.fail(x, refused.Status, bodyNoDestination, refused.Reason)
		// A service made anew has another address: the application finds it when it
		// looks the name up again, which it does for a new connection only.
		v.Close = s.out.original.IsValid() && refused.Reason == failedUnknown
		return v
	}
	x.port, x.endpoint, x.only = at.port, at.endpoint, at.endpoint != nil
	want := s.out.wants(st)
	if !x.only {
		x.endpoint = x.port.pick(p.now(), nil, want)
	}
	switch {
	case x.endpoint == nil, x.endpoint.outside && !want.plain:
		refused = x.port.noEndpoint(x.endpoint)
		return s.fail(x, refused.Status, bodyNoDestination, refused.Reason)
	case !x.endpoint.outside && anonymous:
		return s.fail(x, 503, bodyNoIdentity, failedNoOwn)
	}
	// Who called whom is the receiving proxy's to say.
	x.remove = append(x.remove, headerXFCC)
	v := engine.Verdict{Remove: x.remove}
	w := s.carries(x, r)
	v.Upstream = engine.Upstream{Key: x.endpoint.pool(st.serial).key(w), H2: w == wireHTTP2}
	return v
}

// carries: HTTP/2 where the destination declares it or only it will do.
func (s *outboundSession) carries(x *exchange, r *engine.Request) wire {
	switch {
	case r.WebSocket:
		return wireHTTP1
	case x.port.protocol == speaksHTTP2:
		return wireHTTP2
	case r.Proto == engine.HTTP2 && (x.port.protocol == undeclared || isGRPC(r)):
		return wireHTTP2
	}
	return wireHTTP1
}

func (s *outboundSession) fail(x *exchange, status int, body, reason string) engine.Verdict {
	x.reason = reason
	return engine.Verdict{Status: status, Body: body}
}

// Dial opens a connection to the endpoint chosen, or to another of the service.
func (s *outboundSession) Dial(ctx context.Context, r *engine.Request) (net.Conn, error) {
	x, _ := r.Aux.(*exchange)
	up, err := s.out.dial(ctx, x.port, x.endpoint, x.only, s.carries(x, r))
	if err != nil {
		return nil, err
	}
	return up, nil
}

// End writes the line and counts.
func (s *outboundSession) End(r *engine.Request, o *engine.Outcome) {
	p := s.out.p
	p.metrics.request(outboundSide, o.Status, o.RequestBytes, o.ResponseBytes, o.Total)
	x, _ := r.Aux.(*exchange)
	if p.cfg.AccessLog != nil {
		e := entryOf(r, o)
		e.Direction, e.Source, e.Destination, e.Rule = "outbound", s.source, s.out.name, -1
		if x != nil {
			x.describe(&e)
			if x.endpoint != nil && len(x.endpoint.allowed) == 1 && !x.endpoint.outside {
				e.Peer = x.endpoint.allowed[0].String()
			}
		}
		p.cfg.AccessLog.Add(&e)
	}
	if x != nil {
		r.Aux = nil
		p.exchanges.put(x)
	}
}
