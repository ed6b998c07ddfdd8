package reference_test

import (
	"fmt"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/authz/reference"
	"castellan.dev/identity"
)

// grown is a policy of n rules of the usual kind: this account may use this path.
func grown(b *testing.B, n int) authz.Config {
	b.Helper()
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		b.Fatal(err)
	}
	cfg := authz.Config{
		Mesh:     policy.Mesh{TrustDomain: "cluster.local"},
		Workload: authz.Workload{TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), Account: account},
	}
	// A document holds 512 rules at most.
	for first := 0; first < n; first += 512 {
		p := &policy.AuthorizationPolicy{}
		for i := first; i < min(n, first+512); i++ {
			p.Rules = append(p.Rules, policy.Rule{
				From: []policy.From{{Source: &policy.Source{Principals: []string{fmt.Sprintf("cluster.local/ns/shop/sa/app-%d", i)}}}},
				To:   []policy.To{{Operation: &policy.Operation{Methods: []string{"GET", "HEAD"}, Paths: []string{fmt.Sprintf("/items/%d/*", i)}}}},
			})
		}
		cfg.Documents = append(cfg.Documents, policy.Document{
			Kind: policy.KindAuthorization, Metadata: policy.Metadata{Name: fmt.Sprint("p", first), Namespace: "shop"}, Authorization: p,
		})
	}
	return cfg
}

// BenchmarkEnforce is the row to compare the engine with: the same policies and
// the same request, of the last rule, by casbin and by the engine's index.
func BenchmarkEnforce(b *testing.B) {
	for _, n := range []int{10, 100, 1_000, 10_000} {
		cfg := grown(b, n)
		peer := authz.Peer{ID: spiffeid.RequireFromString(fmt.Sprintf("spiffe://cluster.local/ns/shop/sa/app-%d", n-1)), DestinationPort: 8080}
		request := &authz.Request{Method: "GET", Host: "orders", Path: fmt.Sprintf("/items/%d/x", n-1), Header: headers{}}
		b.Run(fmt.Sprintf("by=casbin/rules=%d", n), func(b *testing.B) {
			enforcer, err := reference.New(cfg)
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if allowed, _, err := enforcer.Decide(peer, request, nil); err != nil || !allowed {
					b.Fatal(allowed, err)
				}
			}
		})
		b.Run(fmt.Sprintf("by=engine/rules=%d", n), func(b *testing.B) {
			snapshot, _ := authz.Compile(cfg)
			connection := snapshot.Connect(peer)
			b.ReportAllocs()
			for b.Loop() {
				if !connection.Authorize(request).Allowed {
					b.Fatal("denied")
				}
			}
		})
	}
}
