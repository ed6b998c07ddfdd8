package xds

import (
	"log/slog"
	"slices"
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ServeSotW serves one state-of-the-world stream until it ends. The error is one
// that gRPC can give to the peer.
func ServeSotW(stream SotWStream, cfg Config) error {
	cfg = cfg.withDefaults()
	w := newWatcher()
	m := &sotwMachine{engine: newEngine(cfg, w)}
	return serve(transport[*discoveryv3.DiscoveryRequest, *discoveryv3.DiscoveryResponse](stream),
		machine[*discoveryv3.DiscoveryRequest, *discoveryv3.DiscoveryResponse](m), w, cfg)
}

// Fetch answers one unary request with what there is now. Names that do not
// exist are left out. It does not wait: where nothing is known yet, it is Unavailable.
func Fetch(req *discoveryv3.DiscoveryRequest, cfg Config) (*discoveryv3.DiscoveryResponse, error) {
	cfg = cfg.withDefaults()
	e := newEngine(cfg, nil) // nothing is watched
	url, err := e.typeURL(req.GetTypeUrl())
	if err != nil {
		return nil, err
	}
	if url == "" {
		return nil, status.Error(codes.InvalidArgument, "resource type not served here")
	}
	snapshot, _ := cfg.Source.Resources(url)
	if snapshot == nil {
		return nil, status.Error(codes.Unavailable, "not yet available")
	}
	s := &subscription{url: url, snapshot: snapshot}
	if err := e.checkNames(s, req.GetResourceNames()); err != nil {
		return nil, err
	}
	s.setNames(req.GetResourceNames())
	present := s.present()
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: url, VersionInfo: s.versionInfo(present)}
	for _, name := range present {
		resp.Resources = append(resp.Resources, snapshot[name].Body)
	}
	return resp, nil
}

type sotwMachine struct{ engine }

// sotwState is what only a state-of-the-world subscription knows.
type sotwState struct {
	// claimed is the version_info of the first request: what the peer holds of an earlier stream.
	claimed string
	// named: names were given once, and then an empty list is no wildcard.
	named bool
	// responded: a response has been sent.
	responded bool
	lastNonce string
}

func (m *sotwMachine) request(req *discoveryv3.DiscoveryRequest) error {
	m.greet(req.GetNode())
	s, first, err := m.subscribe(req.GetTypeUrl())
	if err != nil || s == nil {
		return err
	}
	nonce := req.GetResponseNonce()
	if nonce != "" && s.sotw.lastNonce != "" && nonce != s.sotw.lastNonce {
		// The peer has not seen the last response yet; it repeats its names with the
		// answer to that one.
		m.cfg.Log.Debug("stale nonce ignored", slog.String("type_url", s.url))
		return nil
	}
	if first {
		s.sotw.claimed = req.GetVersionInfo()
	}
	s.names = nil
	if err := m.checkNames(s, req.GetResourceNames()); err != nil {
		return err
	}
	s.setNames(req.GetResourceNames())
	for name := range s.sent {
		if _, ok := s.names[name]; !ok && !s.wildcard {
			delete(s.sent, name) // asked for again later, it is sent again
		}
	}
	s.dirty = true
	if nonce == "" || nonce != s.sotw.lastNonce || len(s.unanswered) == 0 {
		return nil
	}
	r := s.unanswered[len(s.unanswered)-1]
	s.unanswered = nil
	m.answer(s, r, req.GetErrorDetail())
	return nil
}

// setNames replaces the subscription. An empty list is a wildcard until names
// have been given; "*" always is.
func (s *subscription) setNames(names []string) {
	s.names = make(map[string]struct{}, len(names))
	s.wildcard = false
	for _, name := range names {
		if name == wildcard {
			s.wildcard = true
			continue
		}
		if name != "" { // SPIRE's agent takes an empty name for none
			s.names[name] = struct{}{}
		}
	}
	if len(s.names) > 0 {
		s.sotw.named = true
	}
	if len(s.names) == 0 && !s.sotw.named {
		s.wildcard = true
	}
}

func (m *sotwMachine) next(now time.Time) (*discoveryv3.DiscoveryResponse, bool, time.Duration) {
	return nextResponse(m.order, m.types, now, m.respond)
}

// respond builds the next response; nil if the peer has been told everything.
func (m *sotwMachine) respond(s *subscription, now time.Time) *discoveryv3.DiscoveryResponse {
	s.dirty = false
	present := s.present()
	versions := make(map[string]string, len(present))
	for _, name := range present {
		versions[name] = s.snapshot[name].Version
	}
	info := s.versionInfo(present)
	if !s.sotw.responded && s.sotw.claimed != "" && s.sotw.claimed == info {
		// Exactly what the peer already holds, by its own word.
		s.sotw.responded, s.sent = true, versions
		m.cfg.Observer.Acked(s.url, versions)
		return nil
	}
	if !s.sotwNews(versions) {
		return nil
	}
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: s.url, VersionInfo: info}
	for _, name := range present {
		resp.Resources = append(resp.Resources, s.snapshot[name].Body)
	}
	for name := range s.sent {
		if _, ok := versions[name]; !ok {
			versions[name] = ""
		}
	}
	s.sent = make(map[string]string, len(present))
	for _, name := range present {
		s.sent[name] = versions[name]
	}
	s.sotw.responded = true
	s.unanswered = nil // only the last response can be answered
	resp.Nonce = m.expect(s, now, versions)
	s.sotw.lastNonce = resp.Nonce
	return resp
}

// sotwNews reports whether there is something to say. That a named resource is
// gone cannot be said in this variant (Envoy takes an empty answer for an error),
// so there is nothing to say where none of the names exist.
func (s *subscription) sotwNews(versions map[string]string) bool {
	if s.wildcard && !s.sotw.responded {
		return true
	}
	for name, version := range versions {
		if s.sent[name] != version {
			return true
		}
	}
	if s.wildcard {
		for name := range s.sent {
			if _, ok := versions[name]; !ok {
				return true
			}
		}
	}
	return false
}

// present lists the subscribed resources that exist, by name.
func (s *subscription) present() []string {
	var out []string
	for name := range s.snapshot {
		if _, ok := s.names[name]; ok || s.wildcard {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// versionInfo is the version of a set: of one resource its own, of more a hash.
func (s *subscription) versionInfo(present []string) string {
	if len(present) == 1 {
		return s.snapshot[present[0]].Version
	}
	var b strings.Builder
	for _, name := range present {
		b.WriteString(name)
		b.WriteByte('\n')
		b.WriteString(s.snapshot[name].Version)
		b.WriteByte('\n')
	}
	return ContentVersion([]byte(b.String()))
}
