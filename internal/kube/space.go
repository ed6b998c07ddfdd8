package kube

import (
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"castellan.dev/identity"
)

// maxAccounts bounds the accounts that answer for one service. Beyond it none does:
// who calls the service is refused.
const maxAccounts = 250

// space is what is kept of a namespace that has services.
type space struct {
	services   map[*service]bool
	selections map[string]*selection // by what is selected
	// byLabel finds the selections that select given labels by one that each of them wants.
	byLabel map[[2]string]map[*selection]bool
	// beyond and cut say of whom the namespace's share leaves nothing, or only the name.
	beyond, cut error
}

// selection is all services of a namespace with the same selector: a pod has to do
// with all of them or with none, so that much is asked once for all.
type selection struct {
	key       string
	namespace string
	labels    map[string]string
	services  map[*service]bool
	// accounts counts the pods of the mesh that are selected, by account; nil with
	// tooMany.
	accounts map[identity.Account]int
	tooMany  bool
	sorted   []identity.Account // nil: to be made
	declared []declaration      // nil: to be made
}

func newSpace() *space {
	return &space{services: map[*service]bool{}, selections: map[string]*selection{}, byLabel: map[[2]string]map[*selection]bool{}}
}

// selecting reports whether a service has a selector that counts: without one it
// selects nobody.
func selecting(s *corev1.Service) bool {
	return s != nil && len(s.Spec.Selector) > 0 && s.Spec.Type != corev1.ServiceTypeExternalName
}

// join puts a service to those of its selector; made is whether it is the first.
func (sp *space) join(s *service, object *corev1.Service) (made bool) {
	var key strings.Builder
	for _, k := range slices.Sorted(maps.Keys(object.Spec.Selector)) {
		key.WriteString(k + "=" + object.Spec.Selector[k] + ",")
	}
	sel := sp.selections[key.String()]
	if sel == nil {
		made = true
		sel = &selection{key: key.String(), namespace: object.Namespace, labels: object.Spec.Selector,
			services: map[*service]bool{}, accounts: map[identity.Account]int{}}
		sp.selections[sel.key] = sel
		label := greatest(sel.labels)
		if sp.byLabel[label] == nil {
			sp.byLabel[label] = map[*selection]bool{}
		}
		sp.byLabel[label][sel] = true
	}
	sel.services[s], sel.declared, s.selection = true, nil, sel
	return made
}

// leave takes a service from those of its selector.
func (sp *space) leave(s *service) {
	sel := s.selection
	s.selection, sel.declared = nil, nil
	delete(sel.services, s)
	if len(sel.services) > 0 {
		return
	}
	delete(sp.selections, sel.key)
	label := greatest(sel.labels)
	if delete(sp.byLabel[label], sel); len(sp.byLabel[label]) == 0 {
		delete(sp.byLabel, label)
	}
}

// matching are the selections of a pod with such labels.
func (sp *space) matching(labels map[string]string) map[*selection]bool {
	if sp == nil {
		return nil
	}
	var out map[*selection]bool
	for k, v := range labels {
		for sel := range sp.byLabel[[2]string{k, v}] {
			if hasLabels(labels, sel.labels) {
				if out == nil {
					out = map[*selection]bool{}
				}
				out[sel] = true
			}
		}
	}
	return out
}

// greatest returns the label of the greatest key: which one is of no matter, but
// it is always the same.
func greatest(labels map[string]string) (out [2]string) {
	for k, v := range labels {
		if k > out[0] {
			out = [2]string{k, v}
		}
	}
	return out
}

// count changes how many pods of an account are selected, and reports whether other
// accounts answer than before. Once there were too many, only a recount tells.
func (sel *selection) count(a identity.Account, by int) (changed bool) {
	if sel.tooMany {
		return by < 0
	}
	before := sel.accounts[a]
	switch sel.accounts[a] = before + by; {
	case before+by == 0:
		delete(sel.accounts, a)
	case before > 0:
		return false
	}
	if len(sel.accounts) > maxAccounts {
		sel.tooMany, sel.accounts = true, nil
	}
	sel.sorted = nil
	return true
}

// recount counts anew.
func (sel *selection) recount(pods []*candidate) {
	sel.tooMany, sel.sorted, sel.accounts = false, nil, map[identity.Account]int{}
	for _, c := range pods {
		if sel.tooMany {
			return
		}
		if !c.OutsideMesh {
			sel.count(c.Account(), 1)
		}
	}
}

// answering are the accounts that may answer for the services, none where they are
// too many. It is never nil, which would mean something else.
func (sel *selection) answering() []identity.Account {
	if sel == nil {
		return []identity.Account{}
	}
	if sel.sorted == nil {
		sel.sorted = slices.SortedFunc(maps.Keys(sel.accounts), func(a, b identity.Account) int { return strings.Compare(a.String(), b.String()) })
		if sel.sorted == nil {
			sel.sorted = []identity.Account{}
		}
	}
	return sel.sorted
}
