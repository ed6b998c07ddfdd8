package authz

import "strings"

// templateTree finds the path templates that take a path, by segments: literal,
// {*}, or {**} with what follows it.
type templateTree[V any] struct {
	literal map[string]*templateTree[V]
	one     *templateTree[V]
	// rest holds what follows {**}, by the end of the path: "" or "/x/y".
	rest *radix[V]
	end  V
	has  bool
}

// newTemplateTree builds a tree of templates, given by their text; nil where
// there is none.
func newTemplateTree[V any](values map[string]V) *templateTree[V] {
	if len(values) == 0 {
		return nil
	}
	tails := make(map[*templateTree[V]]map[string]V)
	root := new(templateTree[V])
	for text, v := range values {
		root.add(text, v, tails)
	}
	for t, by := range tails {
		t.rest = newRadix(by, true)
	}
	return root
}

// add puts in what is left of a template, which parsePath has accepted.
func (t *templateTree[V]) add(text string, v V, tails map[*templateTree[V]]map[string]V) {
	if text == "" {
		t.end, t.has = v, true
		return
	}
	seg := text[1:]
	if i := strings.IndexByte(seg, '/'); i >= 0 {
		seg = seg[:i]
	}
	text = text[1+len(seg):]
	if seg == tokenRest {
		if tails[t] == nil {
			tails[t] = make(map[string]V)
		}
		tails[t][text] = v
		return
	}
	var next *templateTree[V]
	if seg == tokenOne {
		if t.one == nil {
			t.one = new(templateTree[V])
		}
		next = t.one
	} else {
		if t.literal == nil {
			t.literal = make(map[string]*templateTree[V])
		}
		if next = t.literal[seg]; next == nil {
			next = new(templateTree[V])
			t.literal[seg] = next
		}
	}
	next.add(text, v, tails)
}

// visit calls f with the value of each template that takes the path, until f
// says that it has enough, which visit then says too.
func (t *templateTree[V]) visit(path string, f func(V) bool) bool {
	if path == "" {
		return t.has && f(t.end)
	}
	if path[0] != '/' {
		return false
	}
	path = path[1:]
	if t.rest != nil {
		for c := t.rest.walk(path); ; {
			v, ok := c.next()
			if !ok {
				break
			}
			if f(v) {
				return true
			}
		}
	}
	n := strings.IndexByte(path, '/')
	if n < 0 {
		n = len(path)
	}
	if next := t.literal[path[:n]]; next != nil && next.visit(path[n:], f) {
		return true
	}
	return n > 0 && t.one != nil && t.one.visit(path[n:], f)
}
