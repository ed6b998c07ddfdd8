package discovery

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
	"castellan.dev/internal/xds"
)

// serviceMade is a service as it was published last.
type serviceMade struct {
	revision uint64
	resource xds.Resource
}

// serviceIdentities says of each service where it is and who must answer (rule 33).
func (b *builder) serviceIdentities(file *workloads.File, pods map[string]*workload) (xds.Snapshot, error) {
	out := make(xds.Snapshot, len(file.Services))
	made := make(map[string]serviceMade, len(file.Services))
	for i := range file.Services {
		s := &file.Services[i]
		name := s.Namespace + "/" + s.Name
		m, ok := b.services[name]
		if !ok || s.Revision == 0 || m.revision != s.Revision {
			r, err := xds.NewResource(name, b.serviceIdentity(file, s, pods))
			if err != nil {
				return nil, err
			}
			m = serviceMade{revision: s.Revision, resource: r}
		}
		made[name], out[name] = m, m.resource
	}
	b.services = made
	return out, nil
}

func (b *builder) serviceIdentity(file *workloads.File, s *workloads.Service, pods map[string]*workload) *castellanv1.ServiceIdentity {
	msg := &castellanv1.ServiceIdentity{Namespace: s.Namespace, Name: s.Name, Hosts: s.Hosts, Addresses: s.Addresses}
	expected := map[string]bool{}
	for _, p := range s.Ports {
		msg.Ports = append(msg.Ports, &castellanv1.ServicePort{Name: p.Name, Number: uint32(p.Number), Protocol: p.Protocol})
	}
	for _, e := range s.Endpoints {
		made, id, ok := b.endpoint(file, s, e, pods)
		if !ok {
			continue
		}
		msg.Endpoints = append(msg.Endpoints, made)
		// Who cannot prove who it is, is nobody to expect.
		if s.Accounts == nil && !id.IsZero() && !made.GetOutsideMesh() {
			b.expect(expected, id)
		}
	}
	for _, a := range s.Accounts {
		if w, err := identity.New(b.trustDomain, a); err == nil {
			b.expect(expected, w.ID())
		}
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

// endpoint makes one endpoint and says whose it is, the zero ID for nobody's.
func (b *builder) endpoint(file *workloads.File, s *workloads.Service, e workloads.Endpoint, pods map[string]*workload) (*castellanv1.Endpoint, spiffeid.ID, bool) {
	out := &castellanv1.Endpoint{Address: e.Address, OutsideMesh: e.OutsideMesh, Ports: make(map[uint32]uint32, len(s.Ports))}
	var id spiffeid.ID
	if e.Workload != "" {
		pod := pods[e.Workload]
		if pod == nil {
			return nil, id, false // gone
		}
		if out.Address == "" {
			out.Address = pod.Address
		}
		out.OutsideMesh = out.OutsideMesh || pod.OutsideMesh && !file.Resolved
		var err error
		if id, err = b.id(pod.Workload); err != nil {
			return nil, id, false // no identity that could be expected; workloads has refused such names
		}
		out.SpiffeId = id.String()
	}
	for _, p := range s.Ports {
		if to, ok := file.PortOf(e, p.Number); ok {
			out.Ports[uint32(p.Number)] = uint32(to)
		}
	}
	return out, id, out.Address != "" // else nowhere to go
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
