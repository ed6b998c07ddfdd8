package webhook_test

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/internal/workloads"
	"castellan.dev/webhook"
)

// policyObject is one as the API server stores it.
func policyObject(t testing.TB, kind, spec string, metadata map[string]any) []byte {
	t.Helper()
	var s any
	if err := yaml.Unmarshal([]byte(spec), &s); err != nil {
		t.Fatal(err)
	}
	meta := map[string]any{"name": "p", "namespace": "shop", "managedFields": []any{}, "generation": 1}
	for k, v := range metadata {
		meta[k] = v
	}
	object := map[string]any{"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": meta, "status": map[string]any{}}
	if s != nil {
		object["spec"] = s
	}
	data, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func policyRequest(t testing.TB, kind, spec string) *admissionv1.AdmissionRequest {
	return &admissionv1.AdmissionRequest{
		Kind: metav1.GroupVersionKind{Group: "security.istio.io", Version: "v1", Kind: kind}, Operation: admissionv1.Create,
		Namespace: "shop", Name: "p", Object: runtime.RawExtension{Raw: policyObject(t, kind, spec, nil)},
	}
}

// still is an inventory that does not change.
type still struct{ file *workloads.File }

func (s still) Current() *workloads.File { return s.file }

func inventory() *workloads.File {
	return &workloads.File{
		Workloads: []workloads.Workload{
			{Namespace: "shop", ServiceAccount: "a", PodUID: "1", Labels: map[string]string{"app": "orders"}, Ports: []workloads.Port{{Number: 8080, Protocol: "http"}}},
			{Namespace: "shop", ServiceAccount: "a", PodUID: "2", Labels: map[string]string{"app": "db"}},
			{Namespace: "shop", ServiceAccount: "a", PodUID: "3", Labels: map[string]string{"app": "old"}, OutsideMesh: true},
			{Namespace: "other", ServiceAccount: "a", PodUID: "4", Labels: map[string]string{"app": "there"}},
		},
		Services: []workloads.Service{{Namespace: "shop", Name: "db", Ports: []workloads.ServicePort{{Number: 5432, Protocol: "tcp"}},
			Endpoints: []workloads.Endpoint{{Workload: "2"}}}},
	}
}

func TestValidate(t *testing.T) {
	r := start(t, func(c *webhook.Config) { c.Workloads = still{inventory()} })
	rows := map[string]struct {
		kind, spec string
		refused    string
		warnings   []string
	}{
		"good": {"AuthorizationPolicy", `{selector: {matchLabels: {app: orders}}, rules: [{from: [{source: {namespaces: [web]}}]}]}`, "", nil},
		"unknown key": {"AuthorizationPolicy", `{rules: [{when: [{key: request.speed, values: [a]}]}]}`,
			`spec.rules[0].when[0].key: "request.speed"`, nil},
		"unknown field": {"AuthorizationPolicy", `{ruls: []}`, "spec.ruls: unknown field", nil},
		"action":        {"AuthorizationPolicy", `{action: PERMIT, rules: [{}]}`, `spec.action: "PERMIT"`, nil},
		"deny nothing":  {"AuthorizationPolicy", `{action: DENY}`, "spec.rules: a DENY policy without rules never denies", nil},
		"many errors": {"AuthorizationPolicy", `{rules: [{from: [{source: {ipBlocks: [a, b, c, d, e, f, g]}}]}]}`,
			"; and 2 more", nil},
		"allow without rules": {"AuthorizationPolicy", `{}`, "",
			[]string{"spec.rules: an ALLOW policy without rules denies every request; add the rule {} if all are to be allowed"}},
		"no workload": {"AuthorizationPolicy", `{selector: {matchLabels: {app: there}}, rules: [{from: [{source: {namespaces: [web]}}]}]}`, "",
			[]string{"spec.selector: selects no workload that there is now"}},
		"none inside": {"AuthorizationPolicy", `{selector: {matchLabels: {app: old}}, rules: [{from: [{source: {namespaces: [web]}}]}]}`, "",
			[]string{"spec.selector: selects only pods without a sidecar, where nothing enforces it"}},
		"HTTP on HTTP": {"AuthorizationPolicy", `{action: DENY, selector: {matchLabels: {app: orders}}, rules: [{to: [{operation: {methods: [GET]}}]}]}`, "", nil},
		"HTTP on TCP": {"AuthorizationPolicy", `{action: DENY, selector: {matchLabels: {app: db}}, rules: [{to: [{operation: {methods: [GET]}}]}]}`, "",
			[]string{"spec.rules[0].to[0].operation.methods: HTTP only: on a TCP port this field is dropped and the rule applies to all that the rest of it matches"}},
		"allow HTTP on TCP": {"AuthorizationPolicy", `{selector: {matchLabels: {app: db}}, rules: [{to: [{operation: {methods: [GET]}}]}]}`, "",
			[]string{"spec.rules[0].to[0].operation.methods: HTTP only: on a TCP port this whole rule never allows"}},
		"HTTP somewhere": {"AuthorizationPolicy", `{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}`, "",
			[]string{"spec.rules[0].to[0].operation.methods: HTTP only: on a TCP port this field is dropped and the rule applies to all that the rest of it matches"}},
		"jwt":       {"RequestAuthentication", `{selector: {matchLabels: {app: orders}}, jwtRules: [{issuer: "https://i", audiences: [a], jwksUri: "https://i/keys"}]}`, "", nil},
		"jwt key":   {"RequestAuthentication", `{jwtRules: [{issuer: "https://i", audiences: [a], jwksUri: "ftp://i/keys"}]}`, `spec.jwtRules[0].jwksUri: "ftp://i/keys"`, nil},
		"strict":    {"PeerAuthentication", `{mtls: {mode: STRICT}}`, "", nil},
		"mode":      {"PeerAuthentication", `{mtls: {mode: STRIKT}}`, `spec.mtls.mode: "STRIKT"`, nil},
		"no such":   {"PeerAuthentication", `{selector: {matchLabels: {app: none}}, mtls: {mode: STRICT}}`, "", []string{"spec.selector: selects no workload that there is now"}},
		"two specs": {"PeerAuthentication", `{mtls: {mode: STRICT}, rules: []}`, "spec.rules: unknown field", nil},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			for _, version := range []string{"v1", "v1beta1"} {
				req := policyRequest(t, row.kind, row.spec)
				req.Object.Raw = []byte(strings.Replace(string(req.Object.Raw), "security.istio.io/v1", "security.istio.io/"+version, 1))
				got := r.review(t, webhook.ValidatePath, req)
				if got.Allowed != (row.refused == "") {
					t.Fatalf("%s: %+v %v", version, got.Result, got.Warnings)
				}
				if row.refused != "" && !strings.Contains(got.Result.Message, row.refused) {
					t.Errorf("%s: refused with %q", version, got.Result.Message)
				}
				if row.refused == "" && !slices.Equal(got.Warnings, row.warnings) {
					t.Errorf("%s: warnings %q", version, got.Warnings)
				}
			}
		})
	}
}

// What the server refuses of a document later, admission refuses first; and what it
// warns of is what `castellan authz validate` says.
func TestValidateIsAuthz(t *testing.T) {
	r := start(t, nil)
	data, err := os.ReadFile("../authz/reference/testdata/cases.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Name     string
		Policies []struct {
			In   string
			Spec json.RawMessage
		}
	}
	if err := yaml.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, c := range cases {
		for _, p := range c.Policies {
			req := policyRequest(t, "AuthorizationPolicy", "")
			if p.In != "" {
				req.Namespace = p.In
			}
			req.Object.Raw = policyObject(t, "AuthorizationPolicy", string(p.Spec), map[string]any{"namespace": req.Namespace})
			doc, err := authz.Decode(req.Object.Raw)
			refused := err != nil
			if err == nil {
				for _, f := range authz.Validate(doc, policy.Mesh{TrustDomain: "cluster.local", RootNamespace: "castellan-system"}) {
					refused = refused || f.Severity == authz.SeverityError
				}
			}
			if got := r.review(t, webhook.ValidatePath, req); got.Allowed == refused {
				t.Errorf("%s: %s: %+v", c.Name, p.Spec, got)
			}
			n++
		}
	}
	if n < 50 {
		t.Errorf("only %d policies are there", n)
	}
}

const badSpec = `{action: DENY}`

// An object that is bad already, stored before there was a webhook, can lose its
// finalizers and so be deleted; it cannot be made worse, or another bad one.
func TestValidateNeverKeepsWhatIsThere(t *testing.T) {
	r := start(t, nil)
	object := func(spec string, metadata map[string]any) []byte {
		return policyObject(t, "AuthorizationPolicy", spec, metadata)
	}
	finalized := map[string]any{"finalizers": []string{"x/y"}, "deletionTimestamp": "2026-01-01T00:00:00Z"}
	dry := map[string]any{"annotations": map[string]string{"istio.io/dry-run": "true"}}
	for name, row := range map[string]struct {
		op            admissionv1.Operation
		before, after []byte
		change        func(*admissionv1.AdmissionRequest)
		allowed       bool
	}{
		"create":            {admissionv1.Create, nil, object(badSpec, nil), nil, false},
		"delete":            {admissionv1.Delete, object(badSpec, nil), nil, nil, true},
		"lose finalizers":   {admissionv1.Update, object(badSpec, finalized), object(badSpec, nil), nil, true},
		"labels":            {admissionv1.Update, object(badSpec, nil), object(badSpec, map[string]any{"labels": map[string]string{"a": "b"}}), nil, true},
		"other annotation":  {admissionv1.Update, object(badSpec, nil), object(badSpec, map[string]any{"annotations": map[string]string{"a": "b"}}), nil, true},
		"mend":              {admissionv1.Update, object(badSpec, nil), object(`{action: DENY, rules: [{}]}`, nil), nil, true},
		"break":             {admissionv1.Update, object(`{action: DENY, rules: [{}]}`, nil), object(badSpec, nil), nil, false},
		"break while ended": {admissionv1.Update, object(`{action: DENY, rules: [{}]}`, finalized), object(badSpec, finalized), nil, false},
		"dry run":           {admissionv1.Update, object(badSpec, nil), object(badSpec, dry), nil, false},
		"dry run away":      {admissionv1.Update, object(badSpec, dry), object(badSpec, nil), nil, false},
		"no old object":     {admissionv1.Update, nil, object(badSpec, nil), nil, false},
		"status":            {admissionv1.Update, object(`{}`, nil), object(badSpec, nil), func(q *admissionv1.AdmissionRequest) { q.SubResource = "status" }, true},
		"another kind":      {admissionv1.Create, nil, object(badSpec, nil), func(q *admissionv1.AdmissionRequest) { q.Kind.Kind = "Sidecar" }, true},
		"another group":     {admissionv1.Create, nil, object(badSpec, nil), func(q *admissionv1.AdmissionRequest) { q.Kind.Group = "x" }, true},
	} {
		req := policyRequest(t, "AuthorizationPolicy", "{}")
		req.Operation, req.Object.Raw, req.OldObject.Raw = row.op, row.after, row.before
		if row.change != nil {
			row.change(req)
		}
		if got := r.review(t, webhook.ValidatePath, req); got.Allowed != row.allowed {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestValidateNames(t *testing.T) {
	r := start(t, nil)
	req := policyRequest(t, "AuthorizationPolicy", "{rules: [{}]}")
	req.Name, req.Object.Raw = "", policyObject(t, "AuthorizationPolicy", `{rules: [{from: [{source: {namespaces: [a]}}]}]}`, map[string]any{"name": "", "generateName": "p-"})
	if got := r.review(t, webhook.ValidatePath, req); !got.Allowed {
		t.Errorf("a name to be generated: %+v", got.Result)
	}
	req = policyRequest(t, "PeerAuthentication", "{mtls: {mode: STRICT}}")
	req.Namespace = "castellan-system" // not the object's word
	got := r.review(t, webhook.ValidatePath, req)
	if want := []string{"metadata.namespace: the root namespace: this applies to every workload of the mesh"}; !got.Allowed || !slices.Equal(got.Warnings, want) {
		t.Errorf("%v %q", got.Allowed, got.Warnings)
	}
}

func TestReviewOfRootNamespace(t *testing.T) {
	mesh := policy.Mesh{RootNamespace: "root"}
	for name, row := range map[string]struct {
		kind, spec string
		want       []string
	}{
		"all":      {"AuthorizationPolicy", `{rules: [{from: [{source: {namespaces: [a]}}]}]}`, []string{"this applies to every workload of the mesh"}},
		"some":     {"AuthorizationPolicy", `{selector: {matchLabels: {app: there}}, rules: [{from: [{source: {namespaces: [a]}}]}]}`, []string{"this applies to such workloads of every namespace"}},
		"nobody":   {"AuthorizationPolicy", `{selector: {matchLabels: {app: none}}, rules: [{from: [{source: {namespaces: [a]}}]}]}`, []string{"this applies to such workloads of every namespace", "selects no workload"}},
		"targeted": {"AuthorizationPolicy", `{targetRef: {kind: Service, name: a, group: ""}, rules: [{from: [{source: {namespaces: [a]}}]}]}`, []string{"target reference"}},
	} {
		doc, err := authz.Decode(policyObject(t, row.kind, row.spec, map[string]any{"namespace": "root"}))
		if err != nil {
			t.Fatal(err)
		}
		findings := webhook.Review(doc, mesh, inventory())
		if len(findings) != len(row.want) {
			t.Errorf("%s: %v", name, findings)
			continue
		}
		for i, want := range row.want {
			if findings[i].Severity != authz.SeverityWarning || !strings.Contains(findings[i].Reason, want) {
				t.Errorf("%s: %v", name, findings[i])
			}
		}
	}
	// What is not known is not said.
	doc, err := authz.Decode(policyObject(t, "AuthorizationPolicy", `{selector: {matchLabels: {app: none}}, rules: [{from: [{source: {namespaces: [a]}}]}]}`, nil))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(webhook.Review(doc, mesh, nil)); got != "[]" {
		t.Error(got)
	}
}
