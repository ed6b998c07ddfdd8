package kube

import (
	"fmt"

	"castellan.dev/internal/workloads"
)

// maxPlacesOfNamespace bounds endpoints times ports over a namespace's services:
// every proxy of the mesh holds those of all.
const maxPlacesOfNamespace = 5 * maxPlaces

// shareCut marks the revision of a service whose endpoints are left out: it is
// another than that of the same service with them.
const shareCut = 1 << 63

// share leaves out the endpoints of services beyond their namespace's share, by
// name. Whoever calls these is refused; other namespaces' go on. The services are
// sorted, and the slice is the caller's own.
func (inv *Inventory) share(services []workloads.Service) {
	for first := 0; first < len(services); {
		namespace, last, places, cut := services[first].Namespace, first, 0, ""
		for ; last < len(services) && services[last].Namespace == namespace; last++ {
			s := &services[last]
			n := 0
			for i := range s.Endpoints {
				n += len(s.Endpoints[i].Ports)
			}
			if places+n > maxPlacesOfNamespace {
				s.Endpoints, cut = nil, s.Name
				s.Revision |= shareCut
				continue
			}
			places += n
		}
		var err error
		if cut != "" {
			err = fmt.Errorf("service %q, and maybe others, is left without endpoints: %d times the ports they serve are allowed in a namespace", cut, maxPlacesOfNamespace)
		}
		inv.complain("Namespace", namespace, err)
		first = last
	}
}
