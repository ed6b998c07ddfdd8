package authz

// program is all policies of one action, compiled.
type program struct {
	clauses []clause
	root    *node // nil without clauses
	// eachValue says that one value of a repeated header is enough to match.
	eachValue bool
	// decisions and shadows are the answers by rule, ready made.
	decisions []Decision
	shadows   []Shadow
}

// programs are those of one protocol, nil where there is no policy of the action.
type programs struct {
	custom, deny, allow *program
	// dryDeny and dryAllow are of the policies that only cast a shadow.
	dryDeny, dryAllow *program
}

// each calls f with the programs there are, in the order of slots.
func (p *programs) slots() [slotCount]*program {
	return [slotCount]*program{p.custom, p.deny, p.allow, p.dryDeny, p.dryAllow}
}

// Slots of programs.
const (
	slotCustom = iota
	slotDeny
	slotAllow
	slotDryDeny
	slotDryAllow
	slotCount
)

// add appends a rule's clauses.
func (p *program) add(d ruleDraft, answer Decision) {
	rule := uint32(len(p.decisions))
	p.answer(answer)
	p.clauses = append(p.clauses, d.clauses(rule, len(p.clauses))...)
}

func (p *program) answer(d Decision) {
	p.decisions = append(p.decisions, d)
	p.shadows = append(p.shadows, Shadow{
		Allowed: d.Allowed, Action: d.Action, Policy: d.Policy,
		Rule: d.Rule, Reason: d.Reason, Provider: d.Provider,
	})
}

// finish builds the index.
func (p *program) finish() {
	if p == nil || len(p.clauses) == 0 {
		return
	}
	p.root = buildIndex(p.clauses)
	for i := range p.clauses {
		for _, terms := range [][]term{p.clauses[i].fixed, p.clauses[i].asked} {
			for _, t := range terms {
				if t.pos != nil {
					t.pos.patterns = nil
				}
			}
		}
	}
}

// live is what of a program is left once the connection is known.
type live struct {
	// clauses are known to hold as far as the connection goes, in order.
	clauses []uint32
	nodes   []*node
	dims    []*dimension
}

// connect keeps what the connection leaves possible: of the root's dimensions
// those that it fixes are looked up now.
func (p *program) connect(fixed *fixedValues) live {
	var l live
	if p == nil || p.root == nil {
		return l
	}
	q := query{fixed: fixed, prog: p}
	l.keep(&q, p.root.leaf)
	for i := range p.root.dims {
		d := &p.root.dims[i]
		if !d.ref.attr.fixed() {
			l.dims = append(l.dims, d)
			continue
		}
		d.visit(&q, func(n *node) {
			if len(n.dims) == 0 {
				l.keep(&q, n.leaf)
			} else {
				l.nodes = append(l.nodes, n)
			}
		})
	}
	l.sort()
	return l
}

func (l *live) keep(q *query, ids []uint32) {
	for _, id := range ids {
		if q.all(q.prog.clauses[id].fixed) {
			l.clauses = append(l.clauses, id)
		}
	}
}

// search returns the lowest matching rule of a program, or -1.
func (p *program) search(q *query, l *live) int {
	if p == nil {
		return -1
	}
	q.prog = p
	best := uint32(none)
	for _, id := range l.clauses {
		if q.matches(id, false) {
			best = id
			break
		}
	}
	for _, n := range l.nodes {
		best = n.search(q, best)
	}
	for _, d := range l.dims {
		best = d.search(q, best)
	}
	return p.rule(best)
}

// searchAll is search without a connection's preparation.
func (p *program) searchAll(q *query) int {
	if p == nil || p.root == nil {
		return -1
	}
	q.prog = p
	return p.rule(p.root.search(q, none))
}

func (p *program) rule(id uint32) int {
	if id == none {
		return -1
	}
	return int(p.clauses[id].rule)
}
