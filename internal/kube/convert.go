package kube

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

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
func workloadOf(p *corev1.Pod, selecting map[*selection]bool) (*workloads.Workload, error) {
	w := &workloads.Workload{
		Namespace: p.Namespace, ServiceAccount: p.Spec.ServiceAccountName,
		PodUID: string(p.UID), PodName: p.Name, Node: p.Spec.NodeName, Labels: p.Labels,
		OutsideMesh: p.Labels[labelMesh] != labelMeshValue,
		Ports:       portsOf(p, selecting),
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

// candidate is a live workload with the pod it was made of.
type candidate struct {
	*workloads.Workload
	hostNetwork bool
}

// answers is the account by which a workload of the mesh proves who it is; false for
// one that can prove nothing, or for none.
func (c *candidate) answers() (identity.Account, bool) {
	if c == nil || c.OutsideMesh {
		return identity.Account{}, false
	}
	return c.Account(), true
}

// countedPorts is how many ports make a proxy hold something of a service.
func countedPorts(s *corev1.Service) (n int) {
	if s == nil || s.Spec.Type == corev1.ServiceTypeExternalName || len(s.Spec.Ports) > maxServicePorts {
		return 0
	}
	for i := range s.Spec.Ports {
		if isTCP(s.Spec.Ports[i].Protocol) {
			n++
		}
	}
	return n
}

// outline is what a service says itself, to which its pods and slices are added.
type outline struct {
	*workloads.Service      // nil for one that is none of the mesh's business
	declares           bool // identities, whichever
	problem            error
}

// outlineOf makes the outline of a service.
func outlineOf(s *corev1.Service, domain string) outline {
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return outline{}
	}
	if len(s.Spec.Ports) > maxServicePorts {
		return outline{problem: fmt.Errorf("spec.ports: more than the %d that are allowed", maxServicePorts)}
	}
	out := &workloads.Service{Namespace: s.Namespace, Name: s.Name}
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		if number, ok := portNumber(p.Port); ok && isTCP(p.Protocol) {
			out.Ports = append(out.Ports, workloads.ServicePort{Name: p.Name, Number: number, Protocol: protocolOf(p)})
		}
	}
	if len(out.Ports) == 0 {
		return outline{}
	}
	host := s.Name + "." + s.Namespace
	out.Hosts = []string{host, host + ".svc", host + ".svc." + domain}
	for _, a := range s.Spec.ClusterIPs {
		if a != corev1.ClusterIPNone && a != "" {
			out.Addresses = append(out.Addresses, a)
		}
	}
	sans, declares, bad := declaredIdentities(s)
	out.SubjectAltNames = sans
	if err := out.Check(); err != nil {
		return outline{problem: err}
	}
	o := outline{Service: out, declares: declares}
	if bad != "" {
		o.problem = fmt.Errorf("annotation %s: %s", annotationAccounts, bad)
	}
	return o
}
