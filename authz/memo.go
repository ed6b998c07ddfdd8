package authz

import "sync/atomic"

// memoSlots is how many tokens a dimension remembers; more of them than that
// share slots, which costs time and nothing else.
const memoSlots = 256

// claimMemo remembers to which nodes the values of a long claim lead, so that a
// token with hundreds of groups is looked up once and not at every request. It
// belongs to the index and dies with it; the answer is a function of the index
// and the claim alone, so concurrent writers can only write the same.
type claimMemo struct {
	slots [memoSlots]atomic.Pointer[claimNodes]
}

type claimNodes struct {
	claim *claim // pinned here, so that its address stands for it
	nodes []*node
}

func (m *claimMemo) nodes(d *dimension, c *claim) []*node {
	slot := &m.slots[c.slot%memoSlots]
	if e := slot.Load(); e != nil && e.claim == c {
		return e.nodes
	}
	e := &claimNodes{claim: c}
	seen := make(map[*node]bool)
	for _, v := range c.values {
		d.visitText(v, func(n *node) {
			if !seen[n] {
				seen[n] = true
				e.nodes = append(e.nodes, n)
			}
		})
	}
	slot.Store(e)
	return e.nodes
}
