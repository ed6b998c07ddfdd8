package discovery

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/internal/workloads"
	"castellan.dev/internal/xds"
)

// workload is what one workload is told. It is immutable.
type workload struct {
	*workloads.Workload
	denyReason string
	docs       []*inForce
	resource   xds.Resource
	// ports are what is declared, by number, and portKey names that.
	ports   []workloads.Port
	portKey string
}

// state is everything that follows from one reading of policy and inventory. It
// is immutable.
type state struct {
	*admission
	// workloads are those of the mesh; byUID has the others too, which are told
	// nothing but may report what they were served.
	workloads []*workload
	byUID     map[string]*workload
	services  xds.Snapshot
	ports     portSets
}

// builder makes states. It remembers the last one's, so that a change costs what
// it changes.
type builder struct {
	mesh        policy.Mesh
	meshJSON    []byte
	trustDomain spiffeid.TrustDomain
	// Of the last build.
	last     map[string]*workload
	docs     map[Ref]*inForce
	denials  []denial
	services map[string]serviceMade
	// bodies are of resources that were made, by version: workloads that differ in
	// nothing but their names share one.
	bodies map[string]xds.Resource
	ports  portSets // of this build
}

// maxPolicyBytes bounds the policies of one workload: more would not fit into what
// agents and proxies take in one message, and end the streams of a whole node.
const maxPolicyBytes = 8 << 20

// manyChanged is how many changed documents make it cheaper to look at every
// workload anew than to ask each document about it.
const manyChanged = 32

func newBuilder(mesh policy.Mesh, td spiffeid.TrustDomain) (*builder, error) {
	b := &builder{mesh: mesh, trustDomain: td, bodies: map[string]xds.Resource{}}
	var err error
	if b.meshJSON, err = json.Marshal(mesh); err != nil {
		return nil, fmt.Errorf("discovery: mesh settings: %w", err)
	}
	return b, nil
}

func (b *builder) build(a *admission, file *workloads.File) (*state, error) {
	s := &state{admission: a, byUID: make(map[string]*workload, len(file.Workloads)), workloads: make([]*workload, 0, len(file.Workloads))}
	changed, all := b.adopt(a)
	ix := newIndex(a.docs, b.mesh)
	var ports map[string]map[uint16]string
	if !file.Resolved {
		ports = file.DeclaredPorts()
	}
	b.ports = newPortSets()
	block := make([]workload, len(file.Workloads)) // one allocation instead of thousands
	for i := range file.Workloads {
		w := &block[i]
		w.Workload = &file.Workloads[i]
		s.byUID[w.PodUID] = w
		if w.OutsideMesh {
			continue
		}
		if last := b.last[w.PodUID]; !all && file.Resolved && last.reusable(w.Workload) && !b.concerns(changed, w.Workload) {
			w.denyReason, w.docs, w.resource, w.ports, w.portKey = last.denyReason, last.docs, last.resource, last.ports, last.portKey
		} else {
			w.declare(ports)
			if err := b.decide(w, a, ix); err != nil {
				b.last = nil // nothing of it may be taken for the last
				return nil, err
			}
		}
		s.workloads = append(s.workloads, w)
		set := b.ports.id(w.portKey, w.ports)
		for _, d := range w.docs {
			d.selectedBy(set)
		}
	}
	b.last = s.byUID
	b.trim(s)
	a.noteSelected()
	s.ports = b.ports
	var err error
	s.services, err = b.serviceIdentities(file, s.byUID)
	return s, err
}

// adopt makes documents that have not changed those of the last build, so that
// what hangs on them need not be looked at again, and returns those that have, in
// both their versions. all: nothing can be said.
func (b *builder) adopt(a *admission) (changed []*inForce, all bool) {
	all = b.last == nil || !reflect.DeepEqual(b.denials, a.denials)
	docs := make(map[Ref]*inForce, len(a.docs))
	for i, d := range a.docs {
		old := b.docs[d.ref]
		if old != nil && old.hash == d.hash && old.last == d.last {
			a.docs[i] = old
			old.portSets = nil
		} else {
			changed = append(changed, d)
		}
		docs[d.ref] = a.docs[i]
	}
	for ref, old := range b.docs {
		if docs[ref] != old {
			changed = append(changed, old)
		}
	}
	b.docs, b.denials = docs, a.denials
	return changed, all || len(changed) > manyChanged
}

// reusable reports whether w is as it was.
func (last *workload) reusable(w *workloads.Workload) bool {
	return last != nil && w.Revision != 0 && last.Revision == w.Revision && last.resource.Body != nil
}

// concerns reports whether any of the documents selects a workload.
func (b *builder) concerns(docs []*inForce, w *workloads.Workload) bool {
	return slices.ContainsFunc(docs, func(d *inForce) bool { return authz.Selects(d.doc, w.Namespace, w.Labels, b.mesh) })
}

// declare notes what is declared of the workload's ports: by itself, or as said by
// services too.
func (w *workload) declare(services map[string]map[uint16]string) {
	if services == nil {
		w.ports = w.Ports // sorted by whoever resolved them
	} else {
		declared := services[w.PodUID]
		for _, n := range slices.Sorted(maps.Keys(declared)) {
			w.ports = append(w.ports, workloads.Port{Number: n, Protocol: declared[n]})
		}
	}
	w.portKey = portKey(w.ports)
}

// decide finds the documents that select the workload, and makes its resource.
func (b *builder) decide(w *workload, a *admission, ix *index) error {
	w.docs = ix.selecting(w.Namespace, w.Labels)
	w.denyReason = a.deny(w.Workload, b.mesh)
	if n := sizeOf(w.docs); n > maxPolicyBytes {
		// Fails closed. The documents stay the workload's: their status tells of it.
		w.denyReason = fmt.Sprintf("the policies that select the workload have %d bytes, %d are allowed", n, maxPolicyBytes)
	}
	msg := &castellanv1.WorkloadPolicy{
		Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, TrustDomain: b.trustDomain.Name(), Labels: w.Labels,
		Mesh: b.meshJSON, DenyAll: w.denyReason != "", DenyReason: w.denyReason, Ports: portMessages(w.ports),
	}
	// The version is a hash of hashes, so that the documents need not be read again
	// where nothing has changed.
	head, err := xds.NewResource(w.PodUID, msg)
	if err != nil {
		return err
	}
	parts := make([][]byte, 0, len(w.docs)+1)
	parts = append(parts, []byte(head.Version))
	for _, d := range w.docs {
		parts = append(parts, []byte(d.hash))
	}
	version := xds.ContentVersion(parts...)
	made, ok := b.bodies[version]
	if !ok {
		if sizeOf(w.docs) <= maxPolicyBytes {
			for _, d := range w.docs {
				msg.Documents = append(msg.Documents, d.JSON)
			}
		}
		if made, err = xds.NewResource(w.PodUID, msg); err != nil {
			return err
		}
		made.Version = version
		b.bodies[version] = made
	}
	w.resource = made
	w.resource.Name = w.PodUID
	return nil
}

func sizeOf(docs []*inForce) (n int) {
	for _, d := range docs {
		n += len(d.JSON)
	}
	return n
}

// trim forgets bodies that no workload has any more, once they are many.
func (b *builder) trim(s *state) {
	if len(b.bodies) <= 2*len(s.workloads)+manyChanged {
		return
	}
	clear(b.bodies)
	for _, w := range s.workloads {
		b.bodies[w.resource.Version] = w.resource
	}
}

// deny returns why the workload denies everything, "" if it does not.
func (a *admission) deny(w *workloads.Workload, mesh policy.Mesh) string {
	// By namespace: what one of them has had refused costs the workloads of others
	// nothing. The first that covers the workload is named.
	first := len(a.denials)
	for _, ns := range [...]string{"", rootNamespace(mesh), w.Namespace} {
		for _, i := range a.denialsIn[ns] {
			if i < first && a.denials[i].scope.covers(w.Namespace, w.Labels, mesh) {
				first = i
				break
			}
		}
	}
	if first == len(a.denials) {
		return ""
	}
	return a.denials[first].reason
}

func portMessages(ports []workloads.Port) []*castellanv1.WorkloadPort {
	out := make([]*castellanv1.WorkloadPort, len(ports))
	for i, p := range ports {
		out[i] = &castellanv1.WorkloadPort{Number: uint32(p.Number), Protocol: p.Protocol}
	}
	return out
}
