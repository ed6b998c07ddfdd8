package authz

import "slices"

// term is one field of a clause: (one of pos) AND NOT (one of neg).
type term struct {
	ref      ref
	pos, neg *set
}

// clause is an AND. A rule becomes one clause for each pair of a source and an
// operation, so that the index can look for each on its own.
type clause struct {
	rule  uint32
	fixed []term // what the connection fixes
	asked []term // what the request says
	// alternatives are ORs of ANDs that were too many to pair; they are rare.
	alternatives [][][]term
}

// Bounds on pairing sources with operations.
const (
	maxPairsPerRule = 1 << 14
	maxClauses      = 1 << 17
	// maxRepeated is how often the conditions of a rule, which each of its pairs
	// holds, may be repeated.
	maxRepeated = 1 << 17
)

// clauses pairs a rule's sources and operations.
func (d ruleDraft) clauses(rule uint32, have int) []clause {
	from, to := simplify(d.from), simplify(d.to)
	when := build(d.when)
	pairs := len(from) * len(to)
	if pairs > maxPairsPerRule || have+pairs > maxClauses || pairs*len(when) > maxRepeated {
		c := newClause(rule, when)
		c.alternatives = [][][]term{from, to}
		return []clause{c}
	}
	out := make([]clause, 0, pairs)
	for _, f := range from {
		for _, t := range to {
			out = append(out, newClause(rule, f, t, when))
		}
	}
	return out
}

func newClause(rule uint32, parts ...[]term) clause {
	c := clause{rule: rule}
	for _, terms := range parts {
		for _, t := range terms {
			if t.ref.attr.fixed() {
				c.fixed = append(c.fixed, t)
			} else {
				c.asked = append(c.asked, t)
			}
		}
	}
	return c
}

// simplify turns an OR into built terms: one that holds always makes the whole
// hold always, and those that ask one and the same positive field become one.
func simplify(or []conj) [][]term {
	var merged []conj
	single := make(map[string]int)
	for _, c := range or {
		if len(c) == 0 {
			return [][]term{nil}
		}
		if len(c) == 1 && c[0].neg == nil {
			id := c[0].ref.id()
			if at, ok := single[id]; ok {
				merged[at][0].pos = append(merged[at][0].pos, c[0].pos...)
				continue
			}
			single[id] = len(merged)
			c = conj{{ref: c[0].ref, pos: slices.Clone(c[0].pos)}}
		}
		merged = append(merged, c)
	}
	if len(merged) == 0 {
		return [][]term{nil}
	}
	out := make([][]term, 0, len(merged))
	for _, c := range merged {
		out = append(out, build(c))
	}
	return out
}

func build(c conj) []term {
	terms := make([]term, 0, len(c))
	for _, d := range c {
		t := term{ref: d.ref}
		if d.pos != nil {
			t.pos = newSet(d.pos)
			t.pos.patterns = d.pos
		}
		if d.neg != nil {
			t.neg = newSet(d.neg)
		}
		terms = append(terms, t)
	}
	return terms
}
