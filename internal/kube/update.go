package kube

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"castellan.dev/internal/workloads"
)

// update is the making of one reading: a service that changes makes its pods be
// looked at (their declared ports), and a pod that changes the services to which
// what has changed of it matters. It asks what has been taken, not what the
// informers know by now: the next update starts from what this one has seen.
type update struct {
	*Inventory
	changes changes
	// settle are the namespaces whose services' objects have changed, moved those
	// that may be of another selection now.
	settle map[string]bool
	moved  map[*service]bool
	// seen are the selections whose pods have been marked.
	seen map[*selection]bool
	// renamed are the workloads, by UID, whose account is another.
	renamed map[string]bool
	recount map[*selection]bool
	// relist are the services whose slices must be read.
	relist map[*service]bool
	labels map[string]*labelIndex // by namespace, made when they pay
}

func newUpdate(inv *Inventory, c changes) *update {
	return &update{Inventory: inv, changes: c, settle: map[string]bool{}, moved: map[*service]bool{}, seen: map[*selection]bool{},
		renamed: map[string]bool{}, recount: map[*selection]bool{}, relist: map[*service]bool{}, labels: map[string]*labelIndex{}}
}

// run reports whether anything has changed.
func (u *update) run() (changed bool) {
	for key := range u.changes.services {
		u.takeService(key)
	}
	for namespace := range u.settle {
		u.admit(u.spaces[namespace])
	}
	for s := range u.moved {
		u.selected(s)
	}
	for uid := range u.changes.pods {
		if u.pod(uid) {
			changed = true
		}
	}
	clear(u.labels) // they are of before
	for sel := range u.recount {
		sel.recount(u.selectedBy(sel))
		u.markAll(sel)
	}
	return u.convert() || changed
}

// takeService reads a service.
func (u *update) takeService(key string) {
	obj, ok, err := u.cfg.Informers.services.GetByKey(key)
	next, _ := obj.(*corev1.Service)
	if err != nil || !ok {
		next = nil
	}
	s := u.services[key]
	if s == nil && next == nil {
		return // a slice of nobody's
	}
	if s == nil {
		s = &service{key: key}
		u.services[key] = s
	}
	if s.object == next {
		return // a slice of it has changed
	}
	namespace := cmp.Or(next, s.object).Namespace
	sp := u.spaces[namespace]
	if sp == nil {
		sp = newSpace()
		u.spaces[namespace] = sp
	}
	if s.object = next; next != nil {
		sp.services[s] = true
	} else {
		delete(sp.services, s)
		s.beyond = false
	}
	u.settle[namespace], u.moved[s] = true, true
}

// selected puts a service among those of its selector, and marks the pods that it
// selected or selects.
func (u *update) selected(s *service) {
	next := s.known()
	if !selecting(next) {
		next = nil
	}
	before := s.declaring
	s.declaring = next
	if before == next || before != nil && next != nil && sameDeclaration(before, next) {
		return
	}
	sp := u.spaces[cmp.Or(before, next).Namespace]
	if s.selection != nil {
		u.markPods(s.selection)
		sp.leave(s)
	}
	if next != nil {
		if sp.join(s, next) {
			s.selection.recount(u.selectedBy(s.selection))
		}
		u.markPods(s.selection)
	}
}

func (u *update) markPods(sel *selection) {
	if u.seen[sel] {
		return
	}
	u.seen[sel] = true
	for _, c := range u.selectedBy(sel) {
		u.changes.pods[c.PodUID] = true
	}
}

// sameDeclaration reports whether two versions of a service say the same of the
// same pods' ports.
func sameDeclaration(a, b *corev1.Service) bool {
	return a.Spec.Type == b.Spec.Type && maps.Equal(a.Spec.Selector, b.Spec.Selector) &&
		slices.EqualFunc(a.Spec.Ports, b.Spec.Ports, func(x, y corev1.ServicePort) bool {
			return x.TargetPort == y.TargetPort && x.Port == y.Port && isTCP(x.Protocol) == isTCP(y.Protocol) && protocolOf(&x) == protocolOf(&y)
		})
}

// convert makes the services anew that were marked.
func (u *update) convert() (changed bool) {
	spaces := map[string]bool{}
	for key, full := range u.changes.services {
		s := u.services[key]
		if s == nil {
			continue
		}
		object := s.known()
		if s.outlined != object {
			if s.outlined, s.outline = object, (outline{}); object != nil {
				s.outline = outlineOf(object, u.cfg.ClusterDomain)
			}
		}
		if full {
			s.places = 0
			if s.outline.Service != nil {
				s.places = countPlaces(u.slicesOf(s), s.outline.Ports)
			}
			u.relist[s] = true
		}
		spaces[namespaceOf(key)] = true
	}
	for namespace := range spaces {
		sp := u.spaces[namespace]
		u.share(sp)
		u.complain("Namespace", namespace, sp.excess())
		if len(sp.services) == 0 {
			delete(u.spaces, namespace)
		}
	}
	for key := range u.changes.services {
		if s := u.services[key]; s != nil && u.service(s) {
			changed = true
		}
	}
	return changed
}

// service makes one service anew.
func (u *update) service(s *service) (changed bool) {
	if u.relist[s] {
		var places []place
		if s.dropped = ""; s.outline.Service != nil && !s.cut {
			places, s.dropped = listPlaces(u.slicesOf(s), s.outline.Ports)
		}
		u.follow(s, places)
	}
	next, err := u.made(s)
	u.complain("Service", s.key, err)
	if s.object == nil {
		delete(u.services, s.key)
	}
	if sameService(s.made, next) && !u.touched(next) {
		return false
	}
	if next != nil {
		u.revision++
		next.Revision = u.revision
	}
	s.made = next
	return true
}

// made puts a service together, nil for one that is none of the mesh's business.
func (u *update) made(s *service) (*workloads.Service, error) {
	if s.outline.Service == nil {
		return nil, s.outline.problem
	}
	next := *s.outline.Service
	if s.cut { // fails closed: nobody can answer
		next.SubjectAltNames, next.Accounts = nil, (*selection)(nil).answering()
		return &next, s.outline.problem
	}
	next.Accounts = s.selection.answering()
	var dropped string
	next.Endpoints, dropped = u.endpoints(s)
	switch {
	case s.outline.problem != nil:
		return &next, s.outline.problem
	case s.selection != nil && s.selection.tooMany:
		return &next, fmt.Errorf("its pods have more than %d accounts; none of them may answer for it", maxAccounts)
	case dropped != "":
		return &next, fmt.Errorf("endpoint %s", dropped)
	}
	return &next, nil
}

// touched reports whether a workload that a service names is another's than before.
func (u *update) touched(s *workloads.Service) bool {
	return s != nil && len(u.renamed) > 0 && slices.ContainsFunc(s.Endpoints, func(e workloads.Endpoint) bool { return u.renamed[e.Workload] })
}

// slicesOf are the slices of a service, by name.
func (u *update) slicesOf(s *service) []*discoveryv1.EndpointSlice {
	var out []*discoveryv1.EndpointSlice
	if found, err := u.cfg.Informers.endpoints.ByIndex(indexService, s.key); err == nil {
		for _, o := range found {
			if slice, ok := o.(*discoveryv1.EndpointSlice); ok {
				out = append(out, slice)
			}
		}
	}
	slices.SortFunc(out, func(a, b *discoveryv1.EndpointSlice) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// follow remembers what a service's slices list, and at which addresses.
func (u *update) follow(s *service, places []place) {
	before := s.listed
	s.listed = places
	if slices.EqualFunc(before, places, func(a, b place) bool { return a.address == b.address }) {
		return
	}
	for i := range before {
		a := before[i].address
		if left := u.users[a].without(s); left.one != nil {
			u.users[a] = left
		} else {
			delete(u.users, a)
		}
	}
	for i := range places {
		a := places[i].address
		u.users[a] = u.users[a].with(s)
	}
}
