package authz

import (
	"math"
	"net/netip"
	"slices"
	"strings"
)

// none is the id of no clause.
const none = math.MaxUint32

// maxEntries bounds an index, whatever the policies; beyond it clauses are tried
// one by one, which is slow but right.
const maxEntries = 1 << 20

// maxWork bounds how often keys are looked at while an index is built: with many
// clauses that differ in little, dividing them once more costs much and gains
// nothing. Ten thousand ordinary rules take less than a hundredth of it.
const maxWork = 1 << 24

// leafSize is up to how many clauses are tried one by one.
const leafSize = 4

// node is a part of the index: clauses to try, and dimensions to look values up
// in, each leading to further nodes. The index only nominates: a clause is found
// under at least one of the values with which it can match, and then compared
// whole. So a mistake here could miss a match but never invent one, and the
// differential tests look for the former.
type node struct {
	least uint32 // the lowest clause id below
	leaf  []uint32
	dims  []dimension
}

// dimension leads from the value of one attribute to nodes.
type dimension struct {
	ref       ref
	exact     map[string]*node
	prefixes  *radix[*node]
	suffixes  *radix[*node]
	templates *templateTree[*node]
	nets      []netGroup
	memo      *claimMemo // of claims, at the root
}

// netGroup holds the CIDRs of one length.
type netGroup struct {
	bits int
	four bool
	by   map[netip.Prefix]*node
}

// key is one way to be found in a dimension.
type key struct {
	dim  int32
	kind patternKind // patExact, patPrefix, patSuffix, patTemplate or patNet
	text string
	net  netip.Prefix
}

// access is a dimension in which a clause can be found, under each of its keys.
type access struct {
	dim  int32
	keys []int32
}

// builder holds what building one index needs.
type builder struct {
	dims     []ref
	dimIDs   map[string]int32
	keys     []key
	keyIDs   map[key]int32
	bySet    map[*set]access
	accesses [][]access // by clause
	counts   []int32    // by key, of the node being built
	used     []bool     // by dimension, above the node being built
	budget   int        // entries still allowed, so that an index stays in proportion to its policies
	work     int        // that may still be done
}

// buildIndex returns the root over all clauses.
func buildIndex(clauses []clause) *node {
	b := &builder{dimIDs: map[string]int32{}, keyIDs: map[key]int32{}, bySet: map[*set]access{}, accesses: make([][]access, len(clauses))}
	ids := make([]uint32, len(clauses))
	total := 0
	for i := range clauses {
		ids[i] = uint32(i)
		b.accesses[i] = b.accessesOf(&clauses[i])
		for _, a := range b.accesses[i] {
			total += len(a.keys)
		}
	}
	b.counts = make([]int32, len(b.keys))
	b.used = make([]bool, len(b.dims))
	b.budget = min(8*total+1<<12, maxEntries)
	b.work = maxWork
	return b.node(ids, true)
}

// accessesOf lists the dimensions of a clause in order of preference: what the
// connection fixes first, since that is looked up once.
func (b *builder) accessesOf(c *clause) []access {
	var out []access
	for _, terms := range [][]term{c.fixed, c.asked} {
		for i := range terms {
			if t := &terms[i]; t.pos != nil {
				out = append(out, b.access(t))
			}
		}
	}
	slices.SortStableFunc(out, func(x, y access) int { return int(b.dims[x.dim].attr) - int(b.dims[y.dim].attr) })
	return out
}

func (b *builder) access(t *term) access {
	if a, ok := b.bySet[t.pos]; ok {
		return a
	}
	id := t.ref.id()
	dim, ok := b.dimIDs[id]
	if !ok {
		dim = int32(len(b.dims))
		b.dims = append(b.dims, t.ref)
		b.dimIDs[id] = dim
	}
	a := access{dim: dim}
	for i := range t.pos.patterns {
		k := keyOf(&t.pos.patterns[i])
		k.dim = dim
		kid, ok := b.keyIDs[k]
		if !ok {
			kid = int32(len(b.keys))
			b.keys = append(b.keys, k)
			b.keyIDs[k] = kid
		}
		a.keys = append(a.keys, kid)
	}
	slices.Sort(a.keys)
	a.keys = slices.Compact(a.keys)
	b.bySet[t.pos] = a
	return a
}

// keyOf returns a key under which everything is found that the pattern takes.
func keyOf(p *pattern) key {
	switch p.kind {
	case patExact, patPrefix, patSuffix:
		return key{kind: p.kind, text: p.text}
	case patNet:
		return key{kind: patNet, net: p.net}
	case patSubject:
		return keyOfSubject(p)
	case patTemplate:
		return key{kind: patTemplate, text: p.text}
	case patGlob:
		prefix, suffix := p.text[:strings.IndexByte(p.text, '*')], p.text[strings.LastIndexByte(p.text, '*')+1:]
		if len(suffix) > len(prefix) {
			return key{kind: patSuffix, text: suffix}
		}
		return key{kind: patPrefix, text: prefix}
	default:
		return key{kind: patPrefix}
	}
}

// keyOfSubject finds request principals by issuer "/" subject.
func keyOfSubject(p *pattern) key {
	switch {
	case p.iss.kind == patExact && p.sub.kind == patExact:
		return key{kind: patExact, text: p.iss.text + "/" + p.sub.text}
	case p.iss.kind == patExact && p.sub.kind == patPrefix:
		return key{kind: patPrefix, text: p.iss.text + "/" + p.sub.text}
	case p.iss.kind == patExact:
		return key{kind: patPrefix, text: p.iss.text + "/"}
	case p.iss.kind == patPrefix:
		return key{kind: patPrefix, text: p.iss.text}
	case p.sub.kind == patExact && p.iss.kind == patSuffix:
		return key{kind: patSuffix, text: p.iss.text + "/" + p.sub.text}
	case p.sub.kind == patExact:
		return key{kind: patSuffix, text: "/" + p.sub.text}
	case p.sub.kind == patSuffix:
		return key{kind: patSuffix, text: p.sub.text}
	default:
		return key{kind: patPrefix}
	}
}

// node builds the node over some clauses, in order, that the dimensions in used
// have already told apart.
func (b *builder) node(ids []uint32, root bool) *node {
	n := &node{least: ids[0]}
	if len(ids) <= leafSize || b.budget <= 0 || !b.affords(ids) {
		n.leaf = ids
		return n
	}
	byDim := b.divide(n, ids)
	order := make([]int32, 0, len(byDim))
	for dim := range byDim {
		order = append(order, dim)
	}
	slices.Sort(order)
	for _, dim := range order {
		b.used[dim] = true
		n.dims = append(n.dims, b.dimension(dim, byDim[dim], root))
		b.used[dim] = false
	}
	return n
}

// affords takes what it costs to divide the clauses off the work that may be done.
func (b *builder) affords(ids []uint32) bool {
	for _, id := range ids {
		b.work--
		for _, a := range b.accesses[id] {
			b.work -= 1 + len(a.keys)
		}
		if b.work <= 0 {
			return false
		}
	}
	return true
}

// divide puts each clause under the keys of that dimension in which it shares its
// most crowded key with the fewest others; those that cannot be found by any
// stay with the node.
func (b *builder) divide(n *node, ids []uint32) map[int32]map[int32][]uint32 {
	b.count(ids, 1)
	byDim := make(map[int32]map[int32][]uint32)
	for _, id := range ids {
		best, crowd := -1, int32(math.MaxInt32)
		for i, a := range b.accesses[id] {
			if b.used[a.dim] {
				continue
			}
			if c := b.crowd(a); c < crowd {
				best, crowd = i, c
			}
		}
		if best < 0 {
			n.leaf = append(n.leaf, id)
			continue
		}
		a := b.accesses[id][best]
		by := byDim[a.dim]
		if by == nil {
			by = make(map[int32][]uint32)
			byDim[a.dim] = by
		}
		for _, k := range a.keys {
			by[k] = append(by[k], id)
		}
		b.budget -= len(a.keys)
	}
	b.count(ids, -1)
	return byDim
}

func (b *builder) count(ids []uint32, by int32) {
	for _, id := range ids {
		for _, a := range b.accesses[id] {
			for _, k := range a.keys {
				b.counts[k] += by
			}
		}
	}
}

func (b *builder) crowd(a access) int32 {
	var most int32
	for _, k := range a.keys {
		most = max(most, b.counts[k])
	}
	return most
}

func (b *builder) dimension(dim int32, by map[int32][]uint32, root bool) dimension {
	d := dimension{ref: b.dims[dim]}
	if d.ref.attr == attrClaim && root {
		d.memo = new(claimMemo)
	}
	prefixes, suffixes, templates := make(map[string]*node), make(map[string]*node), make(map[string]*node)
	order := make([]int32, 0, len(by))
	for k := range by {
		order = append(order, k)
	}
	slices.Sort(order)
	for _, id := range order {
		child := b.node(by[id], false)
		switch k := b.keys[id]; k.kind {
		case patExact:
			if d.exact == nil {
				d.exact = make(map[string]*node)
			}
			d.exact[k.text] = child
		case patPrefix:
			prefixes[k.text] = child
		case patSuffix:
			suffixes[k.text] = child
		case patTemplate:
			templates[k.text] = child
		case patNet:
			d.addNet(k.net, child)
		}
	}
	d.prefixes = newRadix(prefixes, false)
	d.suffixes = newRadix(suffixes, true)
	d.templates = newTemplateTree(templates)
	return d
}

func (d *dimension) addNet(p netip.Prefix, child *node) {
	four := p.Addr().Is4()
	for i := range d.nets {
		if g := &d.nets[i]; g.bits == p.Bits() && g.four == four {
			g.by[p] = child
			return
		}
	}
	d.nets = append(d.nets, netGroup{bits: p.Bits(), four: four, by: map[netip.Prefix]*node{p: child}})
}
