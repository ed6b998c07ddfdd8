package kube

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"castellan.dev/internal/workloads"
)

// update is the making of one reading: a service that changes makes its pods be
// looked at (their declared ports), and a pod that changes the services that
// select it or have its address.
type update struct {
	*Inventory
	changes changes
	// Of this update, by namespace.
	selectors map[string]selectorIndex
	labels    map[string]*labelIndex // made when they pay
}

// run reports whether anything has changed.
func (u *update) run() (changed bool) {
	for key := range u.changes.services {
		u.takeService(key)
	}
	u.indexSelectors()
	for uid := range u.changes.pods {
		if u.pod(uid) {
			changed = true
		}
	}
	clear(u.labels) // they are of before
	for key := range u.changes.services {
		if u.service(key) {
			changed = true
		}
	}
	return changed
}

// takeService reads a service, and marks the pods that it selected or selects.
func (u *update) takeService(key string) {
	obj, ok, err := u.cfg.Informers.services.GetByKey(key)
	next, _ := obj.(*corev1.Service)
	if err != nil || !ok {
		next = nil
	}
	old := u.services[key]
	if old == nil {
		old = &service{}
		u.services[key] = old
	}
	before := old.object
	if before == next {
		return // a slice of it has changed
	}
	old.object = next
	if before != nil && next != nil && sameDeclaration(before, next) {
		return
	}
	for _, s := range []*corev1.Service{before, next} {
		if s != nil {
			for _, w := range u.selectedBy(s) {
				u.changes.pods[w.PodUID] = true
			}
		}
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

// pod makes one workload anew.
func (u *update) pod(uid string) (changed bool) {
	var object *corev1.Pod
	if found, err := u.cfg.Informers.pods.ByIndex(IndexUID, uid); err == nil && len(found) > 0 {
		object, _ = found[0].(*corev1.Pod)
	}
	var next *candidate
	if object != nil && live(object) {
		w, err := workloadOf(object, u.selecting(object.Namespace, object.Labels))
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
	for _, c := range []*candidate{before, next} {
		if c != nil {
			u.touch(c.Workload)
		}
	}
	return true
}

// touch marks the services that a workload has to do with.
func (u *update) touch(w *workloads.Workload) {
	for _, s := range u.selecting(w.Namespace, w.Labels) {
		u.changes.services[s.Namespace+"/"+s.Name] = true
	}
	for _, a := range append([]string{w.Address}, w.Addresses...) {
		for _, key := range u.users[a] {
			u.changes.services[key] = true
		}
	}
}

// service makes one service anew.
func (u *update) service(key string) (changed bool) {
	s := u.services[key]
	if s == nil {
		return false
	}
	var next *workloads.Service
	var named []string
	if s.object != nil {
		view := &serviceView{domain: u.cfg.ClusterDomain, at: u.pods.at, of: u.of, selected: u.selectedBy(s.object)}
		if found, err := u.cfg.Informers.endpoints.ByIndex(indexService, key); err == nil {
			for _, o := range found {
				if slice, ok := o.(*discoveryv1.EndpointSlice); ok {
					view.slices = append(view.slices, slice)
				}
			}
		}
		slices.SortFunc(view.slices, compareNames)
		var err error
		next, err = serviceOf(s.object, view)
		u.complain("Service", key, err)
		named = view.named()
	} else {
		u.complain("Service", key, nil)
	}
	u.follow(key, s, named)
	if s.object == nil {
		delete(u.services, key)
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

// touched reports whether a workload that a service names has changed with this update.
func (u *update) touched(s *workloads.Service) bool {
	return s != nil && slices.ContainsFunc(s.Endpoints, func(e workloads.Endpoint) bool {
		return e.Workload != "" && u.changes.pods[e.Workload]
	})
}

// follow remembers at which addresses a service has endpoints.
func (u *update) follow(key string, s *service, named []string) {
	for _, a := range s.addresses {
		u.users[a] = slices.DeleteFunc(u.users[a], func(k string) bool { return k == key })
		if len(u.users[a]) == 0 {
			delete(u.users, a)
		}
	}
	s.addresses = named
	for _, a := range named {
		u.users[a] = append(u.users[a], key)
	}
}

func compareNames(a, b *discoveryv1.EndpointSlice) int {
	switch {
	case a.Name < b.Name:
		return -1
	case a.Name > b.Name:
		return 1
	}
	return 0
}

// named are the addresses in a service's slices.
func (v *serviceView) named() []string {
	var out []string
	for _, s := range v.slices {
		for i := range s.Endpoints {
			for _, a := range s.Endpoints[i].Addresses {
				out = append(out, canonical(a))
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// of returns the live workload with a UID, nil if there is none.
func (u *update) of(uid string) *workloads.Workload {
	if c := u.pods.byUID[uid]; c != nil {
		return c.Workload
	}
	return nil
}

// selectorIndex finds the services of a namespace that select given labels, by
// one label that each of them wants.
type selectorIndex map[[2]string][]*corev1.Service

// indexSelectors goes by the services as they have been taken, not by what the
// informers know by now: the next update starts from what this one has seen.
func (u *update) indexSelectors() {
	u.selectors = map[string]selectorIndex{}
	for _, s := range u.services {
		if s.object == nil {
			continue
		}
		label, ok := greatest(s.object.Spec.Selector)
		if !ok {
			continue
		}
		ix := u.selectors[s.object.Namespace]
		if ix == nil {
			ix = selectorIndex{}
			u.selectors[s.object.Namespace] = ix
		}
		ix[label] = append(ix[label], s.object)
	}
}

// selecting returns the services that select such a pod, by name.
func (u *update) selecting(namespace string, labels map[string]string) []*corev1.Service {
	ix := u.selectors[namespace]
	var out []*corev1.Service
	for k, v := range labels {
		for _, s := range ix[[2]string{k, v}] {
			if selects(s, namespace, labels) {
				out = append(out, s)
			}
		}
	}
	slices.SortFunc(out, func(a, b *corev1.Service) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return out
}

// greatest returns the label of the greatest key: which one is of no matter, but
// it is always the same.
func greatest(labels map[string]string) (out [2]string, ok bool) {
	for k, v := range labels {
		if !ok || k > out[0] {
			out, ok = [2]string{k, v}, true
		}
	}
	return out, ok
}

// labelIndex holds a namespace's workloads by label.
type labelIndex struct {
	all     []*workloads.Workload
	asked   int
	byLabel map[[2]string][]*workloads.Workload
}

// fewLookups is how many services' pods are looked for without an index.
const fewLookups = 4

// selectedBy returns the live workloads that a service's own selector selects.
func (u *update) selectedBy(s *corev1.Service) []*workloads.Workload {
	label, ok := greatest(s.Spec.Selector)
	if !ok {
		return nil
	}
	ix := u.labels[s.Namespace]
	if ix == nil {
		ix = &labelIndex{all: u.inNamespace(s.Namespace)}
		u.labels[s.Namespace] = ix
	}
	var out []*workloads.Workload
	for _, w := range ix.with(label) {
		if selects(s, w.Namespace, w.Labels) {
			out = append(out, w)
		}
	}
	return out
}

// with returns workloads among which are all with the label.
func (ix *labelIndex) with(label [2]string) []*workloads.Workload {
	if ix.asked++; ix.asked <= fewLookups {
		return ix.all
	}
	if ix.byLabel == nil {
		ix.byLabel = map[[2]string][]*workloads.Workload{}
		for _, w := range ix.all {
			for k, v := range w.Labels {
				ix.byLabel[[2]string{k, v}] = append(ix.byLabel[[2]string{k, v}], w)
			}
		}
	}
	return ix.byLabel[label]
}

func (u *update) inNamespace(namespace string) []*workloads.Workload {
	out := make([]*workloads.Workload, 0, len(u.pods.byNamespace[namespace]))
	for _, c := range u.pods.byNamespace[namespace] {
		out = append(out, c.Workload)
	}
	return out
}
