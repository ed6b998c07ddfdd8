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
