package discovery

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
	"castellan.dev/internal/xds"
)

// workload is what one workload is told. It is immutable.
type workload struct {
	*workloads.Workload
	denyReason string
	docs       []*inForce
	resource   xds.Resource
}

// state is everything that follows from one reading of policy and inventory. It
// is immutable.
type state struct {
	*admission
	workloads []*workload
	byUID     map[string]*workload
	services  xds.Snapshot
}

// builder makes states. It remembers the last one's resources, so that a change
// costs what it changes.
type builder struct {
	mesh        policy.Mesh
	meshJSON    []byte
	trustDomain spiffeid.TrustDomain
	last        map[string]*workload
	// warned is what there is to warn of documents, by content and ports of the last
	// build, and warning of this one.
	warned, warning map[string][]authz.Finding
	ports           portSets // of this build
}

func newBuilder(mesh policy.Mesh, td spiffeid.TrustDomain) (*builder, error) {
	b := &builder{mesh: mesh, trustDomain: td, warning: map[string][]authz.Finding{}}
	var err error
	if b.meshJSON, err = json.Marshal(mesh); err != nil {
		return nil, fmt.Errorf("discovery: mesh settings: %w", err)
	}
	return b, nil
}

func (b *builder) build(a *admission, file *workloads.File) (*state, error) {
	s := &state{admission: a, byUID: make(map[string]*workload, len(file.Workloads))}
	ix := newIndex(a.docs, b.mesh)
	ports := file.DeclaredPorts()
	b.ports = portSets{}
	for i := range file.Workloads {
		w, err := b.workload(&file.Workloads[i], a, ix, ports)
		if err != nil {
			return nil, err
		}
		s.workloads = append(s.workloads, w)
		s.byUID[w.PodUID] = w
	}
	b.last = s.byUID
	b.concretise(a, &b.ports)
	var err error
	s.services, err = b.serviceIdentities(file)
	return s, err
}

func (b *builder) workload(w *workloads.Workload, a *admission, ix *index, ports map[string]map[uint16]string) (*workload, error) {
	docs := ix.selecting(w.Namespace, w.Labels)
	declared := ports[w.PodUID]
	portSet := b.ports.id(declared)
	for _, d := range docs {
		d.selectedBy(portSet)
	}
	out := &workload{Workload: w, docs: docs, denyReason: a.deny(w, b.mesh)}
	msg := &castellanv1.WorkloadPolicy{
		Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, TrustDomain: b.trustDomain.Name(), Labels: w.Labels,
		Mesh: b.meshJSON, DenyAll: out.denyReason != "", DenyReason: out.denyReason, Ports: portMessages(declared),
	}
	// The version is a hash of hashes, so that the documents need not be read again
	// where nothing has changed.
	head, err := xds.NewResource(w.PodUID, msg)
	if err != nil {
		return nil, err
	}
	parts := make([][]byte, 0, len(docs)+1)
	parts = append(parts, []byte(head.Version))
	for _, d := range docs {
		parts = append(parts, []byte(d.hash))
	}
	version := xds.ContentVersion(parts...)
	if last := b.last[w.PodUID]; last != nil && last.resource.Version == version {
		out.resource = last.resource
		return out, nil
	}
	for _, d := range docs {
		msg.Documents = append(msg.Documents, d.JSON)
	}
	if out.resource, err = xds.NewResource(w.PodUID, msg); err != nil {
		return nil, err
	}
	out.resource.Version = version
	return out, nil
}

// deny returns why the workload denies everything, "" if it does not.
func (a *admission) deny(w *workloads.Workload, mesh policy.Mesh) string {
	for _, d := range a.denials {
		if d.scope.covers(w.Namespace, w.Labels, mesh) {
			return d.reason
		}
	}
	return ""
}

// index finds the documents that select a workload without asking each of them:
// by namespace, and there by one of the labels a document wants.
type index struct {
	mesh   policy.Mesh
	docs   []*inForce
	spaces map[string]*space
}

// space holds one namespace's documents, by their place in index.docs.
type space struct {
	all     []int
	byLabel map[[2]string][]int
}

func newIndex(docs []*inForce, mesh policy.Mesh) *index {
	ix := &index{mesh: mesh, docs: docs, spaces: map[string]*space{}}
	for i, d := range docs {
		s := ix.spaces[d.ref.Namespace]
		if s == nil {
			s = &space{byLabel: map[[2]string][]int{}}
			ix.spaces[d.ref.Namespace] = s
		}
		if label, ok := oneLabel(d.doc); ok {
			s.byLabel[label] = append(s.byLabel[label], i)
		} else {
			s.all = append(s.all, i)
		}
	}
	return ix
}

// oneLabel returns a label without which the document selects nobody.
func oneLabel(doc policy.Document) (label [2]string, ok bool) {
	var selector *policy.Selector
	switch {
	case doc.Authorization != nil:
		selector = doc.Authorization.Selector
	case doc.RequestAuthentication != nil:
		selector = doc.RequestAuthentication.Selector
	case doc.PeerAuthentication != nil:
		selector = doc.PeerAuthentication.Selector
	}
	if selector == nil {
		return label, false
	}
	for k, v := range selector.MatchLabels {
		// The greatest key: which one is of no matter, but it is always the same.
		if !ok || k > label[0] {
			label, ok = [2]string{k, v}, true
		}
	}
	return label, ok
}

// selecting returns the documents that select such a workload, in their order.
func (ix *index) selecting(namespace string, labels map[string]string) []*inForce {
	namespaces := []string{namespace}
	if root := rootNamespace(ix.mesh); root != namespace {
		namespaces = append(namespaces, root)
	}
	var found []int
	for _, ns := range namespaces {
		s := ix.spaces[ns]
		if s == nil {
			continue
		}
		found = append(found, s.all...)
		for k, v := range labels {
			found = append(found, s.byLabel[[2]string{k, v}]...)
		}
	}
	slices.Sort(found)
	out := make([]*inForce, 0, len(found))
	for _, i := range found {
		// authz has the last word on what selects.
		if d := ix.docs[i]; authz.Selects(d.doc, namespace, labels, ix.mesh) {
			out = append(out, d)
		}
	}
	return out
}

func portMessages(ports map[uint16]string) []*castellanv1.WorkloadPort {
	numbers := slices.Sorted(maps.Keys(ports))
	out := make([]*castellanv1.WorkloadPort, len(numbers))
	for i, n := range numbers {
		out[i] = &castellanv1.WorkloadPort{Number: uint32(n), Protocol: ports[n]}
	}
	return out
}

// serviceIdentities says of each service where it is and who must answer (rule 33).
func (b *builder) serviceIdentities(file *workloads.File) (xds.Snapshot, error) {
	pods := make(map[string]*workloads.Workload, len(file.Workloads))
	for i := range file.Workloads {
		pods[file.Workloads[i].PodUID] = &file.Workloads[i]
	}
	out := xds.Snapshot{}
	for _, s := range file.Services {
		r, err := xds.NewResource(s.Namespace+"/"+s.Name, b.serviceIdentity(s, pods))
		if err != nil {
			return nil, err
		}
		out[r.Name] = r
	}
	return out, nil
}

func (b *builder) serviceIdentity(s workloads.Service, pods map[string]*workloads.Workload) *castellanv1.ServiceIdentity {
	msg := &castellanv1.ServiceIdentity{Namespace: s.Namespace, Name: s.Name, Hosts: s.Hosts, Addresses: s.Addresses}
	expected := map[string]bool{}
	for _, p := range s.Ports {
		msg.Ports = append(msg.Ports, &castellanv1.ServicePort{Name: p.Name, Number: uint32(p.Number), Protocol: p.Protocol})
	}
	for _, e := range s.Endpoints {
		pod := pods[e.Workload]
		if pod == nil || pod.Address == "" {
			continue // nowhere to go
		}
		id, err := b.id(pod)
		if err != nil {
			continue // no identity that could be expected; workloads has refused such names
		}
		ports := make(map[uint32]uint32, len(s.Ports))
		for _, p := range s.Ports {
			ports[uint32(p.Number)] = uint32(e.Port(p.Number))
		}
		msg.Endpoints = append(msg.Endpoints, &castellanv1.Endpoint{Address: pod.Address, Ports: ports, SpiffeId: id.String()})
		b.expect(expected, id)
	}
	for _, name := range s.SubjectAltNames {
		if id, err := spiffeid.FromString(name); err == nil {
			b.expect(expected, id)
		}
	}
	for id := range expected {
		msg.ExpectedIds = append(msg.ExpectedIds, id)
	}
	slices.Sort(msg.ExpectedIds)
	return msg
}

func (b *builder) id(w *workloads.Workload) (spiffeid.ID, error) {
	account, err := identity.NewAccount(w.Namespace, w.ServiceAccount)
	if err != nil {
		return spiffeid.ID{}, err
	}
	workload, err := identity.New(b.trustDomain, account)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return workload.ID(), nil
}

// expect adds an ID, and where it is the mesh's own the same under its aliases.
func (b *builder) expect(expected map[string]bool, id spiffeid.ID) {
	expected[id.String()] = true
	if id.TrustDomain() != b.trustDomain && !slices.Contains(b.mesh.TrustDomainAliases, id.TrustDomain().Name()) {
		return
	}
	expected[b.trustDomain.IDString()+id.Path()] = true
	for _, alias := range b.mesh.TrustDomainAliases {
		expected["spiffe://"+alias+id.Path()] = true
	}
}
