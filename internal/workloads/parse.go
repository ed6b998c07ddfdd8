package workloads

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
	"castellan.dev/internal/config"
)

const (
	apiVersion = "castellan.dev/v1alpha1"
	kind       = "Workloads"

	// maxSize bounds the file, and with it everything in it.
	maxSize = 16 << 20
	maxName = 253
)

// document is the file as written.
type document struct {
	APIVersion string     `json:"apiVersion"`
	Kind       string     `json:"kind"`
	Workloads  []Workload `json:"workloads"`
	Services   []Service  `json:"services"`
}

// Parse reads and checks a file; errors name the field.
func Parse(data []byte) (*File, error) {
	if len(data) > maxSize {
		return nil, fmt.Errorf("workloads: file has %d bytes, %d are allowed", len(data), maxSize)
	}
	var doc document
	if err := config.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("workloads: %w", err)
	}
	if err := doc.validate(); err != nil {
		return nil, fmt.Errorf("workloads: %w", err)
	}
	return &File{Workloads: doc.Workloads, Services: doc.Services}, nil
}

func (d *document) validate() error {
	if d.APIVersion != apiVersion {
		return fmt.Errorf("apiVersion: %q, want %q", d.APIVersion, apiVersion)
	}
	if d.Kind != kind {
		return fmt.Errorf("kind: %q, want %q", d.Kind, kind)
	}
	uids := map[string]bool{}
	for i := range d.Workloads {
		w := &d.Workloads[i]
		if err := w.Check(); err != nil {
			return fmt.Errorf("workloads[%d].%w", i, err)
		}
		if uids[w.PodUID] {
			return fmt.Errorf("workloads[%d].podUID: %q is used twice", i, w.PodUID)
		}
		uids[w.PodUID] = true
	}
	names := map[string]bool{}
	for i := range d.Services {
		s := &d.Services[i]
		if err := s.check(uids); err != nil {
			return fmt.Errorf("services[%d].%w", i, err)
		}
		name := s.Namespace + "/" + s.Name
		if names[name] {
			return fmt.Errorf("services[%d].name: %q is used twice", i, name)
		}
		names[name] = true
	}
	return nil
}

// Check says what is wrong with a workload, naming the field.
func (w *Workload) Check() error {
	if _, err := identity.NewAccount(w.Namespace, w.ServiceAccount); err != nil {
		return fmt.Errorf("namespace/serviceAccount: %w", err)
	}
	for _, f := range []struct {
		field, value string
		required     bool
	}{
		{"podUID", w.PodUID, true}, {"node", w.Node, true}, {"podName", w.PodName, false},
		{"serviceAccountUID", w.ServiceAccountUID, false}, {"address", w.Address, false},
	} {
		if err := checkToken(f.value, f.required); err != nil {
			return fmt.Errorf("%s: %w", f.field, err)
		}
	}
	for k, v := range w.Labels {
		if k == "" || len(k) > 2*maxName || len(v) > 63 || strings.ContainsFunc(k+v, unprintable) {
			return fmt.Errorf("labels: %q: %q is no label", k, v)
		}
	}
	seen := map[uint16]bool{}
	for i, p := range w.Ports {
		if err := checkPort(p.Number, p.Protocol); err != nil {
			return fmt.Errorf("ports[%d].%w", i, err)
		}
		if seen[p.Number] {
			return fmt.Errorf("ports[%d].number: %d is used twice", i, p.Number)
		}
		seen[p.Number] = true
	}
	return nil
}

// Check says what is wrong with a service but for its endpoints, naming the field.
func (s *Service) Check() error {
	// A service's name follows the rules of an account's.
	if _, err := identity.NewAccount(s.Namespace, s.Name); err != nil {
		return fmt.Errorf("namespace/name: %q/%q: names in the form of RFC 1123 are wanted", s.Namespace, s.Name)
	}
	for i, h := range s.Hosts {
		if err := checkToken(h, true); err != nil {
			return fmt.Errorf("hosts[%d]: %w", i, err)
		}
	}
	for i, a := range s.Addresses {
		if _, err := netip.ParseAddr(a); err != nil {
			return fmt.Errorf("addresses[%d]: %q is no IP address", i, a)
		}
	}
	if len(s.Ports) == 0 {
		return errors.New("ports: at least one is needed")
	}
	ports := map[uint16]bool{}
	for i, p := range s.Ports {
		if err := checkPort(p.Number, p.Protocol); err != nil {
			return fmt.Errorf("ports[%d].%w", i, err)
		}
		if err := checkToken(p.Name, false); err != nil {
			return fmt.Errorf("ports[%d].name: %w", i, err)
		}
		if ports[p.Number] {
			return fmt.Errorf("ports[%d].number: %d is used twice", i, p.Number)
		}
		ports[p.Number] = true
	}
	for i, san := range s.SubjectAltNames {
		if _, err := spiffeid.FromString(san); err != nil {
			return fmt.Errorf("subjectAltNames[%d]: %q: %w", i, san, err)
		}
	}
	return nil
}

func (s *Service) check(uids map[string]bool) error {
	if err := s.Check(); err != nil {
		return err
	}
	ports := map[uint16]bool{}
	for _, p := range s.Ports {
		ports[p.Number] = true
	}
	for i, e := range s.Endpoints {
		if err := e.check(uids, ports); err != nil {
			return fmt.Errorf("endpoints[%d].%w", i, err)
		}
	}
	return nil
}

// check refuses endpoints that nothing stands behind: a typing error there
// would otherwise show as a service that is merely unreachable.
func (e *Endpoint) check(uids map[string]bool, ports map[uint16]bool) error {
	if !uids[e.Workload] {
		return fmt.Errorf("workload: %q is no podUID of this file", e.Workload)
	}
	for port, target := range e.Ports {
		if !ports[port] {
			return fmt.Errorf("ports: %d is no port of the service", port)
		}
		if target == 0 {
			return fmt.Errorf("ports: %d: 1 to 65535 is wanted", port)
		}
	}
	return nil
}

// protocols that a port may declare.
func protocols() []string { return []string{"", "http", "http2", "grpc", "tcp", "tls", "https"} }

func checkPort(number uint16, protocol string) error {
	if number == 0 {
		return errors.New("number: 1 to 65535 is wanted")
	}
	if !slices.Contains(protocols(), protocol) {
		return fmt.Errorf("protocol: %q, want one of http, http2, grpc, tcp, tls, https, or none", protocol)
	}
	return nil
}

// checkToken refuses what is no name, address or UID: empty where it is needed,
// long, or with space or control characters in it.
func checkToken(s string, required bool) error {
	switch {
	case s == "" && required:
		return errors.New("required")
	case len(s) > maxName:
		return fmt.Errorf("has %d bytes, %d are allowed", len(s), maxName)
	case strings.ContainsFunc(s, unprintable):
		return fmt.Errorf("%q has a character that does not belong there", s)
	}
	return nil
}

func unprintable(r rune) bool { return r <= ' ' || r > '~' }
