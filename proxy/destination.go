package proxy

import (
	"cmp"
	"fmt"
	"math"
	"net"
	"net/netip"
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
	name string
	// addresses are its own, such as its cluster IPs.
	addresses []netip.Addr
	// expected are the identities as told, own and aliases' not worked out.
	expected []string
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
	// has4 and has6: some endpoint has an address of that family.
	has4, has6 bool
	next       *atomic.Uint32
}

// endpoint is one place where a service port is served.
type endpoint struct {
	address string
	family  ipFamily
	// own is the identity the server gives it, as a string.
	own string
	// allowed are the identities accepted there: the endpoint's own, in every
	// alias of its trust domain, if the service expects it. Empty: nobody (authz 33).
	allowed []spiffeid.ID
	// outside: nobody there speaks mutual TLS. It is spoken to in the clear where
	// the mesh allows that.
	outside bool
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

// resolve gives a service the identities of the current trust. Endpoints keep
// their health, and ports their turn.
func (s *service) resolve(trust *tlsconf.Trust) *service {
	next := &service{name: s.name, addresses: s.addresses, expected: s.expected}
	expected := expand(parseIDs(s.expected), trust)
	isExpected := make(map[spiffeid.ID]bool, len(expected))
	for _, id := range expected {
		isExpected[id] = true
	}
	// Many endpoints run as few accounts.
	allowed := map[string][]spiffeid.ID{}
	for _, p := range s.ports {
		port := *p
		port.expected = expected
		port.endpoints = make([]*endpoint, 0, len(p.endpoints))
		for _, e := range p.endpoints {
			ids, known := allowed[e.own]
			if !known {
				ids = expected
				if e.own != "" {
					ids = acceptable(e.own, isExpected, trust)
				}
				allowed[e.own] = ids
			}
			port.endpoints = append(port.endpoints, &endpoint{
				address: e.address, family: e.family, own: e.own, allowed: ids, outside: e.outside, endpointHealth: e.endpointHealth,
			})
		}
		next.ports = append(next.ports, &port)
	}
	return next
}

// acceptable are the identities that may answer at an endpoint that has one of its
// own: that, where the service expects it. One without (declared by names outside
// the mesh's workloads) may be any that the service expects.
func acceptable(own string, expected map[spiffeid.ID]bool, trust *tlsconf.Trust) []spiffeid.ID {
	var out []spiffeid.ID
	for _, id := range expand(parseIDs([]string{own}), trust) {
		if expected[id] {
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
	out := make([]spiffeid.ID, 0, len(ids))
	// A set: a service of thousands of identities must cost what it is long.
	have := make(map[spiffeid.ID]bool, len(ids))
	add := func(id spiffeid.ID) {
		if !have[id] {
			have[id] = true
			out = append(out, id)
		}
	}
	for _, id := range ids {
		add(id)
		if !trust.Member(id.TrustDomain()) {
			continue
		}
		addUnder(trust.TrustDomain, id, add)
		for _, td := range trust.Aliases {
			addUnder(td, id, add)
		}
	}
	return out
}

func addUnder(td spiffeid.TrustDomain, id spiffeid.ID, add func(spiffeid.ID)) {
	if other, err := spiffeid.FromPath(td, id.Path()); err == nil {
		add(other)
	}
}

// newService reads the resource; before is what it replaces, whose health it keeps.
func newService(r *castellanv1.ServiceIdentity, before *service) (*service, error) {
	s := &service{name: r.GetNamespace() + "/" + r.GetName(), expected: r.GetExpectedIds()}
	for _, a := range r.GetAddresses() {
		// Others, such as "None", cannot be connected to.
		if addr, err := netip.ParseAddr(a); err == nil {
			s.addresses = append(s.addresses, addr.Unmap())
		}
	}
	fullName := host(r)
	for _, p := range r.GetPorts() {
		if p.GetNumber() == 0 || p.GetNumber() > math.MaxUint16 {
			return nil, fmt.Errorf("service %q: port %d", s.name, p.GetNumber())
		}
		port := &servicePort{
			service: s.name, number: uint16(p.GetNumber()), protocol: judge.ProtocolOf(p.GetProtocol()),
			sni:  fmt.Sprintf("outbound_.%d_._.%s", p.GetNumber(), fullName),
			next: new(atomic.Uint32),
		}
		port.readEndpoints(r.GetEndpoints(), before.port(port.number))
		s.ports = append(s.ports, port)
	}
	return s, nil
}

// readEndpoints takes those that serve the port; old is the port before.
func (p *servicePort) readEndpoints(endpoints []*castellanv1.Endpoint, old *servicePort) {
	known := map[string]*endpointHealth{}
	if old != nil {
		p.next = old.next
		for _, e := range old.endpoints {
			known[e.address] = e.endpointHealth
		}
	}
	// Kept once each: the endpoints of a service have few identities between them.
	owns := map[string]string{}
	for _, e := range endpoints {
		address := endpointAddress(e, p.number)
		if address == "" {
			continue
		}
		health := known[address]
		if health == nil {
			health = &endpointHealth{}
		}
		own, seen := owns[e.GetSpiffeId()]
		if !seen {
			own = e.GetSpiffeId()
			owns[own] = own
		}
		family := familyOf(e.GetAddress())
		p.has4, p.has6 = p.has4 || family == onlyIPv4, p.has6 || family == onlyIPv6
		p.endpoints = append(p.endpoints, &endpoint{address: address, family: family, own: own, outside: e.GetOutsideMesh(), endpointHealth: health})
	}
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

// ipFamily is that of an address.
type ipFamily uint8

const (
	anyFamily ipFamily = iota // also that of names
	onlyIPv4
	onlyIPv6
)

func familyOf(address string) ipFamily {
	switch addr, err := netip.ParseAddr(address); {
	case err != nil:
		return anyFamily
	case addr.Unmap().Is4():
		return onlyIPv4
	}
	return onlyIPv6
}

// wanted says which endpoints will do.
type wanted struct {
	// plain: those outside the mesh too.
	plain bool
	// family is that of the address the application chose: what listens on one may
	// not listen on the other. Where a port has none of the family, all will do.
	family ipFamily
}

func (w wanted) takes(p *servicePort, e *endpoint) bool {
	if e.outside && !w.plain {
		return false
	}
	has := w.family == onlyIPv4 && p.has4 || w.family == onlyIPv6 && p.has6
	return !has || e.family == w.family
}

// pick chooses an endpoint of those wanted by turns, passing over those that
// failed lately and those already tried; nil when none is left.
func (p *servicePort) pick(now time.Time, tried []*endpoint, w wanted) *endpoint {
	n := uint32(len(p.endpoints))
	if n == 0 {
		return nil
	}
	var spare *endpoint
	start := p.next.Add(1)
	for i := range n {
		e := p.endpoints[(start+i)%n]
		if !w.takes(p, e) || slices.Contains(tried, e) {
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

// outsideOnly: the port is served, and nowhere in the mesh.
func (p *servicePort) outsideOnly() bool {
	return len(p.endpoints) > 0 && !slices.ContainsFunc(p.endpoints, func(e *endpoint) bool { return !e.outside })
}

func (e *endpoint) failed(now time.Time) { e.failedUntil.Store(now.Add(retryAfter).UnixNano()) }
func (e *endpoint) works()               { e.failedUntil.Store(0) }

// pool names the connections to e that are interchangeable now.
func (e *endpoint) pool(serial string) *poolKeys {
	epoch := e.epoch.Load()
	if k := e.keys.Load(); k != nil && k.serial == serial && k.epoch == epoch && e.sameIdentity(k.identity) {
		return k
	}
	identity := idKey(e.allowed)
	if e.outside {
		identity = plainKey
	}
	base := e.address + "|" + identity + "|" + serial + "|" + strconv.FormatUint(uint64(epoch), 10)
	k := &poolKeys{identity: identity, serial: serial, epoch: epoch, http1: base + "|http1", h2: base + "|h2"}
	e.keys.Store(k)
	return k
}

// plainKey stands for the identities of connections that show none; no list of
// SPIFFE IDs looks like it.
const plainKey = "plain"

func (e *endpoint) sameIdentity(key string) bool {
	if e.outside {
		return key == plainKey
	}
	return key != plainKey && sameIDs(key, e.allowed)
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
