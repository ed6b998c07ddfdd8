package authz

import (
	"net/netip"
	"strings"
)

// search returns the lowest clause below n that matches, or best if none is lower.
func (n *node) search(q *query, best uint32) uint32 {
	if n.least >= best {
		return best
	}
	for _, id := range n.leaf {
		if id >= best {
			break
		}
		if q.matches(id, true) {
			best = id
			break
		}
	}
	for i := range n.dims {
		best = n.dims[i].search(q, best)
	}
	return best
}

// search looks up the attribute's value, or each of its values.
func (d *dimension) search(q *query, best uint32) uint32 {
	switch d.ref.attr {
	case attrSourceIP:
		return d.searchIP(q, q.fixed.source, best)
	case attrDestinationIP:
		return d.searchIP(q, q.fixed.destination, best)
	case attrRemoteIP:
		return d.searchIP(q, q.remote, best)
	case attrSubject:
		if c := q.req.Claims; c != nil && c.principal != "" {
			return d.searchText(q, c.principal, best)
		}
		return best
	case attrClaim:
		claim := q.req.Claims.at(d.ref.claim)
		if claim == nil {
			return best
		}
		return d.searchClaim(q, claim, best)
	case attrHeader:
		return d.searchHeader(q, best)
	default:
		return d.searchText(q, q.text(d.ref.attr), best)
	}
}

func (d *dimension) searchClaim(q *query, c *claim, best uint32) uint32 {
	if c.lookup == nil || d.memo == nil {
		for _, v := range c.values {
			best = d.searchText(q, v, best)
		}
		return best
	}
	for _, n := range d.memo.nodes(d, c) {
		best = n.search(q, best)
	}
	return best
}

func (d *dimension) searchHeader(q *query, best uint32) uint32 {
	values := q.headerValues(d.ref.name)
	if len(values) == 1 {
		return d.searchText(q, values[0], best)
	}
	if len(values) == 0 {
		return best
	}
	best = d.searchText(q, strings.Join(values, ","), best)
	if q.prog.eachValue {
		for _, v := range values {
			best = d.searchText(q, v, best)
		}
	}
	return best
}

func (d *dimension) searchText(q *query, v string, best uint32) uint32 {
	if d.exact != nil {
		if n := d.exact[v]; n != nil {
			best = n.search(q, best)
		}
	}
	if d.prefixes != nil {
		for c := d.prefixes.walk(v); ; {
			n, ok := c.next()
			if !ok {
				break
			}
			best = n.search(q, best)
		}
	}
	if d.suffixes != nil {
		for c := d.suffixes.walk(v); ; {
			n, ok := c.next()
			if !ok {
				break
			}
			best = n.search(q, best)
		}
	}
	if d.templates != nil {
		d.templates.visit(v, func(n *node) bool {
			best = n.search(q, best)
			return false
		})
	}
	return best
}

func (d *dimension) searchIP(q *query, a netip.Addr, best uint32) uint32 {
	if !a.IsValid() {
		return best
	}
	for i := range d.nets {
		g := &d.nets[i]
		if g.four != a.Is4() {
			continue
		}
		p, err := a.Prefix(g.bits)
		if err != nil {
			continue
		}
		if n := g.by[p]; n != nil {
			best = n.search(q, best)
		}
	}
	return best
}

// visit calls f with the nodes that the connection's value leads to, for
// attributes that it fixes.
func (d *dimension) visit(q *query, f func(*node)) {
	switch d.ref.attr {
	case attrSourceIP:
		d.visitIP(q.fixed.source, f)
	case attrDestinationIP:
		d.visitIP(q.fixed.destination, f)
	default:
		d.visitText(q.text(d.ref.attr), f)
	}
}

func (d *dimension) visitText(v string, f func(*node)) {
	if n := d.exact[v]; n != nil {
		f(n)
	}
	for _, t := range []*radix[*node]{d.prefixes, d.suffixes} {
		if t == nil {
			continue
		}
		for c := t.walk(v); ; {
			n, ok := c.next()
			if !ok {
				break
			}
			f(n)
		}
	}
	if d.templates != nil {
		d.templates.visit(v, func(n *node) bool {
			f(n)
			return false
		})
	}
}

func (d *dimension) visitIP(a netip.Addr, f func(*node)) {
	for i := range d.nets {
		g := &d.nets[i]
		if !a.IsValid() || g.four != a.Is4() {
			continue
		}
		if p, err := a.Prefix(g.bits); err == nil && g.by[p] != nil {
			f(g.by[p])
		}
	}
}
