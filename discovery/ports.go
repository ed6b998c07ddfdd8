package discovery

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/internal/workloads"
)

// portSets tells apart what workloads declare of their ports.
type portSets struct {
	sets []map[uint16]string
	// names tell them apart across builds.
	names [][sha256.Size]byte
	ids   map[string]int
}

func newPortSets() portSets {
	return portSets{ids: map[string]int{"": 0}, sets: []map[uint16]string{nil}, names: make([][sha256.Size]byte, 1)}
}

// portKey names what is declared; "" is nothing, not everything, or too much.
func portKey(ports []workloads.Port) string {
	var key strings.Builder
	if len(ports) > authz.MaxPorts {
		return ""
	}
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
		p.ids[key], p.sets, p.names = id, append(p.sets, set), append(p.names, sha256.Sum256([]byte(key)))
	}
	return id
}

// selectedBy notes that a workload with such ports is selected.
func (d *inForce) selectedBy(id int) {
	if len(d.portSets) <= authz.MaxPortSets && !slices.Contains(d.portSets, id) {
		d.portSets = append(d.portSets, id)
	}
}

// noteSelected keeps with the status of each accepted AuthorizationPolicy what the
// workloads that it selects declare.
func (a *admission) noteSelected() {
	docs := make(map[Ref]*inForce, len(a.docs))
	for _, d := range a.docs {
		docs[d.ref] = d
	}
	for i := range a.statuses {
		st := &a.statuses[i]
		if d := docs[st.Ref]; st.accepted && d != nil && d.doc.Authorization != nil {
			st.hash, st.portSets = d.hash, slices.Sorted(slices.Values(d.portSets))
		}
	}
}

// warner makes the warnings about accepted AuthorizationPolicies those of the
// workloads that they select: where these have all declared their ports, it is
// known whether an HTTP field meets a TCP port, and where one has not, it may.
// Errors do not depend on ports.
//
// It works when somebody asks, and not where policy is published: how much there
// is to look at is the choice of whoever writes policies and services, and
// everybody's policy would wait for it.
type warner struct {
	mesh policy.Mesh

	mu sync.Mutex
	// known is what was told last, by content and ports.
	known map[string][]authz.Finding
}

// findings says of each status of st what there is to say.
func (w *warner) findings(st *state) [][]authz.Finding {
	w.mu.Lock()
	defer w.mu.Unlock()
	known := make(map[string][]authz.Finding, len(w.known))
	out := make([][]authz.Finding, len(st.statuses))
	for i := range st.statuses {
		p := &st.statuses[i]
		out[i] = p.Findings
		// As it was admitted: with nothing known of ports.
		if n := len(p.portSets); n == 0 || n > authz.MaxPortSets || p.portSets[0] == 0 {
			continue
		}
		key := st.ports.key(p)
		found, ok := w.known[key]
		if !ok {
			found = authz.ValidateForAll(p.Document, w.mesh, st.ports.of(p.portSets))
		}
		known[key], out[i] = found, found
	}
	w.known = known
	return out
}

func (p *portSets) of(ids []int) []map[uint16]string {
	sets := make([]map[uint16]string, len(ids))
	for i, id := range ids {
		sets[i] = p.sets[id]
	}
	return sets
}

// key names a document's content and the ports it is looked at with.
func (p *portSets) key(st *docStatus) string {
	key := []byte(st.Ref.String() + " " + st.hash)
	for _, id := range st.portSets {
		key = append(key, p.names[id][:]...)
	}
	return string(key)
}
