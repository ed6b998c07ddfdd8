package kube

import "slices"

// podSet holds the live workloads as they have been taken from the informers: what
// an update asks is what the update before has left, plus what it has taken itself.
type podSet struct {
	byUID       map[string]*candidate
	byNamespace map[string]map[string]*candidate // by UID
	byAddress   map[string][]*candidate
}

func newPodSet() podSet {
	return podSet{byUID: map[string]*candidate{}, byNamespace: map[string]map[string]*candidate{}, byAddress: map[string][]*candidate{}}
}

// replace puts next in the place of what had the UID; nil takes it out.
func (p *podSet) replace(uid string, next *candidate) {
	if old := p.byUID[uid]; old != nil {
		delete(p.byUID, uid)
		if space := p.byNamespace[old.Namespace]; len(space) > 1 {
			delete(space, uid)
		} else {
			delete(p.byNamespace, old.Namespace)
		}
		for _, a := range old.addresses() {
			p.byAddress[a] = slices.DeleteFunc(p.byAddress[a], func(c *candidate) bool { return c == old })
			if len(p.byAddress[a]) == 0 {
				delete(p.byAddress, a)
			}
		}
	}
	if next == nil {
		return
	}
	p.byUID[uid] = next
	if p.byNamespace[next.Namespace] == nil {
		p.byNamespace[next.Namespace] = map[string]*candidate{}
	}
	p.byNamespace[next.Namespace][uid] = next
	for _, a := range next.addresses() {
		p.byAddress[a] = append(p.byAddress[a], next)
	}
}

func (c *candidate) addresses() []string {
	if c.Address == "" {
		return nil
	}
	return append([]string{c.Address}, c.Addresses...)
}
