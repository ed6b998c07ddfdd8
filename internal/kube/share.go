package kube

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// What every proxy of the mesh holds of one namespace's services. Where they are
// more, the oldest count, so that nobody's service goes for one that is made later.
const (
	// maxPortsOfNamespace bounds the services themselves: each has a port at least.
	// Kubernetes is tried with 5,000 services in a namespace.
	maxPortsOfNamespace = 10_000
	// maxPlacesOfNamespace bounds endpoints times ports.
	maxPlacesOfNamespace = 5 * maxPlaces
	// maxIdentitiesOfNamespace bounds who may answer: accounts and declared identities.
	maxIdentitiesOfNamespace = 20_000
)

// byAge lists a namespace's services, the oldest first.
func (sp *space) byAge() []*service {
	return slices.SortedFunc(maps.Keys(sp.services), func(a, b *service) int {
		return cmp.Or(a.object.CreationTimestamp.Compare(b.object.CreationTimestamp.Time), cmp.Compare(a.object.Name, b.object.Name))
	})
}

// admit decides which services of a namespace there are for the mesh: those whose
// ports are within its share. Others are as if they were not there, and whoever
// calls them calls an address outside the mesh: in the clear where the mesh
// settings allow that, which a receiver may refuse, and else not at all.
func (u *update) admit(sp *space) {
	total := 0
	for s := range sp.services {
		total += countedPorts(s.object)
	}
	sp.beyond = nil
	if total <= maxPortsOfNamespace {
		for s := range sp.services {
			u.setBeyond(s, false)
		}
		return
	}
	ports := 0
	for _, s := range sp.byAge() {
		n := countedPorts(s.object)
		fits := ports+n <= maxPortsOfNamespace
		if fits {
			ports += n
		} else {
			sp.beyond = fmt.Errorf("service %q, and maybe others, is not known to the mesh: the services of a namespace may have %d ports between them", s.object.Name, maxPortsOfNamespace)
		}
		u.setBeyond(s, !fits)
	}
}

func (u *update) setBeyond(s *service, beyond bool) {
	if s.beyond != beyond {
		s.beyond = beyond
		u.changes.services[s.key] = true
		u.moved[s] = true
	}
}

// share decides which services of a namespace are left without endpoints, and
// without anybody who could answer. Whoever calls these is refused; other
// namespaces' go on.
func (u *update) share(sp *space) {
	places, identities := 0, 0
	for s := range sp.services {
		n, ids := s.demand()
		places, identities = places+n, identities+ids
	}
	sp.cut = nil
	if places <= maxPlacesOfNamespace && identities <= maxIdentitiesOfNamespace {
		for s := range sp.services {
			u.setCut(s, false)
		}
		return
	}
	places, identities = 0, 0
	for _, s := range sp.byAge() {
		n, ids := s.demand()
		fits := places+n <= maxPlacesOfNamespace && identities+ids <= maxIdentitiesOfNamespace
		if fits {
			places, identities = places+n, identities+ids
		} else {
			sp.cut = fmt.Errorf("service %q, and maybe others, is left without endpoints: %d times the ports they serve, and %d identities, are allowed in a namespace",
				s.object.Name, maxPlacesOfNamespace, maxIdentitiesOfNamespace)
		}
		u.setCut(s, !fits)
	}
}

func (u *update) setCut(s *service, cut bool) {
	if s.cut != cut {
		s.cut = cut
		u.relist[s] = true
		u.mark(s)
	}
}

// demand is what a service would take of its namespace's share.
func (s *service) demand() (places, identities int) {
	if s.outline.Service == nil {
		return 0, 0
	}
	return s.places, len(s.outline.SubjectAltNames) + len(s.selection.answering())
}

// known is the version of a service that there is for the mesh, nil for none.
func (s *service) known() *corev1.Service {
	if s.beyond {
		return nil
	}
	return s.object
}

// excess says what the namespace's share leaves out.
func (sp *space) excess() error { return errors.Join(sp.beyond, sp.cut) }
