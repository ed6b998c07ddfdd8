package identity_test

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
)

func Example() {
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		panic(err)
	}
	account, err := identity.ParseAccount("shop/orders")
	if err != nil {
		panic(err)
	}
	w, err := identity.New(td, account)
	if err != nil {
		panic(err)
	}
	fmt.Println(w)
	fmt.Println(w.Principal())
	// Output:
	// spiffe://cluster.local/ns/shop/sa/orders
	// cluster.local/ns/shop/sa/orders
}

// A peer whose ID has another shape is known by its ID only: it has no
// namespace and no account that a policy could name.
func ExampleFromID() {
	_, err := identity.FromID(spiffeid.RequireFromString("spiffe://cluster.local/vm/7"))
	fmt.Println(err)
	// Output:
	// identity: "spiffe://cluster.local/vm/7" is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT
}
