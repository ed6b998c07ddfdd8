package proxy

import (
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/internal/tlsconf"
)

// TestManyExpected: what a service declares costs every proxy of the mesh what it
// is long, not the square of it, and says each identity once.
func TestManyExpected(t *testing.T) {
	const many = 100_000
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	trust := &tlsconf.Trust{TrustDomain: td, Aliases: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("old.example")}, Version: "1"}
	s := &service{name: "shop/orders"}
	port := &servicePort{number: 80}
	for i := range many {
		id := fmt.Sprintf("/ns/shop/sa/a%d", i)
		s.expected = append(s.expected, "spiffe://cluster.local"+id, "spiffe://old.example"+id)
		port.endpoints = append(port.endpoints, &endpoint{own: "spiffe://cluster.local" + id, endpointHealth: &endpointHealth{}})
	}
	port.endpoints = append(port.endpoints,
		&endpoint{own: "spiffe://cluster.local/ns/evil/sa/x", endpointHealth: &endpointHealth{}},
		&endpoint{endpointHealth: &endpointHealth{}})
	s.ports = []*servicePort{port}
	began := time.Now()
	got := s.resolve(trust).ports[0]
	// The square took minutes.
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	if n := len(got.expected); n != 2*many {
		t.Errorf("%d are expected", n)
	}
	for at, want := range map[int]int{0: 2, many - 1: 2, many: 0, many + 1: 2 * many} {
		if n := len(got.endpoints[at].allowed); n != want {
			t.Errorf("%d identities are allowed at endpoint %d, want %d", n, at, want)
		}
	}
}
