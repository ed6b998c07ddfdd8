package authz_test

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
)

func workload(tb testing.TB) authz.Workload {
	tb.Helper()
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		tb.Fatal(err)
	}
	return authz.Workload{
		TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
		Account:     account,
		Labels:      map[string]string{"app": "orders"},
	}
}

func document(name string, spec policy.AuthorizationPolicy) policy.Document {
	return policy.Document{
		Kind:          policy.KindAuthorization,
		Metadata:      policy.Metadata{Namespace: "shop", Name: name},
		Authorization: &spec,
	}
}
