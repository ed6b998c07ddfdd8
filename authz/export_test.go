package authz

// AuthorizeByScan decides as Authorize does, trying every clause in order
// instead of asking the index: what the index is held against.
func (c *Connection) AuthorizeByScan(r *Request) Decision {
	if d, denied := c.closed(); denied {
		return d
	}
	q := query{fixed: &c.fixed, req: r, host: asciiLower(r.Host), remote: c.fixed.remote}
	if r.RemoteIP.IsValid() {
		q.remote = plainAddr(r.RemoteIP)
	}
	return c.scan(&c.snapshot.http, &q)
}

// AuthorizeTCPByScan is to AuthorizeTCP what AuthorizeByScan is to Authorize.
func (c *Connection) AuthorizeTCPByScan() Decision {
	if d, denied := c.closed(); denied {
		return d
	}
	return c.scan(&c.snapshot.tcp, &query{fixed: &c.fixed, remote: c.fixed.remote})
}

func (c *Connection) scan(p *programs, q *query) Decision {
	var found [slotCount]int
	for i, prog := range p.slots() {
		found[i] = -1
		if prog == nil {
			continue
		}
		q.prog = prog
		for id := range prog.clauses {
			if q.matches(uint32(id), true) {
				found[i] = int(prog.clauses[id].rule)
				break
			}
		}
	}
	return c.snapshot.decide(p, &hits{
		custom: found[slotCustom], deny: found[slotDeny], allow: found[slotAllow],
		dryDeny: found[slotDryDeny], dryAllow: found[slotDryAllow],
	})
}

// MatchTemplate parses a path value and compares it with a path.
func MatchTemplate(template, path string) (bool, error) {
	p, err := parsePath(template)
	if err != nil {
		return false, err
	}
	return p.matchText(path), nil
}

// MatchGlob compares a namespace.
func MatchGlob(glob, s string) bool { return matchGlob(glob, s) }

// Nominated counts the clauses that the index lets Authorize compare, were none
// of them to match.
func (c *Connection) Nominated(r *Request) int {
	q := query{fixed: &c.fixed, req: r, host: asciiLower(r.Host), remote: c.fixed.remote}
	if r.RemoteIP.IsValid() {
		q.remote = plainAddr(r.RemoteIP)
	}
	n := 0
	for i, p := range c.snapshot.http.slots() {
		if p == nil {
			continue
		}
		// Clauses that cannot match: every nomination is tried.
		never := make([]clause, len(p.clauses))
		for j := range never {
			never[j].alternatives = [][][]term{nil}
			never[j].fixed = []term{{ref: ref{attr: attrHeader, name: countName}, pos: &set{}}}
		}
		count := &countHeader{Header: r.Header}
		req := *r
		req.Header = count
		q.req = &req
		copied := *p
		copied.clauses = never
		q.prog = &copied
		l := &c.live[i]
		n += len(l.clauses)
		for _, node := range l.nodes {
			node.search(&q, none)
		}
		for _, d := range l.dims {
			d.search(&q, none)
		}
		n += count.asked
	}
	return n
}

const countName = "\x00count"

type countHeader struct {
	Header
	asked int
}

func (h *countHeader) Values(name string) []string {
	if name == countName {
		h.asked++
		return nil
	}
	return h.Header.Values(name)
}
