// Package crds_test asks the API server's own code what the rules in deploy/crds
// refuse. It is a module of its own: the product needs neither that code nor CEL.
package crds_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"
)

const (
	ap = "AuthorizationPolicy"
	pa = "PeerAuthentication"
	ra = "RequestAuthentication"
)

var rules = []struct{ kind, spec, want string }{
	{ap, `{selector: {matchLabels: {app: a}}, rules: [{from: [{source: {serviceAccounts: [a]}}]}]}`, ""},
	{ap, `{selector: {matchLabels: {app: a}}, targetRefs: [{kind: Service, name: s}]}`, "only one of targetRefs or selector can be set"},
	{ap, `{selector: {matchLabels: {app: a}}, targetRef: {kind: Service, name: s}}`, "only one of targetRefs or selector can be set"},
	{ap, `{selector: {matchLabels: {"a*": a}}}`, "wildcard not allowed in label key match"},
	{ap, `{selector: {matchLabels: {"": a}}}`, "key must not be empty"},
	{ap, `{selector: {matchLabels: {app: "a*"}}}`, "wildcard not allowed in label value match"},
	{ap, `{targetRefs: [{kind: Service, name: s, namespace: other}]}`, "cross namespace referencing is not currently supported"},
	{ap, `{rules: [{from: [{source: {serviceAccounts: [a], principals: [b]}}]}]}`, "Cannot set serviceAccounts with namespaces or principals"},
	{ap, `{rules: [{from: [{source: {notServiceAccounts: [a], namespaces: [b]}}]}]}`, "Cannot set serviceAccounts with namespaces or principals"},
	{pa, `{selector: {matchLabels: {app: a}}, portLevelMtls: {"80": {mode: STRICT}}}`, ""},
	{pa, `{portLevelMtls: {"80": {mode: STRICT}}}`, "portLevelMtls requires selector"},
	{pa, `{selector: {matchLabels: {app: a}}, portLevelMtls: {"0": {mode: STRICT}}}`, "port must be between 1-65535"},
	{pa, `{selector: {matchLabels: {app: a}}, portLevelMtls: {"65536": {mode: STRICT}}}`, "port must be between 1-65535"},
	{pa, `{selector: {matchLabels: {"a*": a}}}`, "wildcard not allowed in label key match"},
	{ra, `{jwtRules: [{issuer: a, jwksUri: "https://a", timeout: 5s}]}`, ""},
	{ra, `{selector: {matchLabels: {app: a}}, targetRefs: [{kind: Service, name: s}]}`, "only one of targetRefs or selector can be set"},
	{ra, `{jwtRules: [{issuer: a, jwksUri: "https://a", jwks: "{}"}]}`, "only one of jwks or jwksUri can be set"},
	{ra, `{jwtRules: [{issuer: a, jwksUri: "https://a", jwks_uri: "https://a"}]}`, "only one of jwks or jwksUri can be set"},
	{ra, `{jwtRules: [{issuer: a, jwksUri: "file:///a"}]}`, "url must have scheme http:// or https://"},
	{ra, `{jwtRules: [{issuer: a, timeout: 1us}]}`, "must be a valid duration greater than 1ms"},
}

// TestRules: each rule refuses what it is for, in both versions.
func TestRules(t *testing.T) {
	schemas := load(t)
	for _, tt := range rules {
		for version, s := range schemas[tt.kind] {
			t.Run(tt.kind+" "+version+" "+tt.want, func(t *testing.T) {
				var spec map[string]any
				if err := yaml.Unmarshal([]byte(tt.spec), &spec); err != nil {
					t.Fatal(err)
				}
				object := map[string]any{"apiVersion": "security.istio.io/" + version, "kind": tt.kind,
					"metadata": map[string]any{"name": "a"}, "spec": spec}
				validator := cel.NewValidator(s, true, celconfig.PerCallLimit)
				errs, _ := validator.Validate(t.Context(), field.NewPath(""), s, object, nil, celconfig.RuntimeCELCostBudget)
				if tt.want == "" && len(errs) == 0 {
					return
				}
				if tt.want == "" || len(errs) != 1 || !strings.Contains(errs[0].Error(), tt.want) {
					t.Errorf("%s: %v", tt.spec, errs)
				}
			})
		}
	}
}

// TestEveryRuleIsTried: no rule's message is missing above.
func TestEveryRuleIsTried(t *testing.T) {
	for kind, versions := range load(t) {
		if len(versions) != 2 {
			t.Errorf("%s has %d versions", kind, len(versions))
		}
		for _, s := range versions {
			for _, message := range messages(s) {
				found := false
				for _, tt := range rules {
					found = found || tt.want == message
				}
				if !found {
					t.Errorf("%s: nothing tries %q", kind, message)
				}
			}
		}
	}
}

func messages(s *schema.Structural) []string {
	var out []string
	for _, r := range s.XValidations {
		out = append(out, r.Message)
	}
	for name := range s.Properties {
		member := s.Properties[name]
		out = append(out, messages(&member)...)
	}
	if s.Items != nil {
		out = append(out, messages(s.Items)...)
	}
	if s.AdditionalProperties != nil && s.AdditionalProperties.Structural != nil {
		out = append(out, messages(s.AdditionalProperties.Structural)...)
	}
	return out
}

// load reads the definitions' schemas by kind and version.
func load(t *testing.T) map[string]map[string]*schema.Structural {
	t.Helper()
	files, err := filepath.Glob("../../deploy/crds/*.yaml")
	if err != nil || len(files) != 3 {
		t.Fatal(files, err)
	}
	out := map[string]map[string]*schema.Structural{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var def apiextensionsv1.CustomResourceDefinition
		if err := yaml.UnmarshalStrict(data, &def); err != nil {
			t.Fatal(err)
		}
		versions := map[string]*schema.Structural{}
		for _, v := range def.Spec.Versions {
			var props apiextensions.JSONSchemaProps
			if err := apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(v.Schema.OpenAPIV3Schema, &props, nil); err != nil {
				t.Fatal(err)
			}
			if versions[v.Name], err = schema.NewStructural(&props); err != nil {
				t.Fatal(err)
			}
		}
		out[def.Spec.Names.Kind] = versions
	}
	return out
}
