package kube

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"

	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
)

const (
	// maxIdentities bounds what one service declares, and maxIdentitiesText how long
	// it says so: every proxy of the mesh holds it. Of a service that declares more
	// nothing is taken: it accepts nobody by what it declares, rather than a part.
	maxIdentities     = 64
	maxIdentitiesText = 32 << 10
	// maxDeclaredPorts are those that services declare of one pod; others' first
	// bytes decide.
	maxDeclaredPorts = 2000
)

// declaredIdentities reads the annotation: SPIFFE IDs, or principals of the form
// policies use, separated by commas. declares is whether it is there at all, and
// problem what of it is left out.
func declaredIdentities(s *corev1.Service) (ids []string, declares bool, problem string) {
	text, declares := s.Annotations[annotationAccounts]
	if len(text) > maxIdentitiesText {
		return nil, true, fmt.Sprintf("more than %d bytes; nothing of it is taken", maxIdentitiesText)
	}
	for name := range strings.SplitSeq(text, ",") {
		name = strings.TrimSpace(name)
		if name == "" {
			continue
		}
		id, ok := parseDeclared(name)
		if !ok {
			problem = fmt.Sprintf("%q is no SPIFFE ID and is left out", clipTo(name, 100))
			continue
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	if ids = slices.Compact(ids); len(ids) > maxIdentities {
		return nil, true, fmt.Sprintf("%d identities, %d are allowed; none of them is taken", len(ids), maxIdentities)
	}
	return ids, declares, problem
}

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

// declaration is what services say of a port of their pods, by its name or number.
type declaration struct {
	name     string
	number   uint16
	protocol string
}

// protocols collects what is said of ports. Where two disagree, first bytes decide,
// whoever came first.
type protocols[K comparable] map[K]string

func (p protocols[K]) say(port K, protocol string) {
	if have, ok := p[port]; ok && have != protocol {
		protocol = ""
	}
	p[port] = protocol
}

// declarations are what a selection's services say of their pods' ports: by where
// they lead, not by EndpointSlices. Who only writes these says nothing about a
// receiver.
func (sel *selection) declarations() []declaration {
	if sel.declared != nil {
		return sel.declared
	}
	said := protocols[declaration]{}
	for s := range sel.services {
		ports := s.declaring.Spec.Ports
		for i := range ports[:min(len(ports), maxServicePorts)] {
			sp := &ports[i]
			to := declaration{name: sp.TargetPort.StrVal}
			if to.name == "" {
				var ok bool
				if to.number, ok = portNumber(cmp.Or(sp.TargetPort.IntVal, sp.Port)); !ok {
					continue
				}
			}
			if isTCP(sp.Protocol) {
				said.say(to, protocolOf(sp))
			}
		}
	}
	sel.declared = make([]declaration, 0, len(said))
	for d, protocol := range said {
		d.protocol = protocol
		sel.declared = append(sel.declared, d)
	}
	slices.SortFunc(sel.declared, func(a, b declaration) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.number, b.number))
	})
	sel.declared = slices.Clip(sel.declared[:min(len(sel.declared), maxDeclaredPorts)])
	return sel.declared
}

// portsOf is what the services that select a pod say of its ports.
func portsOf(p *corev1.Pod, selecting map[*selection]bool) []workloads.Port {
	ports, named := protocols[uint16]{}, map[string]int32(nil)
	for sel := range selecting {
		for _, d := range sel.declarations() {
			number := d.number
			if d.name != "" {
				if named == nil {
					named = namedPorts(p)
				}
				var ok bool
				if number, ok = portNumber(named[d.name]); !ok {
					continue
				}
			}
			ports.say(number, d.protocol)
		}
	}
	out := make([]workloads.Port, 0, min(len(ports), maxDeclaredPorts))
	for _, n := range slices.Sorted(maps.Keys(ports)) {
		if len(out) == maxDeclaredPorts {
			break
		}
		out = append(out, workloads.Port{Number: n, Protocol: ports[n]})
	}
	return out
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

func portNumber(n int32) (uint16, bool) {
	if n < 1 || n > 65535 {
		return 0, false
	}
	return uint16(n), true
}
