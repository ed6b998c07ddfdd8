package discovery

import (
	"slices"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// index finds the documents that select a workload without asking each of them:
// by namespace, and there by one of the labels a document wants.
type index struct {
	mesh   policy.Mesh
	docs   []*inForce
	spaces map[string]*space
}

// space holds one namespace's documents, by their place in index.docs.
type space struct {
	all     []int
	byLabel map[[2]string][]int
}

func newIndex(docs []*inForce, mesh policy.Mesh) *index {
	ix := &index{mesh: mesh, docs: docs, spaces: map[string]*space{}}
	for i, d := range docs {
		s := ix.spaces[d.ref.Namespace]
		if s == nil {
			s = &space{byLabel: map[[2]string][]int{}}
			ix.spaces[d.ref.Namespace] = s
		}
		if label, ok := oneLabel(d.doc); ok {
			s.byLabel[label] = append(s.byLabel[label], i)
		} else {
			s.all = append(s.all, i)
		}
	}
	return ix
}

// oneLabel returns a label without which the document selects nobody.
func oneLabel(doc policy.Document) (label [2]string, ok bool) {
	var selector *policy.Selector
	switch {
	case doc.Authorization != nil:
		selector = doc.Authorization.Selector
	case doc.RequestAuthentication != nil:
		selector = doc.RequestAuthentication.Selector
	case doc.PeerAuthentication != nil:
		selector = doc.PeerAuthentication.Selector
	}
	if selector == nil {
		return label, false
	}
	for k, v := range selector.MatchLabels {
		// The greatest key: which one is of no matter, but it is always the same.
		if !ok || k > label[0] {
			label, ok = [2]string{k, v}, true
		}
	}
	return label, ok
}

// selecting returns the documents that select such a workload, in their order.
func (ix *index) selecting(namespace string, labels map[string]string) []*inForce {
	namespaces := []string{namespace}
	if root := rootNamespace(ix.mesh); root != namespace {
		namespaces = append(namespaces, root)
	}
	var found []int
	for _, ns := range namespaces {
		s := ix.spaces[ns]
		if s == nil {
			continue
		}
		found = append(found, s.all...)
		for k, v := range labels {
			found = append(found, s.byLabel[[2]string{k, v}]...)
		}
	}
	slices.Sort(found)
	out := make([]*inForce, 0, len(found))
	for _, i := range found {
		// authz has the last word on what selects.
		if d := ix.docs[i]; authz.Selects(d.doc, namespace, labels, ix.mesh) {
			out = append(out, d)
		}
	}
	return out
}
