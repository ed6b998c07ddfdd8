package kube

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
)

const (
	// labelMesh tells that a pod has a proxy of the mesh; the injector sets it (the
	// name is Istio's).
	labelMesh      = "security.istio.io/tlsMode"
	labelMeshValue = "istio"

	// maxEndpoints bounds one service, and with it what it makes every proxy hold.
	maxEndpoints = 5000
	// maxPlaces bounds endpoints times the ports they serve, which a slice multiplies.
	maxPlaces = 20_000
	// maxServicePorts are those that count of one service.
	maxServicePorts = 1000
)

// live reports whether a pod exists in the sense of trust rule 2: it is assigned
// to a node and has not ended. One that is being deleted lives until it is gone.
func live(p *corev1.Pod) bool {
	return p.Spec.NodeName != "" && p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

// workloadOf makes a workload of a live pod and of the services that select it.
func workloadOf(p *corev1.Pod, selecting []*corev1.Service) (*workloads.Workload, error) {
	w := &workloads.Workload{
		Namespace: p.Namespace, ServiceAccount: p.Spec.ServiceAccountName,
		PodUID: string(p.UID), PodName: p.Name, Node: p.Spec.NodeName, Labels: p.Labels,
		OutsideMesh: p.Labels[labelMesh] != labelMeshValue,
		Ports:       declared(p, selecting),
	}
	if ips := addresses(p); len(ips) > 0 {
		for i := range ips {
			ips[i] = canonical(ips[i])
		}
		w.Address, w.Addresses = ips[0], ips[1:]
	}
	if err := w.Check(); err != nil {
		return nil, err
	}
	return w, nil
}

// canonical is the one way to write an address, so that two can be compared; what
// is none stays as it is, and equals nothing.
func canonical(address string) string {
	if a, err := netip.ParseAddr(address); err == nil {
		return a.Unmap().String()
	}
	return address
}

// declared is what services say about the ports of a pod that they select
// themselves, by where they lead: who only writes EndpointSlices says nothing about
// a receiver. Where services disagree, first bytes decide.
func declared(p *corev1.Pod, selecting []*corev1.Service) []workloads.Port {
	ports, named := map[uint16]string{}, namedPorts(p)
	for _, s := range selecting {
		for i := range s.Spec.Ports[:min(len(s.Spec.Ports), maxServicePorts)] {
			sp := &s.Spec.Ports[i]
			number, ok := target(named, sp)
			if !ok || !isTCP(sp.Protocol) {
				continue
			}
			protocol := protocolOf(sp)
			if have, ok := ports[number]; ok && have != protocol {
				protocol = ""
			}
			ports[number] = protocol
		}
	}
	out := make([]workloads.Port, 0, len(ports))
	for _, n := range slices.Sorted(maps.Keys(ports)) {
		out = append(out, workloads.Port{Number: n, Protocol: ports[n]})
	}
	return slices.Clip(out)
}

// namedPorts are a pod's TCP ports by name, the first of each: services' ports are
// looked up in it, as either may have thousands.
func namedPorts(p *corev1.Pod) map[string]int32 {
	named := map[string]int32{}
	for i := range p.Spec.Containers {
		for _, cp := range p.Spec.Containers[i].Ports {
			if _, ok := named[cp.Name]; !ok && cp.Name != "" && isTCP(cp.Protocol) {
				named[cp.Name] = cp.ContainerPort
			}
		}
	}
	return named
}

// target is the pod's port that a service's leads to.
func target(named map[string]int32, sp *corev1.ServicePort) (uint16, bool) {
	if name := sp.TargetPort.StrVal; name != "" {
		return portNumber(named[name])
	}
	if sp.TargetPort.IntVal != 0 {
		return portNumber(sp.TargetPort.IntVal)
	}
	return portNumber(sp.Port)
}

func portNumber(n int32) (uint16, bool) {
	if n < 1 || n > 65535 {
		return 0, false
	}
	return uint16(n), true
}

// selects reports whether a service's own selector selects a pod. A service
// without one selects nobody.
func selects(s *corev1.Service, namespace string, labels map[string]string) bool {
	if len(s.Spec.Selector) == 0 || s.Namespace != namespace || s.Spec.Type == corev1.ServiceTypeExternalName {
		return false
	}
	for k, v := range s.Spec.Selector {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// candidate is a live workload with the pod it was made of.
type candidate struct {
	*workloads.Workload
	hostNetwork bool
}

// serviceView is what the conversion of one service asks.
type serviceView struct {
	domain string
	slices []*discoveryv1.EndpointSlice
	// at returns the live workloads that have an address.
	at func(address string) []*candidate
	// of returns the live workload with a UID, nil if there is none.
	of func(uid string) *workloads.Workload
	// selected are the live workloads that the service's own selector selects.
	selected []*workloads.Workload
}

// serviceOf makes a service; nil for one that is none of the mesh's business.
//
// Who may answer for a service is decided by whoever owns it, not by whoever can
// write addresses into an EndpointSlice: the accounts of the pods that its own
// selector selects in its own namespace, and the identities it declares. Each
// endpoint is given the identity of the pod that has its address, whatever the
// slice says; where that is none of the service's, callers refuse it.
func serviceOf(s *corev1.Service, view *serviceView) (*workloads.Service, error) {
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return nil, nil
	}
	if len(s.Spec.Ports) > maxServicePorts {
		return nil, fmt.Errorf("spec.ports: %d, %d are allowed", len(s.Spec.Ports), maxServicePorts)
	}
	out := &workloads.Service{Namespace: s.Namespace, Name: s.Name, Accounts: []identity.Account{}}
	byName := map[string]uint16{}
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		if number, ok := portNumber(p.Port); ok && isTCP(p.Protocol) {
			out.Ports = append(out.Ports, workloads.ServicePort{Name: p.Name, Number: number, Protocol: protocolOf(p)})
			byName[p.Name] = number
		}
	}
	if len(out.Ports) == 0 {
		return nil, nil
	}
	host := s.Name + "." + s.Namespace
	out.Hosts = []string{host, host + ".svc", host + ".svc." + view.domain}
	for _, a := range s.Spec.ClusterIPs {
		if a != corev1.ClusterIPNone && a != "" {
			out.Addresses = append(out.Addresses, a)
		}
	}
	sans, declares, bad := declaredIdentities(s)
	out.SubjectAltNames = sans
	for _, w := range view.selected {
		if !w.OutsideMesh {
			out.Accounts = append(out.Accounts, w.Account())
		}
	}
	slices.SortFunc(out.Accounts, func(a, b identity.Account) int { return strings.Compare(a.String(), b.String()) })
	out.Accounts = slices.Compact(out.Accounts)
	if err := out.Check(); err != nil {
		return nil, err
	}
	dropped := view.endpoints(s, out, byName, declares)
	switch {
	case bad != "":
		return out, fmt.Errorf("annotation %s: %q is no SPIFFE ID and is left out", annotationAccounts, bad)
	case dropped != "":
		return out, fmt.Errorf("endpoint %s", dropped)
	}
	return out, nil
}

// declaredIdentities reads the annotation: SPIFFE IDs, or principals of the form
// policies use, separated by commas. declares is whether it is there at all.
func declaredIdentities(s *corev1.Service) (ids []string, declares bool, bad string) {
	text, declares := s.Annotations[annotationAccounts]
	for name := range strings.SplitSeq(text, ",") {
		name = strings.TrimSpace(name)
		if name == "" {
			continue
		}
		id, ok := parseDeclared(name)
		if !ok {
			bad = name
			continue
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return slices.Compact(ids), declares, bad
}
