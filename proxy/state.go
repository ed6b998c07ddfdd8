package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/tlsconf"
)

// state is everything a connection or request is judged by. It is immutable and
// hangs behind one pointer, so that one judgement never mixes two updates.
type state struct {
	// svid is our certificate; nil until there is one, and then no handshake succeeds.
	svid *tls.Certificate
	id   spiffeid.ID
	// serial is svid's, in hex.
	serial string
	// trust is nil until certificate and bundle are there: nobody is trusted.
	trust *tlsconf.Trust
	// policy is nil until there is one: everything is denied.
	policy   *policyState
	services map[string]*service
	// index finds them by address; nil until services are known.
	index *index
}

// policyState is one policy of our workload, compiled.
type policyState struct {
	snapshot *authz.Snapshot
	// tokens judges end-user tokens; nil when no rule asks.
	tokens *jws.Authenticator
	// broken, if not empty, says why everything is denied.
	broken  string
	mesh    policy.Mesh
	aliases []spiffeid.TrustDomain
	// ports holds the declared protocol by workload port.
	ports map[uint16]string
	// http says which ports have rules about HTTP.
	http httpPorts
}

// mode is how mutual TLS is wanted on a port. Without a policy it is STRICT.
func (s *state) mode(port uint16) authz.Mode {
	if s.policy == nil {
		return authz.ModeStrict
	}
	return s.policy.snapshot.MTLSMode(port)
}

// declared is the protocol our workload's services declare for a port.
func (s *state) declared(port uint16) string {
	if s.policy == nil {
		return ""
	}
	return s.policy.ports[port]
}

// plainAllowed reports whether what is outside the mesh may be spoken to in the
// clear. Without a policy it may not.
func (s *state) plainAllowed() bool {
	return s.policy != nil && s.policy.mesh.OutboundPolicy == policy.OutboundAllowAny
}

// passes reports whether a captured connection is passed on as it is, in the
// clear: it goes to nobody of the mesh, and the mesh allows that.
func (s *state) passes(original netip.AddrPort) bool {
	if !s.plainAllowed() || s.index == nil {
		return false
	}
	at, ours := s.index.find(original)
	switch {
	case !ours:
		return true
	case at.endpoint != nil:
		return at.endpoint.outside
	}
	return at.port.outsideOnly()
}

// wantsHTTP reports whether bytes that are no HTTP have no business on a port:
// policy judges its requests by their tokens, or by fields that only HTTP has,
// and neither the port's declaration nor a rule says that it carries anything else.
func (s *state) wantsHTTP(port uint16) bool {
	return s.policy != nil && s.policy.ports[port] == "" && s.policy.http.on(port)
}

// store holds the inputs as they came, and the state made of them.
type store struct {
	current atomic.Pointer[state]
	keys    atomic.Pointer[map[string]*jws.KeySet]

	// mu serialises updates; readers never take it.
	mu sync.Mutex
	in inputs
	// changed is called after each new state, still under mu: when it returns,
	// live connections have been judged by the new state.
	changed func()
}

// inputs are what the agent told last, by resource.
type inputs struct {
	svid     *tls.Certificate
	id       spiffeid.ID
	roots    []*x509.Certificate
	policies map[string]*policyInput
	denied   denylist
	services destinations
}

func newStore() *store {
	s := &store{changed: func() {}}
	s.current.Store(&state{})
	s.in.policies = map[string]*policyInput{}
	return s
}

func (s *store) load() *state { return s.current.Load() }

// trust is what peers are judged by now.
func (s *store) trust() *tlsconf.Trust { return s.load().trust }

// certificate is what we present now.
func (s *store) certificate() (*tls.Certificate, error) { return s.load().svid, nil }

// keySet is the key set of a token source; nil when it could not be had.
func (s *store) keySet(source string) *jws.KeySet {
	if sets := s.keys.Load(); sets != nil {
		return (*sets)[source]
	}
	return nil
}

// update changes inputs, derives the state and has live connections judged by it.
func (s *store) update(change func(*inputs)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.in)
	s.current.Store(s.in.derive())
	s.changed()
}

// derive makes the state of the inputs.
func (in *inputs) derive() *state {
	st := &state{svid: in.svid, id: in.id, policy: in.policy()}
	if in.svid != nil {
		st.serial = in.svid.Leaf.SerialNumber.Text(16)
	}
	if in.svid != nil && len(in.roots) > 0 {
		st.trust = in.trust(st.policy)
	}
	home := "" // nobody's, until there is an identity
	if w, err := identity.FromID(in.id); err == nil {
		home = w.Account().Namespace()
	}
	st.services, st.index = in.services.resolve(st.trust, home)
	return st
}

// policy picks the one policy. None, or one for somebody else, leaves
// everything denied; so do several, since which one counts cannot be known.
func (in *inputs) policy() *policyState {
	if len(in.policies) != 1 {
		return nil
	}
	for _, p := range in.policies {
		if !in.id.IsZero() && !p.protects(in.id) {
			return nil
		}
		return p.compiled
	}
	return nil
}

func (in *inputs) trust(pol *policyState) *tlsconf.Trust {
	t := &tlsconf.Trust{TrustDomain: in.id.TrustDomain(), Roots: in.roots, Denied: in.denied.denies}
	if pol != nil {
		t.Aliases = pol.aliases
	}
	t.Version = trustVersion(t)
	return t
}
