package authz_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
)

// oneOperation returns a policy of one rule about one operation.
func oneOperation(action string, o policy.Operation) policy.Document {
	return policy.Document{
		Kind: policy.KindAuthorization, Metadata: policy.Metadata{Namespace: "shop", Name: "large"},
		Authorization: &policy.AuthorizationPolicy{Action: action, Rules: []policy.Rule{{To: []policy.To{{Operation: &o}}}}},
	}
}

// several returns n values, each after a number.
func several(n int, format string) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf(format, i)
	}
	return out
}

func refusals(findings []authz.Finding) []authz.Finding {
	return slices.DeleteFunc(slices.Clone(findings), func(f authz.Finding) bool { return f.Severity != authz.SeverityError })
}

// TestErrorBehindWarnings: however much there is to warn of, an error is told, and
// what is told is bounded.
func TestErrorBehindWarnings(t *testing.T) {
	doc := oneOperation(policy.ActionAllow, policy.Operation{Methods: several(5000, "a%d"), Ports: append(several(150, "x%d"), "80")})
	for name, sets := range map[string][]map[uint16]string{
		"no ports":  nil,
		"all ports": {{80: "tcp"}, {80: "http"}, {81: "tcp", 80: "tcp"}},
	} {
		findings := authz.ValidateForAll(doc, policy.Mesh{}, sets)
		errors := refusals(findings)
		if len(findings) > 202 || len(errors) != 101 || errors[100].More != 50 || errors[100].Reason != "and 50 more errors" {
			t.Errorf("%s: %d findings, %d errors, the last %v", name, len(findings), len(errors), errors[len(errors)-1])
		}
		if last := findings[len(findings)-1]; last.More < 4900 || last.Severity != authz.SeverityWarning {
			t.Errorf("%s: the last is %v", name, last)
		}
	}
	doc = oneOperation(policy.ActionAllow, policy.Operation{Methods: several(5000, "a%d"), Paths: []string{"/a", "/{x"}})
	if errors := refusals(authz.Validate(doc, policy.Mesh{})); len(errors) != 1 || errors[0].Field != "spec.rules[0].to[0].operation.paths[1]" {
		t.Errorf("an error behind 5000 warnings: %v", errors)
	}
}

// TestManyValues: the values of a policy are bounded, in all its lists together.
func TestManyValues(t *testing.T) {
	const reason = "values: 200001 in all its lists together, at most 10000 are allowed"
	most := oneOperation(policy.ActionAllow, policy.Operation{Paths: several(9_999, "/%d"), Ports: []string{"80"}})
	if errors := refusals(authz.Validate(most, policy.Mesh{})); len(errors) != 0 {
		t.Errorf("the most that are allowed: %v", errors)
	}
	beyond := oneOperation(policy.ActionAllow, policy.Operation{Ports: []string{"80"}, Methods: several(200_000, "a%d")})
	findings := authz.Validate(beyond, policy.Mesh{})
	if len(findings) != 1 || findings[0].Field != "spec.rules[0].to[0].operation.methods" || !strings.Contains(findings[0].Reason, reason) {
		t.Errorf("beyond: %v", findings)
	}
	token := policy.Document{Kind: policy.KindRequestAuthentication, Metadata: beyond.Metadata, RequestAuthentication: &policy.RequestAuthentication{
		JWTRules: []policy.JWTRule{{Issuer: "https://i", Audiences: several(200_000, "a%d"), FromParams: []string{"t"}}}}}
	findings = authz.Validate(token, policy.Mesh{})
	if len(findings) != 1 || findings[0].Field != "spec.jwtRules[0].audiences" || !strings.Contains(findings[0].Reason, reason) {
		t.Errorf("audiences beyond: %v", findings)
	}
	labels := oneOperation(policy.ActionAllow, policy.Operation{Ports: []string{"80"}})
	labels.Authorization.Selector = &policy.Selector{MatchLabels: map[string]string{}}
	for i := range 257 {
		labels.Authorization.Selector.MatchLabels[fmt.Sprint("l", i)] = "*"
	}
	findings = authz.Validate(labels, policy.Mesh{})
	if len(findings) != 1 || findings[0].String() != "error: spec.selector.matchLabels: 257 labels, at most 256 are allowed" {
		t.Errorf("labels beyond: %v", findings)
	}
}

func TestLongValues(t *testing.T) {
	long := strings.Repeat("x", 4097)
	doc := oneOperation(policy.ActionDeny, policy.Operation{Hosts: []string{long[:4096], long}, Ports: []string{"80"}})
	doc.Authorization.Rules[0].When = []policy.Condition{{Key: "request.headers[" + long + "]", Values: []string{"a"}}}
	var fields []string
	for _, f := range refusals(authz.Validate(doc, policy.Mesh{})) {
		if !strings.HasSuffix(f.Reason, "at most 4096 are allowed") {
			t.Error(f)
		}
		fields = append(fields, f.Field)
	}
	if got := strings.Join(fields, " "); got != "spec.rules[0].to[0].operation.hosts[1] spec.rules[0].when[0].key" {
		t.Errorf("refused: %s", got)
	}
}

// What comes past admission with too many values fails closed.
func TestCompileManyValues(t *testing.T) {
	account, err := identity.NewAccount("shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	values := append(several(10_000, "/%d"), "/open")
	for action, doc := range map[string]policy.Document{
		policy.ActionAllow: oneOperation(policy.ActionAllow, policy.Operation{Paths: values}),
		policy.ActionDeny:  oneOperation(policy.ActionDeny, policy.Operation{NotPaths: values}),
	} {
		s, problems := authz.Compile(authz.Config{Documents: []policy.Document{doc}, Workload: authz.Workload{Account: account}})
		if len(problems) != 1 || !strings.Contains(problems[0].Reason, "10001 in all its lists together") {
			t.Errorf("%s: %v", action, problems)
		}
		if d := s.Connect(authz.Peer{}).Authorize(&authz.Request{Method: "GET", Path: "/open"}); d.Allowed {
			t.Errorf("%s allows: %+v", action, d)
		}
	}
	doc := oneOperation(policy.ActionDeny, policy.Operation{Paths: []string{strings.Repeat("x", 4097)}, Methods: []string{"GET"}})
	s, problems := authz.Compile(authz.Config{Documents: []policy.Document{doc}, Workload: authz.Workload{Account: account}})
	if d := s.Connect(authz.Peer{}).Authorize(&authz.Request{Method: "GET", Path: "/open"}); d.Allowed || len(problems) != 1 {
		t.Errorf("a long value: %+v %v", d, problems)
	}
}

// allocated is how many bytes f asks for in all, which tells what it costs on any machine.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestPathsOfDecode: values that stand deep below long names do not cost as much
// as the names each.
func TestPathsOfDecode(t *testing.T) {
	name := strings.Repeat(`\u0001`, 110)
	object := strings.Repeat(`{"`+name+`":`, 60) + "[" + strings.Repeat("1,", 400_000) + "1]" + strings.Repeat("}", 60)
	var err error
	bytes := allocated(func() { _, err = authz.Decode([]byte(`{"status":` + object + `}`)) })
	if err == nil || strings.Contains(err.Error(), "JSON") || bytes > 2<<30 {
		t.Errorf("%d MiB, %v", bytes>>20, err)
	}
}

// TestCompileLargest: what is costly to index is indexed less, and decided all the same.
func TestCompileLargest(t *testing.T) {
	account, err := identity.NewAccount("shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	// Pairs of sources and operations with n values each, that share them or not.
	pairs := func(sides, n int, format string) policy.Rule {
		var r policy.Rule
		for i := range sides {
			f := strings.ReplaceAll(format, "I", fmt.Sprint(i))
			r.From = append(r.From, policy.From{Source: &policy.Source{Namespaces: several(n, "ns"+f), NotPrincipals: []string{fmt.Sprint(i)}}})
			r.To = append(r.To, policy.To{Operation: &policy.Operation{Paths: several(n, "/p"+f), NotPorts: []string{fmt.Sprint(i + 1)}}})
		}
		return r
	}
	conditions := pairs(128, 1, "%d")
	for i := range 500 {
		conditions.When = append(conditions.When, policy.Condition{Key: fmt.Sprintf("request.headers[x-%d]", i), Values: []string{"a"}})
	}
	peer := authz.Peer{ID: spiffeid.RequireFromString("spiffe://cluster.local/ns/ns0/sa/a"), SourceIP: netip.MustParseAddr("192.0.2.1"), DestinationPort: 80}
	for name, row := range map[string]struct {
		rule policy.Rule
		path string
	}{
		"different values": {pairs(100, 49, "I-%d"), "/p7-3"},
		"the same values":  {pairs(128, 37, "%d"), "/p3"},
		"many conditions":  {conditions, "/p0"},
	} {
		doc := oneOperation(policy.ActionDeny, policy.Operation{})
		doc.Authorization.Rules = []policy.Rule{row.rule}
		if errors := refusals(authz.Validate(doc, policy.Mesh{})); len(errors) != 0 {
			t.Errorf("%s: %v", name, errors)
		}
		var s *authz.Snapshot
		if bytes := allocated(func() {
			s, _ = authz.Compile(authz.Config{Documents: []policy.Document{doc}, Workload: authz.Workload{Account: account}})
		}); bytes > 1<<30 {
			t.Errorf("%s: compiled with %d MiB", name, bytes>>20)
		}
		for _, ns := range []string{"ns0", "ns0-5", "other"} {
			peer.ID = spiffeid.RequireFromString("spiffe://cluster.local/ns/" + ns + "/sa/a")
			c := s.Connect(peer)
			for _, path := range []string{row.path, "/none"} {
				r := &authz.Request{Method: "GET", Path: path, Header: everyHeader{}}
				if got, want := c.Authorize(r), c.AuthorizeByScan(r); got != want {
					t.Errorf("%s: %s %s: %+v, by scan %+v", name, ns, path, got, want)
				}
			}
		}
	}
}

// everyHeader has every header, of value "a".
type everyHeader struct{}

func (everyHeader) Values(string) []string { return []string{"a"} }
