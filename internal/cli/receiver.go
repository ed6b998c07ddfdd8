package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/discovery"
	"castellan.dev/identity"
	"castellan.dev/internal/up"
	"castellan.dev/internal/workloads"
)

// sampleAppPort is the workload port where nothing else is known: that of the sample mesh.
const sampleAppPort = 8080

// setting is everything but the request that the decision hangs on.
type setting struct {
	mesh   policy.Mesh
	domain spiffeid.TrustDomain
	docs   []policy.Document
	// findings are warnings about docs.
	findings []authz.Finding
	caller   spiffeid.ID
	workload authz.Workload
	port     uint16
	host     string
}

// setting reads policies, mesh and receiver.
func (e *env) setting(q *canI) (*setting, error) {
	s := &setting{}
	var known *workloads.File
	paths, trustDomain := q.files, ""
	if len(q.files) == 0 || q.upGiven {
		file, err := up.ReadFile(q.upPath)
		if err != nil {
			if len(q.files) == 0 && !q.upGiven {
				return nil, invalidf("%w; or give policies with -f", err)
			}
			return nil, err
		}
		data, err := readNamedFile("--up", up.WorkloadsFile(q.upPath))
		if err != nil {
			return nil, err
		}
		if known, err = workloads.Parse(data); err != nil {
			return nil, fmt.Errorf("%s: %w", up.WorkloadsFile(q.upPath), err)
		}
		trustDomain = file.TrustDomain
		if len(paths) == 0 {
			paths = []string{file.PolicyDir}
		}
	}
	var err error
	if s.mesh, err = loadMesh(q.meshFile, trustDomain); err != nil {
		return nil, err
	}
	if s.domain, err = identity.ParseTrustDomain(s.mesh.TrustDomain); err != nil {
		return nil, err // loadMesh has checked it
	}
	docs, err := e.readPolicies(paths, s.mesh)
	if err != nil {
		return nil, err
	}
	if err := refusal(docs); err != nil {
		if perr := e.explainRefusal(docs); perr != nil {
			return nil, perr
		}
		return nil, err
	}
	if len(docs) == 0 {
		fmt.Fprintf(e.err, "castellan: %s: no policy there; the decision is that of a mesh without any\n", strings.Join(paths, ", "))
	}
	for _, d := range docs {
		s.docs = append(s.docs, d.Document)
		s.findings = append(s.findings, d.Findings...)
	}
	if s.caller, err = parseCaller(q.from, s.domain); err != nil {
		return nil, err
	}
	return s, s.receiver(q, known)
}

// explainRefusal says on stderr which documents are invalid, and why.
func (e *env) explainRefusal(docs []discovery.FileDocument) error {
	refused := slices.DeleteFunc(slices.Clone(docs), func(d discovery.FileDocument) bool { return !d.Refused() })
	return (&env{out: e.err}).printDocuments(refused, "table")
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

// receiver finds who --to is: a declared workload, one behind a service, or, with
// no mesh to ask, an account by its name.
func (s *setting) receiver(q *canI, known *workloads.File) error {
	labels, err := parsePairs("--to-labels", splitComma(q.toLabels))
	if err != nil {
		return err
	}
	found, service, err := findReceiver(q.to, known)
	if err != nil {
		return err
	}
	ports, host := map[uint16]string{}, ""
	account := identity.Account{}
	if found != nil {
		if account, err = identity.NewAccount(found.Namespace, found.ServiceAccount); err != nil {
			return err
		}
		s.workload.Labels = found.Labels
		host = found.ServiceAccount + "." + found.Namespace
		if service != nil {
			host = service.Name + "." + service.Namespace
		}
		for _, p := range found.Ports {
			ports[p.Number] = p.Protocol
			if s.port == 0 {
				s.port = p.Number
			}
		}
	} else {
		if account, err = identity.ParseAccount(q.to); err != nil {
			return invalidf("--to: %w; services are known only with a running mesh (--up)", err)
		}
		s.workload.Labels = map[string]string{"app": account.Name()}
		host = account.Name() + "." + account.Namespace()
		s.port = sampleAppPort
	}
	if len(labels) > 0 {
		s.workload.Labels = map[string]string{}
		for _, l := range labels {
			s.workload.Labels[l[0]] = l[1]
		}
	}
	// Policy speaks of the workload's ports; where there is one, a service's port leads to it.
	_, declared := ports[q.port]
	if led := !declared && len(ports) == 1 && hasPort(service, q.port); q.port != 0 && !led {
		s.port = q.port
	}
	if s.host = host; q.host != "" {
		s.host = q.host
	}
	s.workload.TrustDomain, s.workload.Account, s.workload.Ports = s.domain, account, ports
	return nil
}

// splitComma unfolds "a=b,c=d": no label holds a comma.
func splitComma(args []string) []string {
	var out []string
	for _, a := range args {
		out = append(out, strings.Split(a, ",")...)
	}
	return out
}

func hasPort(service *workloads.Service, port uint16) bool {
	return service != nil && slices.ContainsFunc(service.Ports, func(p workloads.ServicePort) bool { return p.Number == port })
}

// findReceiver looks --to up among the declared workloads and services, by which
// name it also is a service; nil where there is no mesh to ask.
func findReceiver(to string, known *workloads.File) (*workloads.Workload, *workloads.Service, error) {
	if known == nil {
		return nil, nil, nil
	}
	var matches []*workloads.Service
	for i, svc := range known.Services {
		if to == svc.Namespace+"/"+svc.Name || to == svc.Name || slices.Contains(svc.Hosts, to) {
			matches = append(matches, &known.Services[i])
		}
	}
	for i, w := range known.Workloads {
		if to == w.Namespace+"/"+w.ServiceAccount {
			if len(matches) == 1 && serves(matches[0], w.PodUID) {
				return &known.Workloads[i], matches[0], nil
			}
			return &known.Workloads[i], nil, nil
		}
	}
	switch {
	case len(matches) == 0:
		return nil, nil, invalidf("--to %q is neither a workload nor a service of this mesh", to)
	case len(matches) > 1:
		return nil, nil, invalidf("--to %q is a service in several namespaces; give NAMESPACE/SERVICE", to)
	}
	for i, w := range known.Workloads {
		if serves(matches[0], w.PodUID) {
			return &known.Workloads[i], matches[0], nil
		}
	}
	return nil, nil, invalidf("--to %q is a service without workloads", to)
}

func serves(service *workloads.Service, podUID string) bool {
	return slices.ContainsFunc(service.Endpoints, func(e workloads.Endpoint) bool { return e.Workload == podUID })
}
