package proxy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/internal/config"
	"castellan.dev/internal/tlsconf"
)

func trustOf(version string) *tlsconf.Trust {
	return &tlsconf.Trust{TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), Version: version}
}

// resourceOf makes a service whose content depends on the numbers given.
func resourceOf(n, variant int) *castellanv1.ServiceIdentity {
	id := "spiffe://cluster.local/ns/shop/sa/a"
	s := &castellanv1.ServiceIdentity{
		Namespace: "shop", Name: fmt.Sprintf("s%03d", n), ExpectedIds: []string{id},
		Addresses: []string{fmt.Sprintf("10.96.%d.%d", n/256, n%256), "None"},
		Ports:     []*castellanv1.ServicePort{{Number: 80, Protocol: []string{"", "http", "tcp"}[variant%3]}, {Number: 443}},
	}
	for e := range variant % 4 {
		// Some endpoints are those of other services, too.
		s.Endpoints = append(s.Endpoints, &castellanv1.Endpoint{
			Address: fmt.Sprintf("10.1.%d.%d", (n+e)/256, (n+e)%256), Ports: map[uint32]uint32{80: 8080, 443: 8443}, SpiffeId: id, OutsideMesh: variant%5 == 0,
		})
	}
	return s
}

// What an index has become by changes is what it would be from the start.
func TestIndexByChanges(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	changing := destinations{known: true}
	all := map[string]*castellanv1.ServiceIdentity{}
	addresses := map[netip.AddrPort]bool{}
	for round := range 400 {
		for range 1 + random.IntN(3) {
			n := random.IntN(60)
			name := fmt.Sprintf("shop/s%03d", n)
			if random.IntN(4) == 0 {
				delete(all, name)
				changing.set(name, nil)
				continue
			}
			all[name] = resourceOf(n, random.IntN(60))
			s, err := newService(all[name], changing.now(name))
			if err != nil {
				t.Fatal(err)
			}
			changing.set(name, s)
			s.targets(func(at netip.AddrPort, _ target) { addresses[at] = true })
		}
		trust := trustOf(fmt.Sprint(round / 100))
		services, got := changing.resolve(trust, "shop")
		fresh := destinations{known: true}
		for name, r := range all {
			s, err := newService(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			fresh.set(name, s)
		}
		_, want := fresh.resolve(trust, "shop")
		if len(services) != len(all) {
			t.Fatalf("%d services, want %d", len(services), len(all))
		}
		for at := range addresses {
			g, gOK := got.find(at)
			w, wOK := want.find(at)
			if gOK != wOK {
				t.Fatalf("round %d: %s: %t, want %t", round, at, gOK, wOK)
			}
			if gOK && (g.port.service != w.port.service || g.port.number != w.port.number || (g.endpoint == nil) != (w.endpoint == nil) ||
				g.endpoint != nil && (g.endpoint.address != w.endpoint.address || g.endpoint.outside != w.endpoint.outside)) {
				t.Fatalf("round %d: %s: %+v, want %+v", round, at, g, w)
			}
			if gOK && services[g.port.service].port(g.port.number) != g.port {
				t.Fatalf("round %d: %s leads to a service as it was", round, at)
			}
			if gOK && g.endpoint != nil && !slices.Contains(g.port.endpoints, g.endpoint) {
				t.Fatalf("round %d: %s leads to an endpoint as it was", round, at)
			}
		}
	}
}

// A state that is held stays as it was.
func TestIndexIsImmutable(t *testing.T) {
	d := destinations{known: true}
	s, _ := newService(resourceOf(1, 7), nil)
	d.set("shop/s001", s)
	_, before := d.resolve(trustOf("1"), "shop")
	vip := netip.MustParseAddrPort("10.96.0.1:80")
	held, ok := before.find(vip)
	if !ok {
		t.Fatal("not found")
	}
	d.set("shop/s001", nil)
	_, after := d.resolve(trustOf("1"), "shop")
	if _, ok := after.find(vip); ok {
		t.Error("a service that is gone is found")
	}
	if again, ok := before.find(vip); !ok || again != held {
		t.Error("what was handed out has changed")
	}
}

// Of what stands at one address, the service's own counts first, then the mesh,
// then who says what is spoken.
func TestWhoseAddress(t *testing.T) {
	const at = "10.0.0.1"
	id := "spiffe://cluster.local/ns/shop/sa/a"
	direct := func(name, protocol string, outside bool) *castellanv1.ServiceIdentity {
		return &castellanv1.ServiceIdentity{
			Namespace: "shop", Name: name, ExpectedIds: []string{id}, Ports: []*castellanv1.ServicePort{{Number: 80, Protocol: protocol}},
			Endpoints: []*castellanv1.Endpoint{{Address: at, Ports: map[uint32]uint32{80: 8080}, SpiffeId: id, OutsideMesh: outside}},
		}
	}
	// Somebody else's service that lists the address, and has nobody answer there.
	foreign := direct("a", "http", false)
	foreign.Namespace, foreign.ExpectedIds = "other", []string{"spiffe://cluster.local/ns/other/sa/x"}
	// A database outside the mesh, of the caller's own namespace and of another, and
	// somebody who says it is inside.
	database := direct("db", "", true)
	database.Endpoints[0].SpiffeId = ""
	claimed := direct("z", "http", false)
	claimed.Namespace, claimed.Endpoints[0].SpiffeId = "other", ""
	elsewhere := direct("db", "", true)
	elsewhere.Namespace, elsewhere.Endpoints[0].SpiffeId = "data", ""
	own := &castellanv1.ServiceIdentity{Namespace: "shop", Name: "z", Addresses: []string{at}, Ports: []*castellanv1.ServicePort{{Number: 8080}}}
	for _, tt := range []struct {
		services []*castellanv1.ServiceIdentity
		want     string
	}{
		{[]*castellanv1.ServiceIdentity{direct("b", "http", false), direct("a", "http", false)}, "shop/a"},
		{[]*castellanv1.ServiceIdentity{direct("a", "", false), direct("b", "tcp", false)}, "shop/b"},
		{[]*castellanv1.ServiceIdentity{direct("a", "http", true), direct("b", "", false)}, "shop/b"},
		{[]*castellanv1.ServiceIdentity{direct("z", "", false), foreign}, "shop/z"},
		{[]*castellanv1.ServiceIdentity{direct("a", "http", false), own}, "shop/z"},
		{[]*castellanv1.ServiceIdentity{database, claimed}, "shop/db"},
		{[]*castellanv1.ServiceIdentity{elsewhere, claimed}, "other/z"},
	} {
		for range 2 {
			d := destinations{known: true}
			for _, r := range tt.services {
				s, err := newService(r, nil)
				if err != nil {
					t.Fatal(err)
				}
				d.set(s.name, s)
				d.resolve(trustOf("1"), "shop") // one after the other
			}
			_, x := d.resolve(trustOf("1"), "shop")
			if got, ok := x.find(netip.MustParseAddrPort(at + ":8080")); !ok || got.port.service != tt.want {
				t.Errorf("%+v, want %s", got.port, tt.want)
			}
			slices.Reverse(tt.services)
		}
	}
}

// In the clear goes only what the mesh allows, and never before the services are known.
func TestPasses(t *testing.T) {
	d := destinations{}
	inside, _ := newService(resourceOf(1, 7), nil)   // three endpoints in the mesh
	outside, _ := newService(resourceOf(9, 15), nil) // three outside
	d.set(inside.name, inside)
	d.set(outside.name, outside)
	anything := &policyState{mesh: policy.Mesh{OutboundPolicy: policy.OutboundAllowAny}}
	registered := &policyState{mesh: policy.Mesh{OutboundPolicy: policy.OutboundRegistryOnly}}
	for at, want := range map[string]bool{
		"10.96.0.1:80": false, "10.1.0.1:8080": false, "10.96.0.9:80": true, "10.1.0.9:8080": true,
		"203.0.113.1:443": true, "10.96.0.1:81": true,
	} {
		dst := netip.MustParseAddrPort(at)
		d.known = true
		_, x := d.resolve(trustOf("1"), "shop")
		if got := (&state{policy: anything, index: x}).passes(dst); got != want {
			t.Errorf("%s: %t, want %t", at, got, want)
		}
		for name, st := range map[string]*state{
			"registered only": {policy: registered, index: x}, "no policy": {index: x}, "no settings": {policy: &policyState{}, index: x},
			"services unknown": {policy: anything},
		} {
			if st.passes(dst) {
				t.Errorf("%s: %s is passed on", name, at)
			}
		}
	}
	d = destinations{}
	if _, x := d.resolve(trustOf("1"), "shop"); x != nil {
		t.Error("services are known that nobody has told of")
	}
}

func TestFamilyOfEndpoints(t *testing.T) {
	r := resourceOf(1, 3) // endpoints of IPv4
	s, _ := newService(r, nil)
	four := s.resolve(trustOf("1")).port(80)
	r.Endpoints = append(r.Endpoints, &castellanv1.Endpoint{Address: "fd00::1", Ports: map[uint32]uint32{80: 8080}, SpiffeId: "spiffe://cluster.local/ns/shop/sa/a"})
	s, _ = newService(r, nil)
	both := s.resolve(trustOf("1")).port(80)
	now := time.Now()
	for range 12 {
		if e := both.pick(now, nil, wanted{family: onlyIPv6}); e == nil || e.family != onlyIPv6 {
			t.Fatalf("%+v", e)
		}
		if e := both.pick(now, nil, wanted{family: onlyIPv4}); e == nil || e.family != onlyIPv4 {
			t.Fatalf("%+v", e)
		}
		// What has none of the family is reached by the other.
		if e := four.pick(now, nil, wanted{family: onlyIPv6}); e == nil || e.family != onlyIPv4 {
			t.Fatalf("%+v", e)
		}
	}
}

// One service's change among many costs what it touches; looking up costs nothing.
func BenchmarkServiceUpdate(b *testing.B) {
	d := destinations{known: true}
	for n := range 1000 {
		r := resourceOf(n, 1)
		r.Endpoints = nil
		for e := range 10 {
			r.Endpoints = append(r.Endpoints, &castellanv1.Endpoint{
				Address: fmt.Sprintf("10.%d.%d.%d", 1+n/250, n%250, e), Ports: map[uint32]uint32{80: 8080, 443: 8443}, SpiffeId: "spiffe://cluster.local/ns/shop/sa/a",
			})
		}
		s, err := newService(r, nil)
		if err != nil {
			b.Fatal(err)
		}
		d.set(s.name, s)
	}
	trust := trustOf("1")
	_, x := d.resolve(trust, "shop")
	b.Run("change one of 1000", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			name := fmt.Sprintf("shop/s%03d", i%1000)
			d.set(name, d.now(name))
			_, x = d.resolve(trust, "shop")
		}
	})
	at := netip.MustParseAddrPort("10.1.7.3:8080")
	b.Run("find", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			if _, ok := x.find(at); !ok {
				b.Fatal("not found")
			}
		}
	})
}

// Where a captured connection's requests go costs no more than where a configured
// one's do: nothing is allocated.
func TestCapturedRequestsAllocateNothing(t *testing.T) {
	p, err := New(Config{Proxy: config.Proxy{Capture: &config.Capture{Inbound: 15006, Outbound: 15001}}, Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.stopServing()
	s, err := newService(resourceOf(1, 7), nil)
	if err != nil {
		t.Fatal(err)
	}
	p.store.update(func(in *inputs) {
		in.services.known = true
		in.services.set(s.name, s)
	})
	st, now := p.store.load(), time.Now()
	for _, at := range []string{"10.96.0.1:80", "10.1.0.1:8080"} {
		out, refused := p.capturedOutbound(netip.MustParseAddrPort(at))
		if refused != "" || out.name != "shop/s001" {
			t.Fatalf("%+v %s", out, refused)
		}
		if n := testing.AllocsPerRun(100, func() {
			to, refused := out.resolve(st)
			if refused != nil {
				t.Fatal(refused)
			}
			e := to.endpoint
			if e == nil {
				e = to.port.pick(now, nil, out.wants(st))
			}
			e.pool(st.serial)
		}); n > 0 {
			t.Errorf("%s: %v allocations a request", at, n)
		}
	}
}
