package crd_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"castellan.dev/api/crd"
	v1 "castellan.dev/api/crd/v1"
	"castellan.dev/api/crd/v1beta1"
	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

const (
	generated = "../../deploy/crds"
	generator = "controller-gen-v0.23.0"
)

// TestGenerated: the definitions in the tree are those of the types.
func TestGenerated(t *testing.T) {
	tools := os.Getenv("CASTELLAN_TOOLS")
	if tools == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		tools = filepath.Join(cache, "castellan", "tools")
	}
	program := filepath.Join(tools, "bin", generator)
	if _, err := os.Stat(program); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%v; run make tools", err)
		}
		t.Skipf("%v; run make tools", err)
	}
	fresh := t.TempDir()
	cmd := exec.Command(program, "crd", "paths=./...", "output:crd:dir="+fresh)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want, got := read(t, fresh), read(t, generated)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("deploy/crds is not what the types say; run make generate\n%s", diff)
	}
}

func read(t *testing.T, dir string) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil || len(files) != 3 {
		t.Fatalf("%s: %v, %v", dir, files, err)
	}
	out := map[string]string{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(f)] = string(data)
	}
	return out
}

// TestSameFields: the definitions know exactly the fields that the engine does.
func TestSameFields(t *testing.T) {
	for _, pair := range [][2]any{
		{crd.AuthorizationPolicySpec{}, policy.AuthorizationPolicy{}},
		{crd.PeerAuthenticationSpec{}, policy.PeerAuthentication{}},
		{crd.RequestAuthenticationSpec{}, policy.RequestAuthentication{}},
	} {
		ours, theirs := fields(reflect.TypeOf(pair[0]), "spec"), fields(reflect.TypeOf(pair[1]), "spec")
		// authz.Decode reads the older name as the newer one.
		ours = slices.DeleteFunc(ours, func(f string) bool { return strings.Contains(f, "jwks_uri") })
		if diff := cmp.Diff(theirs, ours); diff != "" {
			t.Errorf("%T: %s", pair[0], diff)
		}
	}
}

// fields lists the paths and basic types below a type, as JSON has them.
func fields(t reflect.Type, path string) []string {
	switch t.Kind() {
	case reflect.Pointer:
		return fields(t.Elem(), path)
	case reflect.Slice:
		return fields(t.Elem(), path+"[]")
	case reflect.Map:
		return fields(t.Elem(), path+"{}")
	case reflect.Struct:
		var out []string
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			out = append(out, fields(t.Field(i).Type, path+"."+name)...)
		}
		slices.Sort(out)
		return out
	}
	return []string{path + " " + t.Kind().String()}
}

// examples are policies as users of Istio have them, with every field there is.
const examples = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: all, namespace: foo}
spec:
  selector: {matchLabels: {app: httpbin, version: v1}}
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/default/sa/sleep", "*"]
        notPrincipals: [x]
        requestPrincipals: ["https://accounts.google.com/1234"]
        notRequestPrincipals: ["*"]
        ipBlocks: [10.1.2.3, 10.2.0.0/16]
        notIpBlocks: [fd00::/8]
        remoteIpBlocks: [203.0.113.4]
        notRemoteIpBlocks: [203.0.113.0/24]
        trustDomains: [td1]
        notTrustDomains: [td2]
    - source: {namespaces: ["dev"], notNamespaces: ["prod*"]}
    - source: {serviceAccounts: ["sleep", "other/sa"], notServiceAccounts: [x]}
    to:
    - operation:
        hosts: ["*.example.com"]
        notHosts: [internal.example.com]
        ports: ["80"]
        notPorts: ["8080"]
        methods: ["GET", "POST"]
        notMethods: [DELETE]
        paths: ["/info*", "/data/{*}/x/{**}"]
        notPaths: ["/private"]
    when:
    - key: request.auth.claims[iss]
      values: ["https://accounts.google.com"]
    - key: request.headers[x-a]
      notValues: ["1"]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-nothing, namespace: foo}
spec: {}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: custom, namespace: foo}
spec:
  action: CUSTOM
  provider: {name: my-authorizer}
  rules: [{to: [{operation: {paths: ["/admin/*"]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: waypoint, namespace: foo}
spec:
  targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: waypoint}, {kind: Service, group: "", name: s}]
  rules: [{}]
---
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata: {name: finance, namespace: foo}
spec:
  selector: {matchLabels: {app: finance}}
  mtls: {mode: STRICT}
  portLevelMtls:
    8080: {mode: DISABLE}
    "9090": {mode: UNSET}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: foo}
spec:
  selector: {matchLabels: {app: httpbin}}
  jwtRules:
  - issuer: https://accounts.example.com
    audiences: [a, b]
    jwksUri: https://accounts.example.com/jwks
    fromHeaders: [{name: x-jwt, prefix: "Bearer "}, {name: x-other}]
    fromParams: [token]
    fromCookies: [auth]
    outputPayloadToHeader: x-payload
    outputClaimToHeaders: [{header: x-group, claim: nested.key}]
    forwardOriginalToken: true
    timeout: 10s
    spaceDelimitedClaims: [roles]
  - jwks: '{"keys":[]}'
    issuer: x
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: target, namespace: foo}
spec:
  targetRef: {kind: Gateway, group: gateway.networking.k8s.io, name: g}
`

// TestRoundTrip: an object through our types says what it said before, and what
// authz reads.
func TestRoundTrip(t *testing.T) {
	for i, text := range strings.Split(examples, "\n---\n") {
		raw, err := yaml.YAMLToJSONStrict([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		doc, err := authz.Decode(raw)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(fmt.Sprint(i, doc.Metadata.Name), func(t *testing.T) {
			object := map[string]any{
				policy.KindAuthorization: &v1.AuthorizationPolicy{}, policy.KindPeerAuthentication: &v1beta1.PeerAuthentication{},
				policy.KindRequestAuthentication: &v1.RequestAuthentication{}}[doc.Kind]
			d := json.NewDecoder(bytes.NewReader(raw))
			d.DisallowUnknownFields()
			if err := d.Decode(object); err != nil {
				t.Fatal(err)
			}
			back, err := json.Marshal(object)
			if err != nil {
				t.Fatal(err)
			}
			again, err := authz.Decode(back)
			if err != nil {
				t.Fatalf("%v: %s", err, back)
			}
			if diff := cmp.Diff(doc, again); diff != "" {
				t.Error(diff)
			}
			if problem := conforms(t, doc.Kind, raw); problem != "" {
				t.Error(problem)
			}
		})
	}
}

// conforms walks an object along its definition's schema, and tells of what that
// does not know, and so would drop, or is of another type.
func conforms(t *testing.T, kind string, raw []byte) string {
	t.Helper()
	for _, text := range read(t, generated) {
		var def struct {
			Spec struct {
				Names    struct{ Kind string }
				Versions []struct {
					Name            string
					Served, Storage bool
					Schema          struct{ OpenAPIV3Schema map[string]any }
				}
			}
		}
		if err := yaml.Unmarshal([]byte(text), &def); err != nil {
			t.Fatal(err)
		}
		if def.Spec.Names.Kind != kind {
			continue
		}
		if v := def.Spec.Versions; len(v) != 2 || v[0].Name != "v1" || !v[0].Storage || !v[0].Served || v[1].Name != "v1beta1" || v[1].Storage || !v[1].Served {
			return "served versions are not v1 (stored) and v1beta1"
		}
		var object map[string]any
		if err := json.Unmarshal(raw, &object); err != nil {
			t.Fatal(err)
		}
		for _, v := range def.Spec.Versions {
			properties := v.Schema.OpenAPIV3Schema["properties"].(map[string]any)
			if problem := walk(properties["spec"].(map[string]any), object["spec"], v.Name+" spec"); problem != "" {
				return problem
			}
		}
		return ""
	}
	return "no definition of " + kind
}

func walk(schema map[string]any, value any, path string) string {
	switch v := value.(type) {
	case map[string]any:
		properties, _ := schema["properties"].(map[string]any)
		additional, _ := schema["additionalProperties"].(map[string]any)
		for name, member := range v {
			s, ok := properties[name].(map[string]any)
			if !ok {
				s = additional
			}
			if s == nil {
				return path + "." + name + " is unknown"
			}
			if problem := walk(s, member, path+"."+name); problem != "" {
				return problem
			}
		}
	case []any:
		items, ok := schema["items"].(map[string]any)
		if !ok {
			return path + " is no list"
		}
		for _, item := range v {
			if problem := walk(items, item, path+"[]"); problem != "" {
				return problem
			}
		}
	case string:
		if enum, ok := schema["enum"].([]any); ok && !slices.Contains(enum, any(v)) || schema["type"] != "string" {
			return fmt.Sprintf("%s: %q", path, v)
		}
	case bool:
		if schema["type"] != "boolean" {
			return path + " is no boolean"
		}
	}
	return ""
}
