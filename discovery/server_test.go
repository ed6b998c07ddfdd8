package discovery_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/discovery"
)

func TestEachNodeGetsItsOwn(t *testing.T) {
	s := start(t, map[string]string{
		"a.yaml": allow("orders", "orders", "frontend") + "---" + allow("payments", "payments", "frontend"),
		"b.yaml": strings.ReplaceAll(allow("mesh", "orders", "frontend"), "namespace: shop", "namespace: castellan-system"),
	})
	one, two, three := s.follow(s.agent("one")), s.follow(s.agent("two")), s.follow(s.agent("three"))
	for _, c := range []struct {
		f    *follower
		pods []string
	}{{one, []string{"pod-orders"}}, {two, []string{"pod-intruder", "pod-payments"}}, {three, nil}} {
		if got := c.f.names(castellanv1.TypeWorkloadPolicy); !slices.Equal(got, c.pods) {
			t.Errorf("a node follows %q, want %q", got, c.pods)
		}
		for _, shared := range []struct{ url, want string }{
			{castellanv1.TypeServiceIdentity, "shop/orders"}, {castellanv1.TypeBundle, "cluster.local"}, {castellanv1.TypeDenylist, "default"},
		} {
			if got := c.f.names(shared.url); !slices.Equal(got, []string{shared.want}) {
				t.Errorf("%s: %q", shared.url, got)
			}
		}
	}
	s.told(one, "pod-orders", "mesh=frontend orders=frontend")
	s.told(two, "pod-payments", "payments=frontend")
	s.told(two, "pod-intruder", "")
	var p castellanv1.WorkloadPolicy
	one.get("pod-orders", &p)
	if p.GetNamespace() != "shop" || p.GetServiceAccount() != "orders" || p.GetTrustDomain() != "cluster.local" || p.GetLabels()["app"] != "orders" ||
		!strings.Contains(string(p.GetMesh()), `"rootNamespace":"castellan-system"`) {
		t.Errorf("got %v", &p)
	}
	if got := fmt.Sprint(p.GetPorts()); !strings.Contains(got, "8080") || !strings.Contains(got, "http") {
		t.Errorf("ports %s", got)
	}
}

// TestChangeIsPushed: what is changed, added and removed arrives, and what is not
// touched keeps its version.
func TestChangeIsPushed(t *testing.T) {
	s := start(t, map[string]string{"orders.yaml": allow("orders", "orders", "frontend"), "payments.yaml": allow("payments", "payments", "frontend")})
	one, two := s.follow(s.agent("one")), s.follow(s.agent("two"))
	s.told(one, "pod-orders", "orders=frontend")
	s.told(two, "pod-payments", "payments=frontend")
	before, _ := two.get("pod-payments", &castellanv1.WorkloadPolicy{})
	began := time.Now()
	s.write("orders.yaml", allow("orders", "orders", "payments"))
	s.told(one, "pod-orders", "orders=payments")
	t.Logf("changed and pushed in %v", time.Since(began))
	s.write("more.yaml", allow("more", "orders", "billing"))
	s.told(one, "pod-orders", "more=billing orders=payments")
	began = time.Now()
	if err := os.Remove(s.path("more.yaml")); err != nil {
		t.Fatal(err)
	}
	s.told(one, "pod-orders", "orders=payments")
	t.Logf("removed and pushed in %v", time.Since(began))
	if after, _ := two.get("pod-payments", &castellanv1.WorkloadPolicy{}); after != before {
		t.Error("an untouched workload got another version")
	}
}

// TestVersionIsContent: the same content has the same version after a restart,
// whatever the file looks like.
func TestVersionIsContent(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	before, ok := one.get("pod-orders", &castellanv1.WorkloadPolicy{})
	s.stop()
	s.write("a.yaml", "# a comment\n---\n"+allow("orders", "orders", "frontend"))
	s.start()
	again := s.follow(s.agent("one"))
	if after, _ := again.get("pod-orders", &castellanv1.WorkloadPolicy{}); !ok || after != before {
		t.Errorf("version %q, after a restart %q", before, after)
	}
}

func TestWorkloadGoes(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	two := s.follow(s.agent("two"))
	var kept []string
	for _, line := range strings.SplitAfter(inventory, "\n") {
		if !strings.Contains(line, "pod-payments,") {
			kept = append(kept, line)
		}
	}
	s.replace(s.workloads, strings.Join(kept, ""))
	s.eventually("removal", func() bool {
		return slices.Equal(two.names(castellanv1.TypeWorkloadPolicy), []string{"pod-intruder"})
	})
}

func testServiceIdentity(t *testing.T) {
	s := prepare(t, nil)
	s.mesh.TrustDomainAliases = []string{"old.test"}
	s.replace(s.workloads, strings.Replace(inventory, "endpoints: [{workload: pod-orders, ports: {80: 41234}}]",
		"endpoints: [{workload: pod-orders, ports: {80: 41234}}, {workload: pod-payments}], subjectAltNames: [spiffe://elsewhere.test/x]", 1))
	s.start()
	f := s.follow(s.agent("three"))
	var si castellanv1.ServiceIdentity
	if _, ok := f.get("shop/orders", &si); !ok {
		t.Fatal("no such service")
	}
	want := []string{"spiffe://cluster.local/ns/shop/sa/orders", "spiffe://cluster.local/ns/shop/sa/payments", "spiffe://elsewhere.test/x",
		"spiffe://old.test/ns/shop/sa/orders", "spiffe://old.test/ns/shop/sa/payments"}
	if !slices.Equal(si.GetExpectedIds(), want) {
		t.Errorf("expected IDs %q, want %q", si.GetExpectedIds(), want)
	}
	e := si.GetEndpoints()
	if len(e) != 2 || e[0].GetAddress() != "127.0.0.1" || e[0].GetPorts()[80] != 41234 || e[0].GetSpiffeId() != want[0] || e[1].GetPorts()[80] != 80 {
		t.Errorf("endpoints %v", e)
	}
	if !slices.Equal(si.GetHosts(), []string{"orders", "orders.shop"}) || si.GetPorts()[0].GetNumber() != 80 || si.GetPorts()[0].GetProtocol() != "http" {
		t.Errorf("got %v", &si)
	}
}

func testKeySets(t *testing.T) {
	const keys = `{"keys":[{"kty":"EC","crv":"P-256","kid":"k","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}`
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, keys) }))
	defer issuer.Close()
	ra := func(uri string) string {
		return fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {namespace: shop, name: jwt}
spec: {jwtRules: [{issuer: "https://issuer.test", jwksUri: %q}]}
`, uri)
	}
	s := start(t, map[string]string{"jwt.yaml": ra(issuer.URL)})
	f := s.follow(s.agent("three"))
	var got castellanv1.Jwks
	s.eventually("key set", func() bool {
		f.get("jwks:"+issuer.URL, &got)
		return string(got.GetJwks()) == keys && got.GetError() == ""
	})
	// One that may not be fetched is published empty: its tokens are refused.
	s.write("jwt.yaml", ra("http://169.254.169.254/keys"))
	s.eventually("empty key set", func() bool {
		return slices.Equal(f.names(castellanv1.TypeJwks), []string{"jwks:http://169.254.169.254/keys"})
	})
	s.eventually("reason", func() bool {
		f.get("jwks:http://169.254.169.254/keys", &got)
		return len(got.GetJwks()) == 0 && got.GetError() != ""
	})
	if err := os.Remove(s.path("jwt.yaml")); err != nil {
		t.Fatal(err)
	}
	s.eventually("no key set", func() bool { return len(f.names(castellanv1.TypeJwks)) == 0 })
}

func TestWhoMayFollow(t *testing.T) {
	s := start(t, nil)
	workload := s.certificate("shop", "orders")
	unknown := s.certificate("castellan-system", "castellan-agent")
	for name, c := range map[string]struct {
		cert   *tls.Certificate
		ledger error
		want   codes.Code
		text   string
	}{
		"nobody":                {nil, nil, codes.Unauthenticated, "a client certificate is needed"},
		"a workload":            {workload, nil, codes.PermissionDenied, "not an agent of this mesh"},
		"an unknown serial":     {unknown, nil, codes.PermissionDenied, "not an agent of this mesh"},
		"while ledger is away":  {s.agent("one"), errors.New("disk on fire"), codes.Unavailable, "try again later"},
		"an agent of no node":   {s.agent(""), nil, codes.PermissionDenied, "not an agent of this mesh"},
		"the server's identity": {s.certificate("castellan-system", "castellan-server"), nil, codes.PermissionDenied, "not an agent of this mesh"},
	} {
		t.Run(name, func(t *testing.T) {
			s.ledger = c.ledger
			defer func() { s.ledger = nil }()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			conn := s.dial(c.cert)
			_, err := castellanv1.NewNodeClient(conn).Report(ctx, &castellanv1.ReportRequest{Node: "one"})
			if got := status.Convert(err); got.Code() != c.want || got.Message() != c.text {
				t.Errorf("Report: %v", err)
			}
			stream, err := newADS(conn).DeltaAggregatedResources(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = stream.Recv(); status.Code(err) != c.want {
				t.Errorf("DeltaAggregatedResources: %v", err)
			}
			all, err := newADS(conn).StreamAggregatedResources(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = all.Recv(); status.Code(err) != codes.Unimplemented {
				t.Errorf("StreamAggregatedResources: %v", err)
			}
		})
	}
	if s.log.count("disk on fire") == 0 {
		t.Error("the cause is not in the log")
	}
}

// TestProgrammed: a document counts as programmed once the proxy has acknowledged
// the version that holds it.
func TestProgrammed(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	cert := s.agent("one")
	one := s.follow(cert)
	node := castellanv1.NewNodeClient(s.dial(cert))
	report := func(acked, nacked, reason string) {
		t.Helper()
		_, err := node.Report(t.Context(), &castellanv1.ReportRequest{Node: "one", Workloads: []*castellanv1.WorkloadReport{
			{PodUid: "pod-orders", Namespace: "shop", ServiceAccount: "orders", Serial: "abc", Streams: []*castellanv1.StreamReport{
				{Client: "sds", Resources: []*castellanv1.ResourceReport{{TypeUrl: "secret", Name: "default", Acked: "1"}}},
				{Client: "proxy", Resources: []*castellanv1.ResourceReport{{TypeUrl: castellanv1.TypeWorkloadPolicy, Name: "pod-orders", Acked: acked, Nacked: nacked, Reason: reason}}},
			}},
			{PodUid: "pod-payments", Namespace: "shop", ServiceAccount: "payments"}, // not of this node
		}})
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(want uint32) {
		t.Helper()
		if p := s.policies().GetPolicies()[0]; p.GetSelected() != 1 || p.GetProgrammed() != want {
			t.Errorf("selected %d, programmed %d, want 1 and %d", p.GetSelected(), p.GetProgrammed(), want)
		}
	}
	check(0)
	version, _ := one.get("pod-orders", &castellanv1.WorkloadPolicy{})
	report("", version, "does not compile")
	check(0)
	report(version, "", "")
	check(1)
	w := s.policies().GetWorkloads()
	if w[0].GetReport().GetSerial() != "abc" || w[0].GetVersion() != version {
		t.Errorf("got %v", w[0])
	}
	if w[1].GetReport() != nil {
		t.Error("an agent spoke for another node's pod")
	}
	s.write("a.yaml", allow("orders", "orders", "payments"))
	s.told(one, "pod-orders", "orders=payments")
	s.eventually("the old acknowledgement not to count", func() bool { return s.policies().GetPolicies()[0].GetProgrammed() == 0 })
	version, _ = one.get("pod-orders", &castellanv1.WorkloadPolicy{})
	report(version, "", "")
	check(1)
}

func TestReportIsBounded(t *testing.T) {
	s := start(t, nil)
	node := castellanv1.NewNodeClient(s.dial(s.agent("one")))
	long := strings.Repeat("x", 3000)
	resources := func(r ...*castellanv1.ResourceReport) []*castellanv1.StreamReport {
		return []*castellanv1.StreamReport{{Resources: r}}
	}
	for name, c := range map[string]struct {
		req  *castellanv1.ReportRequest
		want string
	}{
		"another node": {&castellanv1.ReportRequest{Node: "two"}, "an agent reports its own node only"},
		"workloads":    {&castellanv1.ReportRequest{Node: "one", Workloads: make2[castellanv1.WorkloadReport](2001)}, "report holds too many or too long workloads"},
		"streams":      {&castellanv1.ReportRequest{Node: "one", Workloads: []*castellanv1.WorkloadReport{{Streams: make2[castellanv1.StreamReport](65)}}}, "report holds too many or too long streams"},
		"resources":    {&castellanv1.ReportRequest{Node: "one", Workloads: []*castellanv1.WorkloadReport{{Streams: resources(make2[castellanv1.ResourceReport](10_001)...)}}}, "report holds too many or too long resources"},
		"texts":        {&castellanv1.ReportRequest{Node: "one", Workloads: []*castellanv1.WorkloadReport{{Streams: resources(&castellanv1.ResourceReport{Reason: long})}}}, "report holds too many or too long texts"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := node.Report(t.Context(), c.req)
			if got := status.Convert(err).Message(); got != c.want {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

func make2[T any](n int) []*T {
	out := make([]*T, n)
	for i := range out {
		out[i] = new(T)
	}
	return out
}

// testRefused: authz-21 and what discovery promises: last good, else deny, with
// the file, the field, the value and the reason for whoever asks.
func testRefused(t *testing.T) {
	s := start(t, map[string]string{"orders.yaml": allow("orders", "orders", "frontend")})
	one, two := s.follow(s.agent("one")), s.follow(s.agent("two"))
	s.told(one, "pod-orders", "orders=frontend")

	s.write("orders.yaml", broken("orders", "orders"))
	s.become("orders.yaml shop/orders last-good 1 spec.rules[0].from[0].source.prinzipals")
	s.told(one, "pod-orders", "orders=frontend")
	if got := s.denied(); len(got) > 0 {
		t.Errorf("%q deny everything", got)
	}

	s.write("payments.yaml", broken("payments", "payments"))
	s.become("orders.yaml shop/orders last-good 1 spec.rules[0].from[0].source.prinzipals",
		"payments.yaml shop/payments refused 1 spec.rules[0].from[0].source.prinzipals")
	s.told(two, "pod-payments", "deny")
	s.told(two, "pod-intruder", "")
	s.told(one, "pod-orders", "orders=frontend")
	p := s.policies()
	f := p.GetPolicies()[1].GetFindings()[0]
	if p.GetPolicies()[1].GetFile() != s.path("payments.yaml") || f.GetReason() == "" {
		t.Errorf("got %v", p.GetPolicies()[1])
	}
	for _, w := range p.GetWorkloads() {
		if w.GetPodUid() == "pod-payments" && !strings.Contains(w.GetDenyReason(), "payments.yaml:2: AuthorizationPolicy shop/payments was refused and has no last good version: spec.rules[0].from[0].source.prinzipals: ") {
			t.Errorf("deny reason %q", w.GetDenyReason())
		}
	}
	s.write("unrelated.yaml", allow("more", "orders", "billing"))
	s.told(one, "pod-orders", "more=billing orders=frontend")
	if got := s.log.count(`"policy":"AuthorizationPolicy shop/payments"`); got != 1 {
		t.Errorf("the refusal was logged %d times", got)
	}

	s.write("payments.yaml", allow("payments", "payments", "frontend"))
	s.told(two, "pod-payments", "payments=frontend")
	s.write("orders.yaml", allow("orders", "orders", "billing"))
	s.told(one, "pod-orders", "more=billing orders=billing")
}

// TestLastGoodOutlivesRestart: and so does that there is none.
func TestLastGoodOutlivesRestart(t *testing.T) {
	s := start(t, map[string]string{"orders.yaml": allow("orders", "orders", "frontend"), "garbage.yaml": allow("other", "payments", "frontend")})
	s.become("garbage.yaml shop/other accepted 1", "orders.yaml shop/orders accepted 1")
	s.eventually("last good on disk", func() bool { return len(s.kept()) == 2 })
	s.stop()
	s.write("orders.yaml", broken("orders", "orders"))
	s.write("garbage.yaml", "}{ no YAML")
	for range 2 { // twice: the last good is kept by a server that never saw it good
		s.start()
		s.become("garbage.yaml / last-good 0 line 1", "orders.yaml shop/orders last-good 1 spec.rules[0].from[0].source.prinzipals", "garbage.yaml shop/other last-good 1 file")
		one, two := s.follow(s.agent("one")), s.follow(s.agent("two"))
		s.told(one, "pod-orders", "orders=frontend")
		s.told(two, "pod-payments", "other=frontend")
		s.stop()
	}
	for _, file := range s.kept() { // half-written or damaged
		if err := os.WriteFile(file, []byte(`{"file":"x","object":`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.start()
	if got := s.denied(); !slices.Equal(got, []string{"pod-orders", "pod-payments", "pod-intruder"}) {
		t.Errorf("%q deny everything", got)
	}
	if got := s.log.count("last good policy cannot be used"); got != 2 {
		t.Errorf("%d damaged files were logged", got)
	}
	// Removed while the server is away, a document is gone, last good or not.
	s.write("garbage.yaml", allow("other", "payments", "frontend"))
	s.write("orders.yaml", allow("orders", "orders", "frontend"))
	s.become("garbage.yaml shop/other accepted 1", "orders.yaml shop/orders accepted 1")
	s.stop()
	if err := os.Remove(s.path("garbage.yaml")); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.become("orders.yaml shop/orders accepted 1")
	s.eventually("one file", func() bool { return len(s.kept()) == 1 })
}

func (s *setup) kept() []string {
	files, err := filepath.Glob(filepath.Join(s.good, "*.json"))
	if err != nil {
		s.t.Fatal(err)
	}
	return files
}

// TestDiskFull: what cannot be kept on disk is in force all the same.
func TestDiskFull(t *testing.T) {
	s := start(t, map[string]string{"orders.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	// What was in force from the start may be written down just now.
	s.eventually("removal", func() bool { return os.RemoveAll(s.good) == nil })
	if err := os.WriteFile(s.good, nil, 0o600); err != nil { // where the directory was
		t.Fatal(err)
	}
	s.write("orders.yaml", allow("orders", "orders", "billing"))
	s.told(one, "pod-orders", "orders=billing")
	s.write("orders.yaml", broken("orders", "orders"))
	s.become("orders.yaml shop/orders last-good 1 spec.rules[0].from[0].source.prinzipals")
	s.told(one, "pod-orders", "orders=billing")
	if s.log.count("last good policy cannot be kept on disk") == 0 {
		t.Error("nothing in the log")
	}
}

// testWhoARefusedDocumentDenies: as widely as it can be meant.
func testWhoARefusedDocumentDenies(t *testing.T) {
	all := []string{"pod-orders", "pod-payments", "pod-intruder"}
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"by its labels":               {broken("x", "payments"), []string{"pod-payments"}},
		"its namespace":               {strings.Replace(broken("x", "payments"), "  selector: {matchLabels: {app: payments}}\n", "", 1), all[:2]},
		"selector not understood":     {strings.Replace(broken("x", "payments"), "matchLabels", "matchLabel", 1), all[:2]},
		"selector and more":           {strings.Replace(broken("x", "payments"), "{matchLabels", "{matchExpressions: [], matchLabels", 1), all[:2]},
		"root namespace by label":     {strings.Replace(broken("x", "payments"), "namespace: shop", "namespace: castellan-system", 1), []string{"pod-payments"}},
		"root namespace":              {"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: castellan-system, name: x}\nspec: {action: DENI}", all},
		"no namespace":                {strings.Replace(allow("x", "payments", "frontend"), "namespace: shop, ", "", 1), []string{"pod-payments"}},
		"no namespace, no labels":     {"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x}\nspec: {action: DENY, rules: [{}]}", all},
		"another kind":                {"apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\nmetadata: {namespace: shop, name: x}\nspec: {}", all[:2]},
		"no YAML":                     {"a: b: c", all},
		"a half document":             {allow("x", "payments", "frontend") + "---\nkind: [", all},
		"a key twice":                 {allow("x", "payments", "frontend") + "kind: AuthorizationPolicy\n", all},
		"a list with a bad item":      {"apiVersion: v1\nkind: List\nitems: [{kind: X, metadata: {namespace: guest, name: x}}]", all[2:]},
		"a list of nothing":           {"apiVersion: v1\nkind: List\nitems:\n", all},
		"a ConfigMap":                 {"apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: shop, name: x}\ndata: {a: b}", []string{}},
		"a kustomization":             {"apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [a.yaml]", []string{}},
		"an Istio object of ours not": {"apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {namespace: shop, name: x}\nspec: {}", []string{}},
		"our kind, another group":     {"apiVersion: security.istio.oi/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: shop, name: x}\nspec: {}", all[:2]},
		"another version":             {"apiVersion: security.istio.io/v7\nkind: Policy\nmetadata: {namespace: shop, name: x}\nspec: {}", all[:2]},
		"a strange version":           {"apiVersion: securityistioio\nkind: Policy\nmetadata: {namespace: shop, name: x}\nspec: {}", all[:2]},
		"no kind":                     {"apiVersion: v1\nmetadata: {namespace: shop, name: x}", all[:2]},
		"invalid value":               {strings.Replace(allow("x", "payments", "frontend"), "spec:", "spec:\n  action: DENI", 1), []string{"pod-payments"}},
		"nothing":                     {"# a comment\n---\n---\n", []string{}},
		"a value the engine lacks":    {strings.Replace(allow("x", "payments", "frontend"), "  rules:\n  - from", "  rules:\n  - when: [{key: no.such, values: [x]}]\n    from", 1), []string{"pod-payments"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, map[string]string{"x.yaml": c.text})
			if got := s.denied(); !slices.Equal(got, c.want) {
				t.Errorf("%q deny everything, want %q; %q", got, c.want, s.describe())
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := discovery.NewDirectory(discovery.DirectoryConfig{}); err == nil || err.Error() != "discovery: no policy directory named" {
		t.Errorf("got %v", err)
	}
	if _, err := discovery.NewDirectory(discovery.DirectoryConfig{Path: file}); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("got %v", err)
	}
	if _, err := discovery.New(discovery.Config{}); err == nil || err.Error() != "discovery: no trust domain" {
		t.Errorf("got %v", err)
	}
}
