package xds

import (
	"log/slog"
	"slices"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ServeDelta serves one delta stream until it ends. The error is one that gRPC
// can give to the peer.
func ServeDelta(stream DeltaStream, cfg Config) error {
	cfg = cfg.withDefaults()
	w := newWatcher()
	m := &deltaMachine{engine: newEngine(cfg, w)}
	return serve(transport[*discoveryv3.DeltaDiscoveryRequest, *discoveryv3.DeltaDiscoveryResponse](stream),
		machine[*discoveryv3.DeltaDiscoveryRequest, *discoveryv3.DeltaDiscoveryResponse](m), w, cfg)
}

// stillHeld stands for a version that is not known, of something a peer holds.
const stillHeld = "?"

type deltaMachine struct{ engine }

// deltaState is what only a delta subscription knows.
type deltaState struct {
	// owesFirst: a wildcard's first response goes out even if it is empty, so that
	// the peer knows that there is nothing (more) to wait for.
	owesFirst bool
	// claims are the names whose version in sent is what the peer brought from an
	// earlier stream, until it is known what that has to be.
	claims []string
	// claimed counts all that were ever brought.
	claimed int
	// refused holds, by name, the response in which the peer last refused it.
	refused map[string]response
}

func (m *deltaMachine) request(req *discoveryv3.DeltaDiscoveryRequest) error {
	m.greet(req.GetNode())
	s, first, err := m.subscribe(req.GetTypeUrl())
	if err != nil || s == nil {
		return err
	}
	if first {
		s.wildcard = len(req.GetResourceNamesSubscribe()) == 0
		s.delta.owesFirst = s.wildcard
	}
	if err := m.change(s, req, first); err != nil {
		return err
	}
	if err := m.hold(s, req.GetInitialResourceVersions()); err != nil {
		return err
	}
	m.settle(s, req)
	return nil
}

// hold takes what the peer says it still holds of an earlier stream: in its
// first request and, if that is much, in those after it (our client, for the sake
// of a bound on messages). What has been sent on this stream meanwhile counts more.
func (m *deltaMachine) hold(s *subscription, held map[string]string) error {
	if s.delta.claimed += len(held); s.delta.claimed > m.cfg.Limits.Held {
		return status.Errorf(codes.InvalidArgument, "more than %d initial resource versions", m.cfg.Limits.Held)
	}
	for name, version := range held {
		if _, named := s.names[name]; !named && !s.wildcard || version == "" {
			continue
		}
		if _, known := s.sent[name]; !known {
			s.sent[name], s.dirty = version, true
			s.delta.claims = append(s.delta.claims, name)
		}
	}
	return nil
}

// confirm tells the observer of what the peer holds by its own word, once it is
// known what that has to be.
func (m *deltaMachine) confirm(s *subscription) {
	acked := map[string]string{}
	for _, name := range s.delta.claims {
		version, held := s.sent[name] // unless it has been unsubscribed since
		if r, ok := s.snapshot[name]; ok && held && r.Version == version {
			acked[name] = version
		}
	}
	s.delta.claims = nil
	if len(acked) > 0 {
		m.cfg.Observer.Acked(s.url, acked)
	}
}

// change takes subscriptions and unsubscriptions. The same name in both: Envoy
// adds first, then removes.
func (m *deltaMachine) change(s *subscription, req *discoveryv3.DeltaDiscoveryRequest, first bool) error {
	if err := m.checkNames(s, req.GetResourceNamesSubscribe()); err != nil {
		return err
	}
	for _, name := range req.GetResourceNamesSubscribe() {
		s.dirty = true
		if name == wildcard {
			s.delta.owesFirst = s.delta.owesFirst || !s.wildcard
			s.wildcard = true
			continue
		}
		s.names[name] = struct{}{}
		if !first {
			// Asked for again: the peer may have forgotten it, so it is sent whatever
			// was sent before.
			delete(s.sent, name)
		}
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		if name == wildcard {
			m.endWildcard(s)
			continue
		}
		if _, ok := s.names[name]; !ok && !s.wildcard {
			continue
		}
		delete(s.names, name)
		delete(s.sent, name)
		// A wildcard may still cover what the peer has just dropped: it is sent again.
		s.dirty = s.dirty || s.wildcard
	}
	return nil
}

func (m *deltaMachine) endWildcard(s *subscription) {
	s.wildcard, s.delta.owesFirst = false, false
	for name := range s.sent {
		if _, ok := s.names[name]; !ok {
			delete(s.sent, name)
		}
	}
}

// settle takes the answer to a response. A nonce that is not outstanding is
// stale and means nothing; the subscriptions beside it have been taken above.
func (m *deltaMachine) settle(s *subscription, req *discoveryv3.DeltaDiscoveryRequest) {
	nonce := req.GetResponseNonce()
	if nonce == "" {
		return
	}
	i := slices.IndexFunc(s.unanswered, func(r response) bool { return r.nonce == nonce })
	if i < 0 {
		m.cfg.Log.Debug("stale nonce ignored", slog.String("type_url", s.url))
		return
	}
	r := s.unanswered[i]
	s.unanswered = slices.Delete(s.unanswered, i, i+1)
	m.answer(s, r, req.GetErrorDetail())
	s.noteRefused(r, req.GetErrorDetail() != nil)
}

// noteRefused remembers what was refused together: a peer refuses a response
// whole, and it need not say for which of its resources.
func (s *subscription) noteRefused(r response, refused bool) {
	if s.delta.refused == nil {
		s.delta.refused = map[string]response{}
	}
	for name := range r.versions {
		if refused && len(r.versions) > 1 {
			s.delta.refused[name] = r
		} else {
			delete(s.delta.refused, name)
		}
	}
}

// retry forgets that those were sent that were refused together with something
// that has changed since: they may have been refused for its sake only.
func (s *subscription) retry() {
	for name, r := range s.delta.refused {
		if s.snapshot[name].Version == r.versions[name] {
			continue
		}
		for other := range r.versions {
			if s.delta.refused[other].nonce == r.nonce {
				delete(s.delta.refused, other)
				delete(s.sent, other)
				if r.versions[other] == "" {
					s.sent[other] = stillHeld // its removal was refused: tell again
				}
			}
		}
	}
}

func (m *deltaMachine) next(now time.Time) (*discoveryv3.DeltaDiscoveryResponse, bool, time.Duration) {
	return nextResponse(m.order, m.types, now, m.respond)
}

// respond builds what s still has to say, at most about Limits.ResponseBytes of
// it; nil if there is nothing.
func (m *deltaMachine) respond(s *subscription, now time.Time) *discoveryv3.DeltaDiscoveryResponse {
	m.confirm(s)
	s.retry()
	changed, removed := s.deltaDiff()
	if len(changed)+len(removed) == 0 && !s.delta.owesFirst {
		s.dirty = false
		return nil
	}
	resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: s.url}
	versions := map[string]string{}
	size, full := 0, false
	for _, name := range removed {
		if full = size >= m.cfg.Limits.ResponseBytes; full {
			break
		}
		resp.RemovedResources = append(resp.RemovedResources, name)
		versions[name] = ""
		size += len(name) + 4
	}
	for _, name := range changed {
		r := s.snapshot[name]
		n := len(r.Name) + len(r.Version) + len(r.Body.GetValue()) + 128
		if full = full || size > 0 && size+n > m.cfg.Limits.ResponseBytes; full {
			break
		}
		resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: r.Name, Version: r.Version, Resource: r.Body})
		versions[name] = r.Version
		size += n
	}
	for name, version := range versions {
		s.sent[name] = version
		if _, ok := s.names[name]; version == "" && !ok {
			delete(s.sent, name) // nobody asks for it by name any more
		}
	}
	s.dirty, s.delta.owesFirst = full, false
	resp.Nonce = m.expect(s, now, versions)
	return resp
}

// deltaDiff compares what the peer was told with what there is, sorted by name.
func (s *subscription) deltaDiff() (changed, removed []string) {
	if s.wildcard {
		for name, r := range s.snapshot {
			if s.sent[name] != r.Version {
				changed = append(changed, name)
			}
		}
	}
	for name := range s.names {
		r, exists := s.snapshot[name]
		told, ok := s.sent[name]
		switch {
		case exists && !s.wildcard && told != r.Version:
			changed = append(changed, name)
		case !exists && !ok:
			removed = append(removed, name) // asked for, and there is no such thing
		}
	}
	for name, told := range s.sent {
		if _, exists := s.snapshot[name]; !exists && told != "" {
			removed = append(removed, name)
		}
	}
	slices.Sort(changed)
	slices.Sort(removed)
	return changed, removed
}
