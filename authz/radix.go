package authz

import (
	"sort"
	"strings"
)

// radix is an immutable tree of texts with a value each; a walk along a string
// meets, shortest first, the values of all texts that the string begins with, or
// ends with if the tree is reversed.
type radix[V any] struct {
	reversed bool
	root     radixNode[V]
}

type radixNode[V any] struct {
	// label is what leads from the parent to here, in the order of the walk.
	label string
	// first holds the first byte of each child's label.
	first    string
	children []*radixNode[V]
	value    V
	has      bool
}

// newRadix builds a tree; nil where there is nothing to hold.
func newRadix[V any](values map[string]V, reversed bool) *radix[V] {
	if len(values) == 0 {
		return nil
	}
	texts := make([]string, 0, len(values))
	walked := make(map[string]V, len(values))
	for text, v := range values {
		if reversed {
			text = reverse(text)
		}
		texts = append(texts, text)
		walked[text] = v
	}
	sort.Strings(texts)
	t := &radix[V]{reversed: reversed}
	t.root.build(texts, 0, walked)
	return t
}

// build fills a node from sorted texts that agree in their first depth bytes.
func (n *radixNode[V]) build(texts []string, depth int, values map[string]V) {
	if len(texts) > 0 && len(texts[0]) == depth {
		n.value, n.has = values[texts[0]], true
		texts = texts[1:]
	}
	var first strings.Builder
	for len(texts) > 0 {
		c := texts[0][depth]
		end := sort.Search(len(texts), func(i int) bool { return texts[i][depth] > c })
		group := texts[:end]
		texts = texts[end:]
		// Sorted, so what the outermost two share all share.
		to := depth + 1
		for a, b := group[0], group[len(group)-1]; to < len(a) && to < len(b) && a[to] == b[to]; {
			to++
		}
		child := &radixNode[V]{label: group[0][depth:to]}
		child.build(group, to, values)
		first.WriteByte(c)
		n.children = append(n.children, child)
	}
	n.first = first.String()
}

// cursor is a walk under way.
type cursor[V any] struct {
	node     *radixNode[V]
	s        string
	at       int
	reversed bool
}

func (t *radix[V]) walk(s string) cursor[V] {
	return cursor[V]{node: &t.root, s: s, reversed: t.reversed}
}

// next returns the next value on the way, if any.
func (c *cursor[V]) next() (v V, ok bool) {
	for c.node != nil {
		n := c.node
		c.node = c.step(n)
		if n.has {
			return n.value, true
		}
	}
	return v, false
}

func (c *cursor[V]) step(n *radixNode[V]) *radixNode[V] {
	if c.at >= len(c.s) || len(n.first) == 0 {
		return nil
	}
	b := c.s[c.at]
	if c.reversed {
		b = c.s[len(c.s)-1-c.at]
	}
	i := strings.IndexByte(n.first, b)
	if i < 0 {
		return nil
	}
	child := n.children[i]
	if len(c.s)-c.at < len(child.label) {
		return nil
	}
	if !c.reversed {
		if c.s[c.at:c.at+len(child.label)] != child.label {
			return nil
		}
	} else {
		for j := range len(child.label) {
			if c.s[len(c.s)-1-c.at-j] != child.label[j] {
				return nil
			}
		}
	}
	c.at += len(child.label)
	return child
}

func reverse(s string) string {
	b := []byte(s)
	for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
		b[i], b[j] = b[j], b[i]
	}
	return string(b)
}
