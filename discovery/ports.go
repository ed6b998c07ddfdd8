package discovery

import (
	"fmt"
	"slices"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/internal/workloads"
)

// maxPortSets bounds how many different declarations of ports a document is
// looked at with; beyond, it is looked at as if nobody had declared any.
const maxPortSets = 8

// portSets tells apart what workloads declare of their ports.
type portSets struct {
	sets []map[uint16]string
	ids  map[string]int
}

func newPortSets() portSets {
	return portSets{ids: map[string]int{"": 0}, sets: []map[uint16]string{nil}}
}

// portKey names what is declared; "" is nothing, or not everything.
func portKey(ports []workloads.Port) string {
	var key strings.Builder
	for _, p := range ports {
		if p.Protocol == "" {
			return "" // services disagree, or say nothing
		}
		fmt.Fprintf(&key, "%d=%s,", p.Number, p.Protocol)
	}
	return key.String()
}

// id of what a workload declares.
func (p *portSets) id(key string, ports []workloads.Port) int {
	id, ok := p.ids[key]
	if !ok {
		set := make(map[uint16]string, len(ports))
		for _, port := range ports {
			set[port.Number] = port.Protocol
		}
		id = len(p.sets)
		p.ids[key], p.sets = id, append(p.sets, set)
	}
	return id
}

// selectedBy notes that a workload with such ports is selected.
func (d *inForce) selectedBy(id int) {
	if len(d.portSets) <= maxPortSets && !slices.Contains(d.portSets, id) {
		d.portSets = append(d.portSets, id)
	}
}

// warnings of a document that was admitted, given the workloads that it selects:
// where these have all declared their ports, it is known whether an HTTP field
// meets a TCP port, and where one has not, it may.
func (p *portSets) warnings(d *inForce, mesh policy.Mesh) []authz.Finding {
	sets := make([]map[uint16]string, len(d.portSets))
	for i, id := range d.portSets {
		sets[i] = p.sets[id]
	}
	return authz.ValidateForAll(d.doc, mesh, sets)
}

// concretise makes the warnings about accepted AuthorizationPolicies those of the
// workloads that they select. Errors do not depend on ports.
func (b *builder) concretise(a *admission, ports *portSets) {
	docs := make(map[Ref]*inForce, len(a.docs))
	for _, d := range a.docs {
		docs[d.ref] = d
	}
	for i := range a.statuses {
		st := &a.statuses[i]
		d := docs[st.Ref]
		if !st.accepted || d == nil || d.doc.Authorization == nil {
			continue
		}
		slices.Sort(d.portSets)
		var key strings.Builder
		key.WriteString(d.hash)
		for _, id := range d.portSets {
			fmt.Fprintf(&key, ",%v", ports.sets[id])
		}
		found, ok := b.warned[key.String()]
		if !ok {
			found = ports.warnings(d, b.mesh)
		}
		b.warning[key.String()] = found
		st.Findings = found
	}
	b.warned, b.warning = b.warning, map[string][]authz.Finding{}
}
