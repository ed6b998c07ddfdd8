package authz_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

func TestDecode(t *testing.T) {
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	tests := []struct {
		name   string
		object string
		want   policy.Document
	}{
		{
			"an object as the API server stores it",
			`{"apiVersion": "security.istio.io/v1beta1", "kind": "AuthorizationPolicy",
			  "metadata": {"name": "orders", "namespace": "shop", "uid": "u", "generation": 3, "resourceVersion": "7",
			    "creationTimestamp": "2026-01-02T03:04:05Z", "labels": {"a": "b"}, "annotations": {"istio.io/dry-run": "true"},
			    "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {"f:rules": {}}}}], "ownerReferences": null},
			  "spec": {"selector": {"matchLabels": {"app": "orders"}}, "action": "DENY",
			    "rules": [{"from": [{"source": {"notPrincipals": ["td/ns/a/sa/b"], "ipBlocks": ["10.0.0.0/8"]}}],
			      "to": [{"operation": {"methods": ["GET"]}}], "when": [{"key": "source.ip", "notValues": ["1.2.3.4"]}]}]},
			  "status": {"conditions": [{"type": "Accepted"}]}}`,
			policy.Document{
				Kind: "AuthorizationPolicy",
				Metadata: policy.Metadata{
					Name: "orders", Namespace: "shop", UID: "u", Generation: 3, CreationTimestamp: created,
					Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"istio.io/dry-run": "true"},
				},
				Authorization: &policy.AuthorizationPolicy{
					Selector: &policy.Selector{MatchLabels: map[string]string{"app": "orders"}},
					Action:   "DENY",
					Rules: []policy.Rule{{
						From: []policy.From{{Source: &policy.Source{NotPrincipals: []string{"td/ns/a/sa/b"}, IPBlocks: []string{"10.0.0.0/8"}}}},
						To:   []policy.To{{Operation: &policy.Operation{Methods: []string{"GET"}}}},
						When: []policy.Condition{{Key: "source.ip", NotValues: []string{"1.2.3.4"}}},
					}},
				},
			},
		},
		{
			"nulls are absent fields, and empty lists are not",
			`{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "n", "creationTimestamp": null, "labels": null},
			  "spec": {"selector": null, "action": null, "rules": [{"from": null, "to": []}]}, "status": null}`,
			policy.Document{
				Kind: "AuthorizationPolicy", Metadata: policy.Metadata{Name: "n"},
				Authorization: &policy.AuthorizationPolicy{Rules: []policy.Rule{{To: []policy.To{}}}},
			},
		},
		{
			"no spec is an empty one, which denies all",
			`{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "n"}}`,
			policy.Document{Kind: "AuthorizationPolicy", Metadata: policy.Metadata{Name: "n"}, Authorization: &policy.AuthorizationPolicy{}},
		},
		{
			"ports of portLevelMtls are keys",
			`{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "n"},
			  "spec": {"mtls": {"mode": "STRICT"}, "portLevelMtls": {"8080": {"mode": "DISABLE"}}}}`,
			policy.Document{
				Kind: "PeerAuthentication", Metadata: policy.Metadata{Name: "n"},
				PeerAuthentication: &policy.PeerAuthentication{
					MTLS: &policy.MutualTLS{Mode: "STRICT"}, PortLevelMTLS: map[string]policy.MutualTLS{"8080": {Mode: "DISABLE"}},
				},
			},
		},
		{
			"jwks_uri is the other spelling of jwksUri",
			`{"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "n"},
			  "spec": {"jwtRules": [{"issuer": "i", "jwks_uri": "https://i/keys", "forwardOriginalToken": true, "fromHeaders": [{"name": "x", "prefix": "Bearer "}]}]}}`,
			policy.Document{
				Kind: "RequestAuthentication", Metadata: policy.Metadata{Name: "n"},
				RequestAuthentication: &policy.RequestAuthentication{JWTRules: []policy.JWTRule{{
					Issuer: "i", JwksURI: "https://i/keys", ForwardOriginalToken: true, FromHeaders: []policy.JWTHeader{{Name: "x", Prefix: "Bearer "}},
				}}},
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := authz.Decode([]byte(tt.object))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("Decode (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	spec := func(s string) string {
		return `{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "n"}, "spec": ` + s + `}`
	}
	tests := []struct {
		name, object, want string
	}{
		{"authz-35 unknown field", spec(`{"rules": [{"from": [{"source": {"principal": ["x"]}}]}]}`),
			`authz: spec.rules[0].from[0].source.principal: unknown field (allowed: principals, notPrincipals, requestPrincipals, notRequestPrincipals, namespaces, notNamespaces, serviceAccounts, notServiceAccounts, trustDomains, notTrustDomains, ipBlocks, notIpBlocks, remoteIpBlocks, notRemoteIpBlocks)`},
		{"authz-35 field of another case", spec(`{"Rules": []}`), `authz: spec.Rules: unknown field (allowed: selector, targetRef, targetRefs, action, provider, rules)`},
		{"authz-35 unknown and null", spec(`{"rule": null}`), `authz: spec.rule: unknown field (allowed: selector, targetRef, targetRefs, action, provider, rules)`},
		{"duplicate field", spec(`{"action": "ALLOW", "action": "DENY"}`), `authz: spec.action: given twice; keep one`},
		{"duplicate field, one null", spec(`{"rules": null, "rules": [{}]}`), `authz: spec.rules: given twice; keep one`},
		{"duplicate by escape", spec(`{"action": "ALLOW", "\u0061ction": "DENY"}`), `authz: spec.action: given twice; keep one`},
		{"duplicate top-level field", `{"kind": "AuthorizationPolicy", "kind": "PeerAuthentication"}`, `authz: kind: given twice; keep one`},
		{"duplicate label", spec(`{"selector": {"matchLabels": {"app": "a", "app": "b"}}}`), `authz: spec.selector.matchLabels.app: given twice; keep one`},
		{"two spellings", `{"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "n"}, "spec": {"jwtRules": [{"jwksUri": "a", "jwks_uri": "b"}]}}`,
			`authz: spec.jwtRules[0].jwks_uri: given twice, under two spellings; keep one`},
		{"string for list", spec(`{"rules": [{"to": [{"operation": {"paths": "/a"}}]}]}`), `authz: spec.rules[0].to[0].operation.paths: "/a": a list is wanted, not a string`},
		{"number for string", spec(`{"rules": [{"to": [{"operation": {"ports": ["80", 8080]}}]}]}`), `authz: spec.rules[0].to[0].operation.ports[1]: "8080": a string is wanted, not a number`},
		{"object for list", spec(`{"rules": {}}`), `authz: spec.rules: a list is wanted, not an object`},
		{"list for object", spec(`[]`), `authz: spec: an object is wanted, not a list`},
		{"boolean for string", spec(`{"action": true}`), `authz: spec.action: "true": a string is wanted, not a boolean`},
		{"string for boolean", `{"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "n"}, "spec": {"jwtRules": [{"forwardOriginalToken": "true"}]}}`,
			`authz: spec.jwtRules[0].forwardOriginalToken: "true": a boolean is wanted, not a string`},
		{"null rule", spec(`{"rules": [null]}`), `authz: spec.rules[0]: null is not allowed within a list; remove it`},
		{"null value", spec(`{"rules": [{"from": [{"source": {"ipBlocks": [null]}}]}]}`), `authz: spec.rules[0].from[0].source.ipBlocks[0]: null is not allowed within a list; remove it`},
		{"null label", spec(`{"selector": {"matchLabels": {"app.kubernetes.io/name": null}}}`), `authz: spec.selector.matchLabels["app.kubernetes.io/name"]: null is not allowed within a map; remove it`},
		{"lone surrogate", spec(`{"action": "\ud800"}`), `authz: spec.action: "�": holds U+FFFD, the mark of broken text`},
		{"other group", `{"apiVersion": "v1", "kind": "AuthorizationPolicy", "metadata": {"name": "n"}}`, `authz: apiVersion: "v1": not served (allowed: security.istio.io/v1, security.istio.io/v1beta1)`},
		{"other version", `{"apiVersion": "security.istio.io/v1alpha1", "kind": "AuthorizationPolicy"}`, `authz: apiVersion: "security.istio.io/v1alpha1": not served (allowed: security.istio.io/v1, security.istio.io/v1beta1)`},
		{"other kind", `{"kind": "Pod"}`, `authz: kind: "Pod": not served (allowed: AuthorizationPolicy, RequestAuthentication, PeerAuthentication)`},
		{"kind of another type", `{"kind": ["Pod"]}`, `authz: kind: a string is wanted, not a list`},
		{"unknown top-level field", `{"data": {}}`, `authz: data: unknown field (allowed: apiVersion, kind, metadata, spec)`},
		{"no apiVersion", `{"kind": "AuthorizationPolicy", "metadata": {}}`, `authz: apiVersion: required`},
		{"no kind", `{"apiVersion": "security.istio.io/v1", "metadata": {}}`, `authz: kind: required`},
		{"no metadata", `{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy"}`, `authz: metadata: required`},
		{"bad name", `{"metadata": {"name": 7}}`, `authz: metadata.name: "7": a string is wanted, not a number`},
		{"bad label", `{"metadata": {"labels": {"a": 1}}}`, `authz: metadata.labels.a: "1": a string is wanted, not a number`},
		{"bad generation", `{"metadata": {"generation": 1.5}}`, `authz: metadata.generation: "1.5": not a whole number of 64 bits`},
		{"bad time", `{"metadata": {"creationTimestamp": "yesterday"}}`, `authz: metadata.creationTimestamp: "yesterday": not an RFC 3339 time`},
		{"a list of objects", `[{}]`, `authz: an object is wanted, not a list`},
		{"not JSON", `kind: Pod`, `authz: object is not JSON: invalid character 'k' looking for beginning of value`},
		{"empty", ``, `authz: object is not JSON: unexpected end of JSON input`},
		{"trailing data", `{} {}`, `authz: object is not JSON: invalid character '{' after top-level value`},
		{"not UTF-8", "{\"kind\": \"\xff\"}", `authz: object is not UTF-8`},
		{"too large", `{"kind": "` + strings.Repeat("a", 1<<20) + `"}`, `authz: object of 1048588 bytes is larger than 1048576`},
		{"a long value is shortened", `{"kind": "` + strings.Repeat("a", 200) + `"}`, `authz: kind: "` + strings.Repeat("a", 120) + `…": not served (allowed: AuthorizationPolicy, RequestAuthentication, PeerAuthentication)`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			doc, err := authz.Decode([]byte(tt.object))
			if err == nil {
				t.Fatalf("decoded %+v, want the error %q", doc, tt.want)
			}
			if err.Error() != tt.want {
				t.Errorf("error\n got %s\nwant %s", err, tt.want)
			}
			if field := new(authz.FieldError); !errors.As(err, &field) {
				t.Errorf("error of type %T, want *authz.FieldError", err)
			}
			if diff := cmp.Diff(policy.Document{}, doc); diff != "" {
				t.Errorf("a refused document was returned in part:\n%s", diff)
			}
		})
	}
}

func TestDecodeBoundsDepth(t *testing.T) {
	object := strings.Repeat(`{"status":`, 200) + `0` + strings.Repeat(`}`, 200)
	_, err := authz.Decode([]byte(object))
	if err == nil || !strings.Contains(err.Error(), "nested more than 64 levels deep") {
		t.Errorf("error %v, want one about depth", err)
	}
}

// FuzzDecode: nothing panics, nothing half-decoded is returned, and what was
// decoded is decoded again from its own JSON.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "n", "namespace": "s"},
		"spec": {"action": "DENY", "rules": [{"from": [{"source": {"principals": ["*"]}}], "when": [{"key": "source.ip", "values": ["10.0.0.0/8"]}]}]}}`))
	f.Add([]byte(`{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "n"}, "spec": {"portLevelMtls": {"80": {"mode": "STRICT"}}}}`))
	f.Add([]byte(`{"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "n"}, "spec": {"jwtRules": [{"issuer": "i", "jwks": "{}"}]}}`))
	f.Fuzz(func(t *testing.T, object []byte) {
		doc, err := authz.Decode(object)
		if err != nil {
			if diff := cmp.Diff(policy.Document{}, doc); diff != "" {
				t.Fatalf("error %v, yet a document:\n%s", err, diff)
			}
			return
		}
		authz.Validate(doc, policy.Mesh{})
		spec := map[string]any{
			policy.KindAuthorization: doc.Authorization, policy.KindRequestAuthentication: doc.RequestAuthentication,
			policy.KindPeerAuthentication: doc.PeerAuthentication,
		}[doc.Kind]
		var again bytes.Buffer
		if err := json.NewEncoder(&again).Encode(map[string]any{
			"apiVersion": "security.istio.io/v1", "kind": doc.Kind, "metadata": map[string]any{"name": doc.Metadata.Name}, "spec": spec,
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := authz.Decode(again.Bytes()); err != nil {
			t.Fatalf("what was decoded is refused when it is written again: %v\n%s", err, again.Bytes())
		}
	})
}
