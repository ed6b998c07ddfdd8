package proxy

import (
	"cmp"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/judge"
	"castellan.dev/internal/tlsconf"
)

// retryAfter is how long an endpoint that could not be reached is passed over
// while others can.
const retryAfter = 5 * time.Second

// service is one destination as the server describes it, with the identities
// that its endpoints may have under the current trust.
type service struct {
	resource *castellanv1.ServiceIdentity
	ports    []*servicePort
}

// servicePort is one port of a destination.
type servicePort struct {
	service  string
	number   uint16
	protocol protocol
	sni      string
	// expected are the service's identities, aliases included.
	expected  []spiffeid.ID
	endpoints []*endpoint
	next      *atomic.Uint32
}

// endpoint is one place where a service port is served.
type endpoint struct {
	address string
	// own is the identity the server gives it, as a string.
	own string
	// allowed are the identities accepted there: the endpoint's own, in every
	// alias of its trust domain, if the service expects it. Empty: nobody (authz 33).
	allowed []spiffeid.ID
	*endpointHealth
}

// endpointHealth outlives updates of its service.
type endpointHealth struct {
	// failedUntil, in Unix nanoseconds, is set when it could not be reached.
	failedUntil atomic.Int64
	// epoch is raised to retire the connections that are open.
	epoch atomic.Uint32
	keys  atomic.Pointer[poolKeys]
}

// poolKeys are the names of connections that are interchangeable: same
// endpoint, same identities accepted, same certificate of ours, same epoch.
type poolKeys struct {
	identity  string
	serial    string
	epoch     uint32
	http1, h2 string
}

func (k *poolKeys) key(w wire) string {
	if w == wireHTTP2 {
		return k.h2
	}
	return k.http1
}

// port returns the port of that number, the first when number is 0.
func (s *service) port(number uint16) *servicePort {
	if s == nil {
		return nil
	}
	for _, p := range s.ports {
		if number == 0 || p.number == number {
			return p
		}
	}
	return nil
}

// resolve gives services the identities of the current trust. Endpoints keep
// their health, and ports their turn.
func resolve(in map[string]*service, trust *tlsconf.Trust) map[string]*service {
	out := make(map[string]*service, len(in))
	for name, s := range in {
		next := &service{resource: s.resource}
		expected := expand(parseIDs(s.resource.GetExpectedIds()), trust)
		for _, p := range s.ports {
			port := *p
			port.expected = expected
			port.endpoints = make([]*endpoint, 0, len(p.endpoints))
			for _, e := range p.endpoints {
				port.endpoints = append(port.endpoints, &endpoint{
					address: e.address, own: e.own, allowed: acceptable(e.own, expected, trust), endpointHealth: e.endpointHealth,
				})
			}
			next.ports = append(next.ports, &port)
		}
		out[name] = next
	}
	return out
}

// acceptable are the identities that may answer at an endpoint: its own, where
// the service expects it. An endpoint without one of its own (declared by
// names outside the mesh's workloads) may be any that the service expects.
func acceptable(own string, expected []spiffeid.ID, trust *tlsconf.Trust) []spiffeid.ID {
	if own == "" {
		return expected
	}
	var out []spiffeid.ID
	for _, id := range expand(parseIDs([]string{own}), trust) {
		if slices.Contains(expected, id) {
			out = append(out, id)
		}
	}
	return out
}

// parseIDs drops what is no SPIFFE ID: it can be nobody's.
func parseIDs(names []string) []spiffeid.ID {
	ids := make([]spiffeid.ID, 0, len(names))
	for _, name := range names {
		if id, err := spiffeid.FromString(name); err == nil && id.Path() != "" {
			ids = append(ids, id)
		}
	}
	return ids
}

// expand adds the same workload under every alias of the mesh's trust domain.
func expand(ids []spiffeid.ID, trust *tlsconf.Trust) []spiffeid.ID {
	if trust == nil {
		return nil
	}
	var out []spiffeid.ID
	add := func(id spiffeid.ID) {
		if !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	for _, id := range ids {
		add(id)
		if !trust.Member(id.TrustDomain()) {
			continue
		}
		for _, td := range append([]spiffeid.TrustDomain{trust.TrustDomain}, trust.Aliases...) {
			if other, err := spiffeid.FromPath(td, id.Path()); err == nil {
				add(other)
			}
		}
	}
	return out
}

// newService reads the resource; before is what it replaces, whose health it keeps.
func newService(r *castellanv1.ServiceIdentity, before *service) (*service, error) {
	s := &service{resource: r}
	name := r.GetNamespace() + "/" + r.GetName()
	for _, p := range r.GetPorts() {
		if p.GetNumber() == 0 || p.GetNumber() > math.MaxUint16 {
			return nil, fmt.Errorf("service %q: port %d", name, p.GetNumber())
		}
		port := &servicePort{
			service: name, number: uint16(p.GetNumber()), protocol: judge.ProtocolOf(p.GetProtocol()),
			sni:  fmt.Sprintf("outbound_.%d_._.%s", p.GetNumber(), host(r)),
			next: new(atomic.Uint32),
		}
		old := before.port(port.number)
		known := map[string]*endpointHealth{}
		if old != nil {
			port.next = old.next
			for _, e := range old.endpoints {
				known[e.address] = e.endpointHealth
			}
		}
		for _, e := range r.GetEndpoints() {
			address := endpointAddress(e, port.number)
			if address == "" {
				continue
			}
			health := known[address]
			if health == nil {
				health = &endpointHealth{}
			}
			port.endpoints = append(port.endpoints, &endpoint{address: address, own: e.GetSpiffeId(), endpointHealth: health})
		}
		s.ports = append(s.ports, port)
	}
	return s, nil
}

func (p *servicePort) endpoint(address string) *endpoint {
	if p == nil {
		return nil
	}
	for _, e := range p.endpoints {
		if e.address == address {
			return e
		}
	}
	return nil
}

// endpointAddress is where e serves the service port, or "" if it does not.
func endpointAddress(e *castellanv1.Endpoint, number uint16) string {
	port := e.GetPorts()[uint32(number)]
	if e.GetAddress() == "" || port == 0 || port > math.MaxUint16 {
		return ""
	}
	return net.JoinHostPort(e.GetAddress(), strconv.Itoa(int(port)))
}

// host is the service's full name for SNI.
func host(r *castellanv1.ServiceIdentity) string {
	full := slices.MaxFunc(append(r.GetHosts(), r.GetName()+"."+r.GetNamespace()), func(a, b string) int {
		if d := cmp.Compare(strings.Count(a, "."), strings.Count(b, ".")); d != 0 {
			return d
		}
		return cmp.Compare(len(a), len(b))
	})
	return full
}

// pick chooses an endpoint by turns, passing over those that failed lately and
// those already tried; nil when none is left.
func (p *servicePort) pick(now time.Time, tried []*endpoint) *endpoint {
	n := uint32(len(p.endpoints))
	if n == 0 {
		return nil
	}
	var spare *endpoint
	start := p.next.Add(1)
	for i := range n {
		e := p.endpoints[(start+i)%n]
		if slices.Contains(tried, e) {
			continue
		}
		if e.failedUntil.Load() <= now.UnixNano() {
			return e
		}
		if spare == nil {
			spare = e
		}
	}
	// All failed lately: trying is better than refusing.
	return spare
}

func (e *endpoint) failed(now time.Time) { e.failedUntil.Store(now.Add(retryAfter).UnixNano()) }
func (e *endpoint) works()               { e.failedUntil.Store(0) }

// pool names the connections to e that are interchangeable now.
func (e *endpoint) pool(serial string) *poolKeys {
	epoch := e.epoch.Load()
	if k := e.keys.Load(); k != nil && k.serial == serial && k.epoch == epoch && sameIDs(k.identity, e.allowed) {
		return k
	}
	identity := idKey(e.allowed)
	base := e.address + "|" + identity + "|" + serial + "|" + strconv.FormatUint(uint64(epoch), 10)
	k := &poolKeys{identity: identity, serial: serial, epoch: epoch, http1: base + "|http1", h2: base + "|h2"}
	e.keys.Store(k)
	return k
}

func idKey(ids []spiffeid.ID) string {
	var b strings.Builder
	for _, id := range ids {
		b.WriteString(id.String())
		b.WriteByte(' ')
	}
	return b.String()
}

// sameIDs compares key with idKey(ids) without making it.
func sameIDs(key string, ids []spiffeid.ID) bool {
	for _, id := range ids {
		rest, ok := strings.CutPrefix(key, id.String())
		if !ok || rest == "" || rest[0] != ' ' {
			return false
		}
		key = rest[1:]
	}
	return key == ""
}

// keyHasSerial tells whether a pool key names connections opened with that certificate.
func keyHasSerial(key, serial string) bool { return strings.Contains(key, "|"+serial+"|") }
