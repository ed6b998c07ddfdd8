package kube

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// pod makes one workload anew.
func (u *update) pod(uid string) (changed bool) {
	var object *corev1.Pod
	if found, err := u.cfg.Informers.pods.ByIndex(IndexUID, uid); err == nil && len(found) > 0 {
		object, _ = found[0].(*corev1.Pod)
	}
	var next *candidate
	if object != nil && live(object) {
		w, err := workloadOf(object, u.spaces[object.Namespace].matching(object.Labels))
		u.complain("Pod", object.Namespace+"/"+object.Name, err)
		if err == nil {
			next = &candidate{Workload: w, hostNetwork: object.Spec.HostNetwork}
		}
	}
	before := u.pods.byUID[uid]
	switch {
	case next == nil && before == nil:
		return false
	case next != nil && before != nil && before.hostNetwork == next.hostNetwork && sameWorkload(before.Workload, next.Workload):
		return false
	case next == nil:
		u.pods.replace(uid, nil)
		u.complain("Pod", before.Namespace+"/"+before.PodName, nil)
	default:
		u.revision++
		next.Revision = u.revision
		u.pods.replace(uid, next)
	}
	u.selections(before, next)
	u.neighbours(before, next)
	return true
}

// selections counts a pod where it is selected, and marks the services to which it
// makes a difference.
func (u *update) selections(before, next *candidate) {
	was, is := u.matching(before), u.matching(next)
	account, answered := before.answers()
	now, answers := next.answers()
	same := account == now && answered == answers
	for sel := range was {
		if answered && !(same && is[sel]) {
			u.count(sel, before, -1)
		}
		// Those outside the mesh stand in the clear where they are selected.
		if !is[sel] && before.OutsideMesh {
			u.markAll(sel)
		}
	}
	for sel := range is {
		if answers && !(same && was[sel]) {
			u.count(sel, next, 1)
		}
		if !was[sel] && next.OutsideMesh {
			u.markAll(sel)
		}
	}
}

func (u *update) count(sel *selection, c *candidate, by int) {
	if !sel.count(c.Account(), by) {
		return
	}
	u.markAll(sel)
	if sel.tooMany && by < 0 {
		u.recount[sel] = true
	}
}

// neighbours marks the services with an endpoint where a pod stood or stands, unless
// it stands there as before.
func (u *update) neighbours(before, next *candidate) {
	if before != nil && next != nil {
		renamed := before.ServiceAccount != next.ServiceAccount || before.Namespace != next.Namespace
		if renamed {
			u.renamed[next.PodUID] = true
		}
		if !renamed && before.OutsideMesh == next.OutsideMesh && before.hostNetwork == next.hostNetwork && slices.Equal(before.addresses(), next.addresses()) {
			return
		}
	}
	for _, c := range []*candidate{before, next} {
		if c == nil {
			continue
		}
		for _, a := range c.addresses() {
			for s := range u.users[a].all() {
				u.mark(s)
			}
		}
	}
}

func (u *update) matching(c *candidate) map[*selection]bool {
	if c == nil {
		return nil
	}
	return u.spaces[c.Namespace].matching(c.Labels)
}

// mark has a service put together anew.
func (u *update) mark(s *service) {
	if _, ok := u.changes.services[s.key]; !ok {
		u.changes.services[s.key] = false
	}
}

func (u *update) markAll(sel *selection) {
	for s := range sel.services {
		u.mark(s)
	}
}

func namespaceOf(key string) string {
	namespace, _, _ := strings.Cut(key, "/")
	return namespace
}

// labelIndex holds a namespace's workloads by label.
type labelIndex struct {
	all     []*candidate
	asked   int
	byLabel map[[2]string][]*candidate
}

// fewLookups is how many selectors' pods are looked for without an index.
const fewLookups = 4

// selectedBy returns the live workloads that a selector selects.
func (u *update) selectedBy(sel *selection) []*candidate {
	ix := u.labels[sel.namespace]
	if ix == nil {
		ix = &labelIndex{}
		for _, c := range u.pods.byNamespace[sel.namespace] {
			ix.all = append(ix.all, c)
		}
		u.labels[sel.namespace] = ix
	}
	var out []*candidate
	for _, c := range ix.with(greatest(sel.labels)) {
		if hasLabels(c.Labels, sel.labels) {
			out = append(out, c)
		}
	}
	return out
}

// with returns workloads among which are all with the label.
func (ix *labelIndex) with(label [2]string) []*candidate {
	if ix.asked++; ix.asked <= fewLookups {
		return ix.all
	}
	if ix.byLabel == nil {
		ix.byLabel = map[[2]string][]*candidate{}
		for _, c := range ix.all {
			for k, v := range c.Labels {
				ix.byLabel[[2]string{k, v}] = append(ix.byLabel[[2]string{k, v}], c)
			}
		}
	}
	return ix.byLabel[label]
}
