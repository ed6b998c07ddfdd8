package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"

	"castellan.dev/internal/workloads"
)

// place is an endpoint as slices list it: what stands there depends on the pods.
type place struct {
	address string
	// pod is the UID that the slice names, if named.
	pod   string
	named bool
	ports map[uint16]uint16 // shared with others of the slice
}

// eachListed visits the endpoints of slices that are in use, with the ports of the
// service that they serve, until visit returns false.
func eachListed(all []*discoveryv1.EndpointSlice, ports []workloads.ServicePort, visit func(*discoveryv1.Endpoint, map[uint16]uint16) bool) {
	byName := map[string]uint16{}
	for _, p := range ports {
		byName[p.Name] = p.Number
	}
	ready := anyReady(all)
	for _, slice := range all {
		ports := slicePorts(slice, byName)
		if slice.AddressType == discoveryv1.AddressTypeFQDN || len(ports) == 0 {
			continue
		}
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if inUse(e, ready) && len(e.Addresses) > 0 && !visit(e, ports) {
				return
			}
		}
	}
}

// countPlaces is endpoints times the ports they serve, maxPlaces where they are more.
func countPlaces(all []*discoveryv1.EndpointSlice, ports []workloads.ServicePort) (n int) {
	eachListed(all, ports, func(_ *discoveryv1.Endpoint, ports map[uint16]uint16) bool {
		n += len(ports)
		return n < maxPlaces
	})
	return min(n, maxPlaces)
}

// listPlaces returns what is listed, by address, and what there is to say of what
// is left out.
func listPlaces(all []*discoveryv1.EndpointSlice, ports []workloads.ServicePort) (places []place, dropped string) {
	type name struct{ address, pod string }
	found, owned, n := map[name]int{}, map[int]bool{}, 0
	eachListed(all, ports, func(e *discoveryv1.Endpoint, ports map[uint16]uint16) bool {
		// A slice's addresses of one endpoint are interchangeable; the first stands
		// for all, as with kube-proxy.
		if n += len(ports); n > maxPlaces {
			dropped = fmt.Sprintf("%q is left out, and what follows: %d times the ports they serve are allowed", clipTo(e.Addresses[0], 100), maxPlaces)
			return false
		}
		address, err := netip.ParseAddr(e.Addresses[0])
		if err != nil || address.Zone() != "" {
			dropped = fmt.Sprintf("%q has no IP address and is left out", clipTo(e.Addresses[0], 100))
			return true
		}
		p := place{address: e.Addresses[0], ports: ports}
		if text := address.Unmap().String(); text != p.address {
			p.address = text // else the slice's own string is kept
		}
		if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
			p.pod, p.named = string(e.TargetRef.UID), true
		}
		switch at, again := found[name{p.address, p.pod}]; {
		case again: // ports of one endpoint may be spread over slices
			places[at].ports = merged(places[at].ports, ports, owned[at])
			owned[at] = true
		case len(places) == maxEndpoints:
			dropped = fmt.Sprintf("%q is one too many: %d are allowed", p.address, maxEndpoints)
		default:
			found[name{p.address, p.pod}] = len(places)
			places = append(places, p)
		}
		return true
	})
	slices.SortStableFunc(places, func(a, b place) int { return cmp.Compare(a.address, b.address) })
	return slices.Clip(places), dropped
}

// merged adds ports, to a copy unless the map is the caller's own.
func merged(have, more map[uint16]uint16, own bool) map[uint16]uint16 {
	if !own {
		have = maps.Clone(have)
	}
	maps.Copy(have, more)
	return have
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
func anyReady(all []*discoveryv1.EndpointSlice) bool {
	return slices.ContainsFunc(all, func(s *discoveryv1.EndpointSlice) bool {
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

// endpoints are what stands at a service's places, and what there is to say of what
// is left out.
//
// Who may answer for a service is decided by whoever owns it, not by whoever can
// write addresses into an EndpointSlice: the accounts of the pods that its own
// selector selects in its own namespace, and the identities it declares. Each
// endpoint is given the identity of the pod that has its address, whatever the
// slice says; where that is none of the service's, callers refuse it.
func (u *update) endpoints(s *service) (out []workloads.Endpoint, dropped string) {
	var at, why string
	var own bool
	for i := range s.listed {
		p := &s.listed[i]
		made, ok, reason := u.endpoint(s, p)
		switch last := len(out) - 1; {
		case !ok:
			if reason != "" {
				at, why = p.address, reason
			}
		case last >= 0 && out[last].Address == p.address:
			out[last].Ports, own = merged(out[last].Ports, p.ports, own), true
		default:
			if out == nil {
				out = make([]workloads.Endpoint, 0, len(s.listed))
			}
			out, own = append(out, made), false
		}
	}
	if why != "" {
		dropped = fmt.Sprintf("%q %s", at, why)
	}
	return out, cmp.Or(dropped, s.dropped)
}

// endpoint decides what stands at a place. reason says why nothing does, where that
// is worth a word.
//
// A service with a selector has no endpoints but pods, and in the clear none but
// those it selects: otherwise whoever can write an EndpointSlice could draw its
// callers, where the mesh settings let them speak in the clear, to a place that
// proves nothing. A service without a selector that declares identities demands
// them of every endpoint.
func (u *update) endpoint(s *service, p *place) (made workloads.Endpoint, ok bool, reason string) {
	selector := len(s.object.Spec.Selector) > 0
	c := u.standsAt(p)
	made = workloads.Endpoint{Address: p.address, Ports: p.ports}
	switch {
	case c == nil && selector && u.between(p):
		return made, false, ""
	case c == nil && selector:
		return made, false, "is the address of no pod, and the service has a selector; it is left out"
	case c == nil:
		made.OutsideMesh = !s.outline.declares
		return made, true, ""
	case selector && c.OutsideMesh && !(c.Namespace == s.object.Namespace && hasLabels(c.Labels, s.object.Spec.Selector)):
		return made, false, "is a pod that the service does not select and that can prove nothing; it is left out"
	}
	made.Workload, made.OutsideMesh = c.PodUID, c.OutsideMesh && (selector || !s.outline.declares)
	return made, true, ""
}

// between reports whether a slice names a pod that is gone, or has no address yet:
// slices and pods come separately, and for a moment one is ahead of the other.
func (u *update) between(p *place) bool {
	c := u.pods.byUID[p.pod]
	return p.named && (c == nil || c.Address == "")
}

// standsAt finds the pod that has an address. The slice's word on that is taken
// only to choose among pods that do have it: pods on the host's network share one,
// and for a moment so do a pod that ends and the next to get its address.
func (u *update) standsAt(p *place) *candidate {
	all := u.pods.byAddress[p.address]
	if p.named {
		for _, c := range all {
			if c.PodUID == p.pod {
				return c
			}
		}
	}
	if len(all) == 1 && !all[0].hostNetwork {
		return all[0]
	}
	return nil
}
