package install_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"castellan.dev/internal/config"
	"castellan.dev/internal/install"
)

// values reads YAML as -f does.
func values(t testing.TB, text string) map[string]any {
	t.Helper()
	out := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func render(t testing.TB, text string) *install.Rendered {
	t.Helper()
	r, err := install.Render(install.Options{Values: values(t, text), KubeVersion: "v1.36.3"})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// find returns the one object of a kind and name; nil where there is none.
func find(r *install.Rendered, kind, name string) *unstructured.Unstructured {
	for _, o := range r.Objects {
		if o.GetKind() == kind && o.GetName() == name {
			return o
		}
	}
	return nil
}

// need is find where it must be there.
func need(t testing.TB, r *install.Rendered, kind, name string) *unstructured.Unstructured {
	t.Helper()
	o := find(r, kind, name)
	if o == nil {
		t.Fatalf("no %s %s", kind, name)
	}
	return o
}

func as[T any](t testing.TB, o *unstructured.Unstructured) *T {
	t.Helper()
	var out T
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o.Object, &out, true); err != nil {
		t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
	}
	return &out
}

// variants are values that users have; each test of what must always hold goes
// through all of them.
var variants = map[string]string{
	"defaults": "",
	"plain":    "injection: {enabled: false}\nvalidation: {enabled: false}\nnetworkPolicy: {enabled: false}\npodDisruptionBudget: {enabled: false}\nserver: {topologySpread: false}\nagent: {taintNodes: false}",
	"rich": `
image: {registry: registry.example.org/mesh/, tag: v1.2.3, pullPolicy: Always, pullSecrets: [pull]}
mesh: {trustDomain: example.org, trustDomainAliases: [old.example.org], rootNamespace: istio-system, outboundPolicy: ALLOW_ANY,
  numTrustedProxies: 2, extensionProviders: [{name: opa, address: "opa.opa.svc:9191", timeout: 1s}], jwksAllow: [http, 10.0.0.0/8]}
ca: {leafTTL: 10m, maxLeafTTL: 2h, intermediateTTL: 48h, rootTTL: 4380h, chainSecret: cacerts, allowUnconstrainedIssuer: true}
attestation: {verification: tokenReview, directCallers: [istio-system/gateway], trustedNodeAccounts: [istio-system/ztunnel]}
server: {servingNames: [istiod.istio-system.svc], logLevel: debug, nodeSelector: {pool: infra}, tolerations: [{operator: Exists}],
  podLabels: {team: mesh, app: other}, podAnnotations: {a: b}, affinity: {nodeAffinity: {}}}
ledger: {existingClaim: my-claim}
agent: {kubeletDir: /data/kubelet, maxUnavailable: 10%, podLabels: {team: mesh}, nodeSelector: {mesh: "yes"}}
injection: {revision: canary, defaultRevision: false, failurePolicy: Ignore, excludeNamespaces: [other], imagePullSecrets: [pull],
  limits: {cpu: 1, memory: 64Mi}, capture: {excludeOutboundPorts: [5432]}}
`,
}

// Every configuration file that is rendered is one that its program takes.
func TestConfigurations(t *testing.T) {
	load := func(t *testing.T, r *install.Rendered, configMap, key string, into interface{ Validate() error }) {
		t.Helper()
		cm := as[corev1.ConfigMap](t, need(t, r, "ConfigMap", configMap))
		path := filepath.Join(t.TempDir(), key)
		if err := os.WriteFile(path, []byte(cm.Data[key]), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := config.Load(path, into); err != nil {
			t.Error(err)
		}
	}
	for name, text := range variants {
		t.Run(name, func(t *testing.T) {
			r := render(t, text)
			t.Setenv("NODE_NAME", "node-1")
			var server config.Server
			load(t, r, "castellan-server", "server.yaml", &server)
			var agent config.Agent
			load(t, r, "castellan-agent", "agent.yaml", &agent)
			if agent.TrustDomain != server.Mesh.TrustDomain || agent.Cluster != server.Kubernetes.Cluster {
				t.Errorf("server and agent disagree: %+v", agent)
			}
		})
	}
}

func TestServerConfiguration(t *testing.T) {
	cm := as[corev1.ConfigMap](t, need(t, render(t, variants["rich"]), "ConfigMap", "castellan-server"))
	var got config.Server
	if err := config.Unmarshal([]byte(cm.Data["server.yaml"]), &got); err != nil {
		t.Fatal(err)
	}
	for what, ok := range map[string]bool{
		"chain":         got.CA.ChainDir == "/etc/castellan-chain" && got.CA.AllowUnconstrainedIssuer,
		"rootNamespace": got.Mesh.RootNamespace == "istio-system",
		"jwks":          strings.Join(got.Mesh.JWKS.Allow, " ") == "http 10.0.0.0/8",
		"agents":        strings.Join(got.Attestation.AgentAccounts, " ") == "castellan-system/castellan-agent",
		"namespace":     got.Kubernetes.Namespace == "castellan-system",
		"verification":  got.Kubernetes.Verification == config.VerifyByTokenReview,
		"serving names": strings.Join(got.ServingNames, " ") == "castellan-server.castellan-system.svc castellan-server.castellan-system localhost 127.0.0.1 ::1 istiod.istio-system.svc",
		"proxy image":   got.Webhook.Inject.Image == "registry.example.org/mesh/castellan-proxy:v1.2.3" && got.Webhook.Inject.ImagePullPolicy == "Always",
		"revision":      got.Webhook.Inject.Revision == "canary" && !*got.Webhook.Inject.DefaultRevision,
		"ca":            got.CA.LeafTTL.Or(0).String() == "10m0s",
	} {
		if !ok {
			t.Errorf("%s: %+v", what, got)
		}
	}
}

// Names that the schema does not know, and values it does not take, are refused
// with the field's name.
func TestValuesRefused(t *testing.T) {
	tests := map[string]struct{ values, want string }{
		"typo at the top":  {"sever: {}", "additional properties 'sever' not allowed"},
		"typo inside":      {"server: {replica: 1}", "server: additional properties 'replica' not allowed"},
		"deep typo":        {"injection: {capture: {excludePorts: []}}", "injection.capture: additional properties 'excludePorts'"},
		"resources":        {"agent: {resources: {limit: {}}}", "agent.resources: additional properties 'limit'"},
		"enum":             {"mesh: {outboundPolicy: REGISTRY}", "mesh.outboundPolicy: value must be one of 'REGISTRY_ONLY', 'ALLOW_ANY'"},
		"type":             {`server: {replicas: "1"}`, "server.replicas: got string, want integer"},
		"duration":         {"ca: {leafTTL: 1 hour}", "ca.leafTTL: '1 hour' does not match pattern"},
		"trust domain":     {"mesh: {trustDomain: Example.org}", "mesh.trustDomain: 'Example.org' does not match"},
		"account":          {"attestation: {directCallers: [gateway]}", "attestation.directCallers.0: 'gateway' does not match"},
		"revision":         {"injection: {revision: default}", "injection.revision: "},
		"none":             {"server: {replicas: 0}", "server.replicas: "},
		"two on SQLite":    {"server: {replicas: 2}", "server.replicas: the ledger is on SQLite, which one server writes; set server.replicas to 1"},
		"another ledger":   {"ledger: {type: postgres}", "ledger.type: value must be"},
		"two mistakes":     {"a: 1\nserver: {b: 2}", "additional properties 'a' not allowed"},
		"a number for yes": {"networkPolicy: {enabled: 1}", "networkPolicy.enabled: got number, want boolean"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := install.Render(install.Options{Values: values(t, tt.values)})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// Every value of values.yaml is in the schema, and every one in the schema has a
// default and a comment in values.yaml.
func TestValuesDocumented(t *testing.T) {
	text, err := os.ReadFile("../../deploy/chart/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("../../deploy/chart/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := yaml.Unmarshal(data, &schema); err != nil {
		t.Fatal(err)
	}
	compare(t, "", schema, values(t, string(text)))

	lines := strings.Split(string(text), "\n")
	for i, line := range lines {
		indent := len(line) - len(strings.TrimLeft(line, " "))
		key, _, isKey := strings.Cut(strings.TrimSpace(line), ":")
		if !isKey || strings.HasPrefix(key, "#") || strings.HasPrefix(key, "-") || indent > 2 && key != "enabled" {
			continue
		}
		switch {
		case strings.HasPrefix(strings.TrimSpace(lines[i-1]), "#"):
		case key == "enabled" || strings.HasPrefix(key, "resources") || key == "requests" || key == "limits":
		case strings.HasSuffix(strings.TrimSpace(lines[i-1]), ":"): // its parent's comment
		default:
			if !sameGroup(lines, i) {
				t.Errorf("values.yaml:%d: %s has no comment", i+1, key)
			}
		}
	}
}

// sameGroup: lines after a commented one share its comment, up to the next empty line.
func sameGroup(lines []string, i int) bool {
	for ; i > 0 && strings.TrimSpace(lines[i]) != ""; i-- {
		if strings.HasPrefix(strings.TrimSpace(lines[i]), "#") {
			return true
		}
	}
	return false
}

func compare(t *testing.T, path string, schema, defaults map[string]any) {
	t.Helper()
	properties, _ := schema["properties"].(map[string]any)
	for key, value := range defaults {
		sub, ok := properties[key].(map[string]any)
		if !ok {
			t.Errorf("%s%s is not in the schema", path, key)
			continue
		}
		inner, isMap := value.(map[string]any)
		if _, described := sub["properties"]; isMap && described {
			if sub["additionalProperties"] != false {
				t.Errorf("%s%s: the schema takes names it does not know", path, key)
			}
			compare(t, path+key+".", sub, inner)
		}
	}
	for key := range properties {
		if _, ok := defaults[key]; !ok && path+key != "global" {
			t.Errorf("%s%s is in the schema and not in values.yaml", path, key)
		}
	}
}
