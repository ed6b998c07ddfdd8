package authz_test

import (
	"fmt"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
)

// The frontend may read orders; nobody may call anything else.
func Example() {
	orders := policy.Document{
		Kind:     policy.KindAuthorization,
		Metadata: policy.Metadata{Namespace: "shop", Name: "orders"},
		Authorization: &policy.AuthorizationPolicy{
			Action: policy.ActionAllow,
			Rules: []policy.Rule{{
				From: []policy.From{{Source: &policy.Source{Principals: []string{"cluster.local/ns/shop/sa/frontend"}}}},
				To:   []policy.To{{Operation: &policy.Operation{Methods: []string{"GET"}, Paths: []string{"/orders/{*}"}}}},
			}},
		},
	}
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		fmt.Println(err)
		return
	}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	snapshot, problems := authz.Compile(authz.Config{
		Documents: []policy.Document{orders},
		Workload:  authz.Workload{TrustDomain: td, Account: account},
		Mesh:      policy.Mesh{TrustDomain: "example.org"},
	})
	fmt.Println("problems:", len(problems))

	// Once per connection, with the identity that mutual TLS has verified.
	conn := snapshot.Connect(authz.Peer{
		ID:              spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/frontend"),
		SourceIP:        netip.MustParseAddr("10.0.0.7"),
		DestinationPort: 8080,
	})
	for _, target := range []string{"/orders/7", "/orders/../admin"} {
		// Judge, and forward, the normalised path.
		path, err := authz.NormalizePath(policy.NormalizeBase, target)
		if err != nil {
			fmt.Println(err)
			continue
		}
		d := conn.Authorize(&authz.Request{Method: "GET", Host: "orders.shop", Path: path})
		fmt.Println(path, d.Allowed, d.Policy, d.Reason)
	}
	// Output:
	// problems: 0
	// /orders/7 true shop/orders allowed by rule
	// /admin false  no ALLOW rule matches
}
