package authz

import (
	"net/netip"
	"slices"

	"castellan.dev/identity"
)

// Connection is a Snapshot with all evaluated that one connection fixes. It is
// immutable and safe for concurrent use; a nil Connection denies everything.
type Connection struct {
	snapshot *Snapshot
	fixed    fixedValues
	live     [slotCount]live
}

// Connect evaluates what the connection fixes. It may be called on a nil
// Snapshot, whose connections deny everything.
func (s *Snapshot) Connect(p Peer) *Connection {
	c := &Connection{snapshot: s}
	if s == nil || s.denyAll != "" {
		return c
	}
	c.fixed = fixedValues{
		port:        portText(p.DestinationPort),
		sni:         asciiLower(p.SNI),
		source:      plainAddr(p.SourceIP),
		destination: plainAddr(p.DestinationIP),
		remote:      plainAddr(p.RemoteIP),
	}
	if !c.fixed.remote.IsValid() {
		c.fixed.remote = c.fixed.source
	}
	if !p.ID.IsZero() {
		c.fixed.principal = p.ID.String()[len("spiffe://"):]
		c.fixed.trustDomain = p.ID.TrustDomain().Name()
		// An identity of another shape has no namespace and no account; only
		// its principal and trust domain can name it.
		if w, err := identity.FromID(p.ID); err == nil {
			c.fixed.namespace = w.Account().Namespace()
			c.fixed.account = w.Account().String()
		}
	}
	for i, prog := range s.http.slots() {
		c.live[i] = prog.connect(&c.fixed)
	}
	return c
}

// plainAddr drops what makes equal addresses differ: the IPv4-mapped form and
// zones.
func plainAddr(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// Authorize decides about a request.
func (c *Connection) Authorize(r *Request) Decision { return c.authorize(r, false) }

// AuthorizePastCustom decides as Authorize does with CUSTOM policies left out:
// for when their provider has agreed.
func (c *Connection) AuthorizePastCustom(r *Request) Decision { return c.authorize(r, true) }

func (c *Connection) authorize(r *Request, pastCustom bool) Decision {
	if d, denied := c.closed(); denied {
		return d
	}
	if r == nil {
		return Decision{Rule: -1, Reason: ReasonNoMatch}
	}
	s := c.snapshot
	q := query{fixed: &c.fixed, req: r, host: asciiLower(r.Host), remote: c.fixed.remote}
	if r.RemoteIP.IsValid() {
		q.remote = plainAddr(r.RemoteIP)
	}
	h := hits{-1, -1, -1, -1, -1}
	progs := &s.http
	if !pastCustom {
		h.custom = progs.custom.search(&q, &c.live[slotCustom])
	}
	if h.custom < 0 {
		h.deny = progs.deny.search(&q, &c.live[slotDeny])
	}
	// What denies casts the same shadow.
	if h.custom < 0 && h.deny < 0 {
		h.allow = progs.allow.search(&q, &c.live[slotAllow])
		h.dryDeny = progs.dryDeny.search(&q, &c.live[slotDryDeny])
		h.dryAllow = progs.dryAllow.search(&q, &c.live[slotDryAllow])
	}
	return s.decide(progs, &h)
}

// AuthorizeTCP decides about a connection that is not HTTP.
func (c *Connection) AuthorizeTCP() Decision { return c.authorizeTCP(false) }

// AuthorizeTCPPastCustom is to AuthorizeTCP what AuthorizePastCustom is to
// Authorize.
func (c *Connection) AuthorizeTCPPastCustom() Decision { return c.authorizeTCP(true) }

func (c *Connection) authorizeTCP(pastCustom bool) Decision {
	if d, denied := c.closed(); denied {
		return d
	}
	s := c.snapshot
	progs := &s.tcp
	q := query{fixed: &c.fixed, remote: c.fixed.remote}
	h := hits{
		custom:   -1,
		deny:     progs.deny.searchAll(&q),
		allow:    progs.allow.searchAll(&q),
		dryDeny:  progs.dryDeny.searchAll(&q),
		dryAllow: progs.dryAllow.searchAll(&q),
	}
	if !pastCustom {
		h.custom = progs.custom.searchAll(&q)
	}
	return s.decide(progs, &h)
}

// closed answers where there is no policy to ask: it denies.
func (c *Connection) closed() (Decision, bool) {
	switch {
	case c == nil || c.snapshot == nil:
		return Decision{Rule: -1, Reason: ReasonNoSnapshot}, true
	case c.snapshot.denyAll != "":
		return Decision{Rule: -1, Reason: c.snapshot.denyAll}, true
	default:
		return Decision{}, false
	}
}

// hits are the matching rules by program, -1 for none.
type hits struct{ custom, deny, allow, dryDeny, dryAllow int }

// decide puts matches in order (rule 3): CUSTOM, DENY, then ALLOW, and no ALLOW
// policy means allow.
func (s *Snapshot) decide(p *programs, h *hits) Decision {
	var d Decision
	switch {
	case h.custom >= 0:
		d = p.custom.decisions[h.custom]
	case h.deny >= 0:
		d = p.deny.decisions[h.deny]
	case p.allow == nil:
		d = Decision{Allowed: true, Rule: -1, Reason: ReasonNoAllowPolicy}
	case h.allow >= 0:
		d = p.allow.decisions[h.allow]
	default:
		d = Decision{Rule: -1, Reason: ReasonNoMatch}
	}
	if p.dryDeny != nil || p.dryAllow != nil {
		d.Shadow = s.shadow(p, h)
	}
	return d
}

// shadow is decide with the dry-run policies counted in.
func (s *Snapshot) shadow(p *programs, h *hits) *Shadow {
	switch {
	case h.custom >= 0:
		return &p.custom.shadows[h.custom]
	case h.deny >= 0:
		return &p.deny.shadows[h.deny]
	case h.dryDeny >= 0:
		return &p.dryDeny.shadows[h.dryDeny]
	case p.allow == nil && p.dryAllow == nil:
		return &s.noAllow
	case h.allow >= 0:
		return &p.allow.shadows[h.allow]
	case h.dryAllow >= 0:
		return &p.dryAllow.shadows[h.dryAllow]
	default:
		return &s.noMatch
	}
}

// sort puts clauses in order, each once: several keys may lead to one.
func (l *live) sort() {
	slices.Sort(l.clauses)
	l.clauses = slices.Compact(l.clauses)
}
