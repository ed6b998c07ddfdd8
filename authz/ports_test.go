package authz_test

import (
	"slices"
	"testing"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// What is warned of on TCP is warned of once, and only where a TCP port is known or
// nothing is.
func TestValidateForAll(t *testing.T) {
	doc := policy.Document{
		Kind:     policy.KindAuthorization,
		Metadata: policy.Metadata{Namespace: "shop", Name: "deny"},
		Authorization: &policy.AuthorizationPolicy{Action: policy.ActionDeny,
			Rules: []policy.Rule{{To: []policy.To{{Operation: &policy.Operation{Methods: []string{"POST"}}}}}}},
	}
	http, tcp, silent := map[uint16]string{80: "http"}, map[uint16]string{3306: "tcp"}, map[uint16]string{80: ""}
	var many []map[uint16]string
	for port := range uint16(9) {
		many = append(many, map[uint16]string{port + 1: "http"})
	}
	for name, row := range map[string]struct {
		ports  []map[uint16]string
		warned int
	}{
		"nobody selected":  {nil, 1},
		"http":             {[]map[uint16]string{http}, 0},
		"tcp":              {[]map[uint16]string{tcp}, 1},
		"both":             {[]map[uint16]string{http, tcp}, 1},
		"tcp twice":        {[]map[uint16]string{tcp, {5432: "tcp"}}, 1},
		"one says less":    {[]map[uint16]string{http, silent}, 1},
		"one says nothing": {[]map[uint16]string{http, {}}, 1},
		"too many":         {many, 1},
	} {
		got := authz.ValidateForAll(doc, policy.Mesh{}, row.ports)
		got = slices.DeleteFunc(got, func(f authz.Finding) bool { return f.Field != "spec.rules[0].to[0].operation.methods" })
		if len(got) != row.warned {
			t.Errorf("%s: %v", name, got)
		}
	}
}
