package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
)

// parseDeclared reads one identity of the annotation.
func parseDeclared(name string) (string, bool) {
	if !strings.Contains(name, "://") {
		name = "spiffe://" + name
	}
	id, err := spiffeid.FromString(name)
	if err != nil {
		return "", false
	}
	if _, err := identity.FromID(id); err != nil {
		return "", false
	}
	return id.String(), true
}

// endpoints adds a service's endpoints, and returns what there is to say of one
// that was left out.
func (v *serviceView) endpoints(s *corev1.Service, out *workloads.Service, byName map[string]uint16, declares bool) (dropped string) {
	found := map[string]*workloads.Endpoint{} // by address
	anyReady, places := v.anyReady(), 0
	for _, slice := range v.slices {
		ports := slicePorts(slice, byName)
		if slice.AddressType == discoveryv1.AddressTypeFQDN || len(ports) == 0 {
			continue
		}
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if !inUse(e, anyReady) || len(e.Addresses) == 0 {
				continue
			}
			// A slice's addresses of one endpoint are interchangeable; the first stands
			// for all, as with kube-proxy.
			address, err := netip.ParseAddr(e.Addresses[0])
			if err != nil || address.Zone() != "" {
				dropped = fmt.Sprintf("%q has no IP address and is left out", e.Addresses[0])
				continue
			}
			made, why := v.endpoint(s, e, address.Unmap().String(), declares)
			if made == nil {
				dropped = cmp.Or(why, dropped)
				continue
			}
			if places += len(ports); places > maxPlaces {
				return v.listed(out, found, fmt.Sprintf("%q is left out, and what follows: %d times the ports they serve are allowed", made.Address, maxPlaces))
			}
			if have := found[made.Address]; have != nil {
				maps.Copy(have.Ports, ports) // ports of one endpoint may be spread over slices
				continue
			}
			if len(found) == maxEndpoints {
				dropped = fmt.Sprintf("%q is one too many: %d are allowed", made.Address, maxEndpoints)
				continue
			}
			made.Ports = maps.Clone(ports)
			found[made.Address] = made
		}
	}
	return v.listed(out, found, dropped)
}

// listed puts the endpoints that were found into the service.
func (v *serviceView) listed(out *workloads.Service, found map[string]*workloads.Endpoint, dropped string) string {
	for _, e := range found {
		out.Endpoints = append(out.Endpoints, *e)
	}
	slices.SortFunc(out.Endpoints, func(a, b workloads.Endpoint) int { return cmp.Compare(a.Address, b.Address) })
	return dropped
}

// inUse is kube-proxy's rule: ready endpoints, or where a service has none, those
// that still serve while they end.
func inUse(e *discoveryv1.Endpoint, anyReady bool) bool {
	if anyReady {
		return isReady(e)
	}
	c := e.Conditions
	return c.Serving != nil && *c.Serving && c.Terminating != nil && *c.Terminating
}

// anyReady is asked once for all endpoints: who writes slices of a hundred thousand
// must not make each of them be compared with every other.
func (v *serviceView) anyReady() bool {
	return slices.ContainsFunc(v.slices, func(s *discoveryv1.EndpointSlice) bool {
		for i := range s.Endpoints {
			if isReady(&s.Endpoints[i]) {
				return true
			}
		}
		return false
	})
}

func isReady(e *discoveryv1.Endpoint) bool { return e.Conditions.Ready == nil || *e.Conditions.Ready }

// slicePorts maps the service's ports to the slice's, by name.
func slicePorts(slice *discoveryv1.EndpointSlice, byName map[string]uint16) map[uint16]uint16 {
	out := map[uint16]uint16{}
	for _, p := range slice.Ports {
		name := ""
		if p.Name != nil {
			name = *p.Name
		}
		number, known := byName[name]
		if !known || p.Port == nil || p.Protocol != nil && !isTCP(*p.Protocol) {
			continue
		}
		if to, ok := portNumber(*p.Port); ok {
			out[number] = to
		}
	}
	return out
}

// endpoint decides what stands at an address. dropped says why nothing does, where
// that is worth a word.
//
// A service with a selector has no endpoints but pods, and in the clear none but
// those it selects: otherwise whoever can write an EndpointSlice could draw its
// callers, where the mesh settings let them speak in the clear, to a place that
// proves nothing. A service without a selector that declares identities demands
// them of every endpoint.
func (v *serviceView) endpoint(s *corev1.Service, e *discoveryv1.Endpoint, address string, declares bool) (made *workloads.Endpoint, dropped string) {
	selector := len(s.Spec.Selector) > 0
	c, ok := v.standsAt(address, e.TargetRef)
	switch {
	case !ok && selector && v.between(e.TargetRef):
		return nil, ""
	case !ok && selector:
		return nil, fmt.Sprintf("%q is the address of no pod, and the service has a selector; it is left out", address)
	case !ok:
		return &workloads.Endpoint{Address: address, OutsideMesh: !declares}, ""
	case selector && c.OutsideMesh && !selects(s, c.Namespace, c.Labels):
		return nil, fmt.Sprintf("%q is a pod that the service does not select and that can prove nothing; it is left out", address)
	}
	return &workloads.Endpoint{Workload: c.PodUID, Address: address, OutsideMesh: c.OutsideMesh && (selector || !declares)}, ""
}

// between reports whether a slice names a pod that is gone, or has no address yet:
// slices and pods come separately, and for a moment one is ahead of the other.
func (v *serviceView) between(ref *corev1.ObjectReference) bool {
	if ref == nil || ref.Kind != "Pod" {
		return false
	}
	w := v.of(string(ref.UID))
	return w == nil || w.Address == ""
}

// standsAt finds the pod that has an address. The slice's word on that is taken
// only to choose among pods that do have it: pods on the host's network share one,
// and for a moment so do a pod that ends and the next to get its address.
func (v *serviceView) standsAt(address string, ref *corev1.ObjectReference) (*candidate, bool) {
	all := v.at(address)
	if ref != nil && ref.Kind == "Pod" {
		for _, c := range all {
			if c.PodUID == string(ref.UID) {
				return c, true
			}
		}
	}
	if len(all) == 1 && !all[0].hostNetwork {
		return all[0], true
	}
	return nil, false
}
