package cli

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
)

// sampleAppPort is the workload port where nothing else is known: that of the sample mesh.
const sampleAppPort = 8080

// receiver is one workload that --to leads to, or several of which the same is to
// be said.
type receiver struct {
	// pods are their names; none where nobody is known.
	pods     []string
	workload authz.Workload
	port     uint16
	host     string
	address  netip.Addr
	// service that leads to it, if one does.
	service *workloads.Service
	// outside the mesh: no proxy stands before it.
	outside bool
	enforcement
}

// parseCaller reads --from; the zero ID is a caller without a certificate.
func parseCaller(from string, td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if from == "none" {
		return spiffeid.ID{}, nil
	}
	if strings.HasPrefix(from, "spiffe://") {
		id, err := spiffeid.FromString(from)
		if err != nil {
			return id, invalidf("--from %q: %w", from, err)
		}
		if id.Path() == "" {
			return id, invalidf("--from %q names a trust domain, not a workload", from)
		}
		return id, nil
	}
	account, err := identity.ParseAccount(from)
	if err != nil {
		return spiffeid.ID{}, invalidf("--from: %w; want NAMESPACE/ACCOUNT, a SPIFFE ID, or none", err)
	}
	w, err := identity.New(td, account)
	if err != nil {
		return spiffeid.ID{}, invalidf("--from: %w", err)
	}
	return w.ID(), nil
}

// receivers finds whom --to leads to: those behind a service, those of an account,
// a pod; or, where nobody is known, an account by its name.
func (s *scene) receivers(q *canI) ([]receiver, error) {
	labels, err := parsePairs("--to-labels", splitComma(q.toLabels))
	if err != nil {
		return nil, err
	}
	var found []receiver
	if s.known == nil {
		found, err = s.byAccountName(q)
	} else {
		found, err = s.lookup(q)
	}
	if err != nil {
		return nil, err
	}
	for i := range found {
		r := &found[i]
		if r.workload.TrustDomain = s.domain; len(labels) > 0 {
			r.workload.Labels = map[string]string{}
			for _, l := range labels {
				r.workload.Labels[l[0]] = l[1]
			}
		}
		r.host = cmp.Or(q.host, r.host)
	}
	return s.merge(found), nil
}

// byAccountName makes a receiver of what its name says.
func (s *scene) byAccountName(q *canI) ([]receiver, error) {
	account, err := identity.ParseAccount(q.to)
	if err != nil {
		return nil, invalidf("--to: %w; services are known only with a running mesh (--up, or a cluster)", err)
	}
	return []receiver{{
		workload: authz.Workload{Account: account, Labels: map[string]string{"app": account.Name()}, Ports: map[uint16]string{}},
		port:     cmp.Or(q.port, sampleAppPort), host: account.Name() + "." + account.Namespace(),
	}}, nil
}

// lookup finds --to among what is known: a service, or the pods of an account, or
// on a cluster a pod.
func (s *scene) lookup(q *canI) ([]receiver, error) {
	if ref, ok := parsePodRef(q.to); ok && s.cluster {
		return s.ofPods(q, func(w *workloads.Workload) bool {
			return ref.kind == "pod" && w.Namespace == s.namespace && w.PodName == ref.name
		})
	}
	services := s.servicesNamed(q.to)
	if len(services) > 1 {
		return nil, invalidf("--to %q is a service in several namespaces; give NAMESPACE/SERVICE", q.to)
	}
	if len(services) == 1 {
		found, err := s.behind(q, services[0])
		if err != nil || len(found) > 0 {
			return found, err
		}
	}
	found, err := s.ofPods(q, func(w *workloads.Workload) bool { return q.to == w.Namespace+"/"+w.ServiceAccount })
	if err != nil && len(services) == 1 {
		return nil, invalidf("--to %q is a service without workloads", q.to)
	}
	return found, err
}

func (s *scene) servicesNamed(to string) []*workloads.Service {
	var out []*workloads.Service
	for i, svc := range s.known.Services {
		inReach := s.namespace == "" || svc.Namespace == s.namespace
		if to == svc.Namespace+"/"+svc.Name || inReach && to == svc.Name || slices.Contains(svc.Hosts, to) {
			out = append(out, &s.known.Services[i])
		}
	}
	return out
}

// ofPods makes receivers of the workloads that are meant.
func (s *scene) ofPods(q *canI, meant func(*workloads.Workload) bool) ([]receiver, error) {
	var out []receiver
	for i := range s.known.Workloads {
		w := &s.known.Workloads[i]
		if !meant(w) {
			continue
		}
		r, err := s.receiver(w)
		if err != nil {
			return nil, err
		}
		r.host = w.ServiceAccount + "." + w.Namespace
		r.port = q.port
		if q.port == 0 && len(w.Ports) > 0 {
			r.port = w.Ports[0].Number
		}
		if r.port == 0 {
			return nil, invalidf("%s declares no port; give one with --port", q.to)
		}
		out = append(out, r)
	}
	if len(out) == 0 {
		return nil, invalidf("--to %q is neither a workload nor a service of this mesh", q.to)
	}
	if !s.cluster {
		return out[:1], nil
	}
	return out, nil
}

// behind makes receivers of a service's endpoints.
func (s *scene) behind(q *canI, service *workloads.Service) ([]receiver, error) {
	pods := make(map[string]*workloads.Workload, len(s.known.Workloads))
	for i := range s.known.Workloads {
		pods[s.known.Workloads[i].PodUID] = &s.known.Workloads[i]
	}
	var out []receiver
	for _, e := range service.Endpoints {
		r := receiver{outside: e.OutsideMesh, pods: []string{e.Address}}
		if w := pods[e.Workload]; w != nil {
			var err error
			if r, err = s.receiver(w); err != nil {
				return nil, err
			}
			r.outside = e.OutsideMesh || w.OutsideMesh && !s.known.Resolved
		} else if e.Workload != "" {
			continue // gone
		}
		if addr, err := netip.ParseAddr(e.Address); err == nil {
			r.address = addr
		}
		r.service, r.host = service, service.Name+"."+service.Namespace
		var served bool
		if r.port, served = s.leadsTo(q, service, e, r.workload.Ports); !served {
			continue
		}
		out = append(out, r)
	}
	if len(out) > 0 && !s.cluster {
		return out[:1], nil
	}
	return out, nil
}

// leadsTo is the workload port that is meant at an endpoint, false where it does not
// serve the service's port. Policy speaks of the workload's ports.
func (s *scene) leadsTo(q *canI, service *workloads.Service, e workloads.Endpoint, ports map[uint16]string) (uint16, bool) {
	of := func(p workloads.ServicePort) bool { return p.Number == q.port }
	switch {
	case s.known.Resolved && q.port == 0 && len(service.Ports) > 0:
		return s.known.PortOf(e, service.Ports[0].Number)
	case s.known.Resolved && slices.ContainsFunc(service.Ports, of):
		return s.known.PortOf(e, q.port)
	}
	// Off Kubernetes an endpoint's port is its proxy's, not the workload's own.
	first := uint16(0)
	if w := s.workload(e.Workload); w != nil && len(w.Ports) > 0 {
		first = w.Ports[0].Number
	}
	_, declared := ports[q.port]
	if q.port == 0 || !declared && len(ports) == 1 && slices.ContainsFunc(service.Ports, of) {
		return first, first != 0
	}
	return q.port, true
}

func (s *scene) workload(uid string) *workloads.Workload {
	for i := range s.known.Workloads {
		if s.known.Workloads[i].PodUID == uid {
			return &s.known.Workloads[i]
		}
	}
	return nil
}

// receiver is one workload, without port.
func (s *scene) receiver(w *workloads.Workload) (receiver, error) {
	account, err := identity.NewAccount(w.Namespace, w.ServiceAccount)
	if err != nil {
		return receiver{}, err
	}
	ports := map[uint16]string{}
	for _, p := range w.Ports {
		ports[p.Number] = p.Protocol
	}
	r := receiver{workload: authz.Workload{Account: account, Labels: w.Labels, Ports: ports}, outside: w.OutsideMesh}
	if addr, err := netip.ParseAddr(w.Address); err == nil {
		r.address = addr
	}
	if s.cluster {
		r.pods = []string{w.PodName}
		r.enforcement = s.enforced(w)
	}
	return r, nil
}

// merge makes one of the receivers for which everything is the same that a decision
// hangs on, and sorts them by name.
func (s *scene) merge(all []receiver) []receiver {
	if len(all) < 2 {
		return all
	}
	kinds := map[string]int{}
	var out []receiver
	for _, r := range all {
		kind := fmt.Sprintf("%s %d %v %v %q %v", r.workload.Account, r.port, r.workload.Ports, r.outside, r.deny, s.selecting(&r))
		// Destination addresses are for rules that name them.
		if s.asksDestination() {
			kind += r.address.String()
		}
		i, ok := kinds[kind]
		if !ok {
			kinds[kind] = len(out)
			out = append(out, r)
			continue
		}
		// A pod with an address of each family is one endpoint twice.
		if !slices.Contains(out[i].pods, r.pods[0]) {
			out[i].pods = append(out[i].pods, r.pods...)
			out[i].notes = append(out[i].notes, r.notes...)
		}
	}
	for i := range out {
		slices.Sort(out[i].pods)
	}
	slices.SortFunc(out, func(a, b receiver) int { return slices.Compare(a.pods, b.pods) })
	return out
}

// selecting are the documents that select a receiver, by their place.
func (s *scene) selecting(r *receiver) []int {
	var out []int
	for i, d := range s.docs {
		if authz.Selects(d, r.workload.Account.Namespace(), r.workload.Labels, s.mesh) {
			out = append(out, i)
		}
	}
	return out
}

// asksDestination reports whether any rule names addresses of receivers.
func (s *scene) asksDestination() bool {
	return slices.ContainsFunc(s.docs, func(d policy.Document) bool { return asks(d, "destination.ip") })
}

// asks reports whether a document has conditions of a key.
func asks(d policy.Document, key string) bool {
	return d.Authorization != nil && slices.ContainsFunc(d.Authorization.Rules, func(r policy.Rule) bool {
		return slices.ContainsFunc(r.When, func(c policy.Condition) bool { return c.Key == key })
	})
}

// splitComma unfolds "a=b,c=d": no label holds a comma.
func splitComma(args []string) []string {
	var out []string
	for _, a := range args {
		out = append(out, strings.Split(a, ",")...)
	}
	return out
}
