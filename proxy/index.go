package proxy

import (
	"cmp"
	"hash/maphash"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// target is what stands at an address: a service's port, or one of its endpoints,
// which is all that may be connected to then.
type target struct {
	port     *servicePort
	endpoint *endpoint
}

// index finds destinations by address. It is immutable; a changed one shares with
// the one before what did not change, so that a mesh of many services costs an
// update no more than what it touches.
type index struct {
	seed maphash.Seed
	// home is the namespace of the workload, whose own services come before others'.
	home   string
	shards [2048]map[netip.AddrPort][]target
}

func newIndex(home string) *index { return &index{seed: maphash.MakeSeed(), home: home} }

func (x *index) shard(at netip.AddrPort) uint16 {
	return uint16(maphash.Comparable(x.seed, at)) % uint16(len(x.shards))
}

// find returns what stands at an address; false for nothing of the mesh. Where
// several services share an endpoint, the answer is the same each time.
func (x *index) find(at netip.AddrPort) (target, bool) {
	if x == nil {
		return target{}, false
	}
	places := x.shards[x.shard(at)][at]
	if len(places) == 0 {
		return target{}, false
	}
	return places[0], true
}

// changed returns the index with one set of services in the place of another. Each
// address is gone through once, however many services list it.
func (x *index) changed(before, after []*service) *index {
	gone := map[*servicePort]bool{}
	news := map[netip.AddrPort][]target{}
	for _, s := range before {
		s.targets(func(at netip.AddrPort, p target) {
			gone[p.port] = true
			news[at] = nil
		})
	}
	for _, s := range after {
		s.targets(func(at netip.AddrPort, p target) { news[at] = append(news[at], p) })
	}
	e := &indexEdit{index: &index{seed: x.seed, home: x.home, shards: x.shards}}
	for at, added := range news {
		shard := e.open(at)
		all := slices.DeleteFunc(slices.Clone(shard[at]), func(p target) bool { return gone[p.port] })
		if all = append(all, added...); len(all) == 0 {
			delete(shard, at)
			continue
		}
		slices.SortStableFunc(all, x.compare)
		shard[at] = slices.Clip(all)
	}
	return e.index
}

// indexEdit copies a shard at its first change.
type indexEdit struct {
	index  *index
	copied [2048]bool
}

func (e *indexEdit) open(at netip.AddrPort) map[netip.AddrPort][]target {
	n := e.index.shard(at)
	if !e.copied[n] {
		e.copied[n] = true
		if e.index.shards[n] = maps.Clone(e.index.shards[n]); e.index.shards[n] == nil {
			e.index.shards[n] = map[netip.AddrPort][]target{}
		}
	}
	return e.index.shards[n]
}

// compare orders what stands at one address: a service's own address first; then
// endpoints of services in their workload's namespace, since others may list
// anybody's address; of those, what the caller's own namespace says, or anybody could
// take a database from it that is outside the mesh; then those in the mesh, so that
// nobody can talk a caller out of mutual TLS; ports that declare what they speak, and by
// name.
func (x *index) compare(p, q target) int {
	last := func(late bool) int {
		if late {
			return 1
		}
		return 0
	}
	return cmp.Or(
		cmp.Compare(last(p.endpoint != nil), last(q.endpoint != nil)),
		cmp.Compare(last(p.foreign()), last(q.foreign())),
		cmp.Compare(last(p.foreign() && p.namespace() != x.home), last(q.foreign() && q.namespace() != x.home)),
		cmp.Compare(last(p.endpoint != nil && p.endpoint.outside), last(q.endpoint != nil && q.endpoint.outside)),
		cmp.Compare(last(p.port.protocol == undeclared), last(q.port.protocol == undeclared)),
		cmp.Compare(p.port.service, q.port.service),
		cmp.Compare(p.port.number, q.port.number),
	)
}

// foreign: a service lists a workload of another namespace, or an address of nobody.
func (p target) foreign() bool {
	if p.endpoint == nil {
		return false
	}
	_, rest, _ := strings.Cut(p.endpoint.own, "/ns/")
	workload, _, _ := strings.Cut(rest, "/")
	return workload != p.namespace()
}

// namespace is the service's.
func (p target) namespace() string {
	namespace, _, _ := strings.Cut(p.port.service, "/")
	return namespace
}

// targets visits the addresses at which a service is found.
func (s *service) targets(visit func(netip.AddrPort, target)) {
	for _, port := range s.ports {
		for _, addr := range s.addresses {
			visit(netip.AddrPortFrom(addr, port.number), target{port: port})
		}
		for _, e := range port.endpoints {
			// Off Kubernetes an endpoint may be a name, which nothing is redirected from.
			if at, err := netip.ParseAddrPort(e.address); err == nil {
				visit(netip.AddrPortFrom(at.Addr().Unmap(), at.Port()), target{port, e})
			}
		}
	}
}
