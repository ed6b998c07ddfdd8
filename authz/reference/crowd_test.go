package reference_test

import (
	"fmt"
	"net/netip"
	"reflect"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// crowd is how many of each numbered word there are.
const crowd = 24

func numbered(t *rapid.T, format string) string {
	return fmt.Sprintf(format, rapid.IntRange(0, crowd-1).Draw(t, "number"))
}

// drawCrowd draws a policy of many rules that differ in a number, as a long list
// of grown policies does: what an index is for.
func drawCrowd(t *rapid.T) policy.Document {
	p := &policy.AuthorizationPolicy{Action: pick(t, "crowd action", []string{"ALLOW", "ALLOW", "DENY"})}
	for range rapid.IntRange(crowd, 3*crowd).Draw(t, "crowd rules") {
		var s policy.Source
		var o policy.Operation
		var r policy.Rule
		switch rapid.IntRange(0, 5).Draw(t, "crowd source") {
		case 0:
			s.Principals = []string{numbered(t, pick(t, "form", []string{"td1/ns/shop/sa/app-%d", "*/sa/app-%d", "cluster.local/ns/dev/sa/app-%d", "td1/ns/shop/sa/app-%d*"}))}
		case 1:
			s.ServiceAccounts = []string{numbered(t, pick(t, "form", []string{"dev/app-%d", "app-%d"}))}
		case 2:
			s.IPBlocks = []string{numbered(t, pick(t, "form", []string{"10.0.%d.0/24", "10.0.%d.7", "10.%d.0.0/16"}))}
		case 3:
			s.NotNamespaces = []string{pick(t, "ns", namespaceWords)}
		}
		switch rapid.IntRange(0, 5).Draw(t, "crowd operation") {
		case 0:
			o.Paths = []string{numbered(t, pick(t, "form", []string{"/item-%d", "/item-%d*", "*-%d", "/item-%d/{*}", "/{**}/item-%d"}))}
		case 1:
			o.Hosts = []string{numbered(t, pick(t, "form", []string{"svc-%d", "svc-%d*", "*.svc-%d", "SVC-%d"}))}
		case 2:
			o.Methods, o.NotPaths = []string{"GET"}, []string{numbered(t, "/item-%d")}
		case 3:
			r.When = []policy.Condition{{Key: "request.headers[x-item]", Values: []string{numbered(t, "%d")}, NotValues: []string{numbered(t, "%d")}}}
		}
		if !reflect.ValueOf(s).IsZero() {
			r.From = []policy.From{{Source: &s}}
		}
		if !reflect.ValueOf(o).IsZero() {
			r.To = []policy.To{{Operation: &o}}
		}
		if len(r.From)+len(r.To)+len(r.When) == 0 {
			r.To = []policy.To{{Operation: &policy.Operation{Ports: []string{"9090"}}}}
		}
		p.Rules = append(p.Rules, r)
	}
	return policy.Document{Kind: policy.KindAuthorization, Authorization: p, Metadata: policy.Metadata{Name: "crowd", Namespace: "shop"}}
}

// drawFromCrowd draws a peer and a request out of the numbered words.
func drawFromCrowd(t *rapid.T) (authz.Peer, *authz.Request) {
	td := spiffeid.RequireTrustDomainFromString(pick(t, "td", []string{"td1", "td2"}))
	peer := authz.Peer{
		ID:              spiffeid.RequireFromPath(td, "/ns/"+pick(t, "ns", []string{"shop", "dev"})+numbered(t, "/sa/app-%d")),
		SourceIP:        netip.MustParseAddr(numbered(t, "10.0.%d.7")),
		DestinationPort: 8080,
	}
	return peer, &authz.Request{
		Method: pick(t, "method", methodWords), Host: numbered(t, pick(t, "form", []string{"svc-%d", "a.svc-%d"})),
		Path:   numbered(t, pick(t, "form", []string{"/item-%d", "/item-%d/x", "/a/item-%d"})),
		Header: headers{"x-item": {numbered(t, "%d")}},
	}
}
