package webhook_test

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"castellan.dev/internal/config"
	"castellan.dev/webhook"
)

var update = flag.Bool("update", false, "write the golden files anew")

// injectCase is an input of testdata/inject.
type injectCase struct {
	Config    config.Inject `json:"config"`
	Namespace struct {
		Name     string            `json:"name"`
		Labels   map[string]string `json:"labels"`
		Selected bool              `json:"selected"`
	} `json:"namespace"`
	Pod corev1.Pod `json:"pod"`

	raw []byte // the pod's JSON
}

func (c *injectCase) namespace() webhook.Namespace {
	return webhook.Namespace{Name: c.Namespace.Name, Labels: c.Namespace.Labels, Selected: c.Namespace.Selected}
}

func (c *injectCase) injector(t testing.TB) *webhook.Injector {
	t.Helper()
	return newInjector(t, c.Config)
}

func newInjector(t testing.TB, cfg config.Inject) *webhook.Injector {
	t.Helper()
	in, err := webhook.NewInjector(cfg, "castellan-system")
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// outcome is what the golden file says besides pod and patch.
type outcome struct {
	Decision webhook.Decision `json:"decision,omitempty"`
	Reason   string           `json:"reason,omitempty"`
	Refused  string           `json:"refused,omitempty"`
	Warnings []string         `json:"warnings,omitempty"`
}

const injectDir = "testdata/inject"

func injectCases(t testing.TB) map[string]*injectCase {
	t.Helper()
	files, err := filepath.Glob(injectDir + "/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	cases := map[string]*injectCase{}
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".yaml")
		if strings.Contains(name, ".") {
			continue // a golden file
		}
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		c := &injectCase{}
		if err := yaml.UnmarshalStrict(data, c); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		asJSON, err := yaml.YAMLToJSON(data)
		if err != nil {
			t.Fatal(err)
		}
		var parts struct{ Pod json.RawMessage }
		if err := json.Unmarshal(asJSON, &parts); err != nil {
			t.Fatal(err)
		}
		c.raw = parts.Pod
		cases[name] = c
	}
	if len(cases) < 60 {
		t.Fatalf("%d cases are there", len(cases))
	}
	return cases
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if got == nil {
			os.Remove(path)
		} else if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil && !(got == nil && errors.Is(err, os.ErrNotExist)) {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got; write anew with -update):\n%s", path, diff)
	}
}

func toYAML(t *testing.T, v any) []byte {
	t.Helper()
	data, err := yaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestInjectGolden(t *testing.T) {
	for name, c := range injectCases(t) {
		t.Run(name, func(t *testing.T) {
			given := c.Pod.DeepCopy()
			result, err := c.injector(t).Inject(&c.Pod, c.namespace())
			if diff := cmp.Diff(given, &c.Pod); diff != "" {
				t.Fatalf("the pod that was given changed:\n%s", diff)
			}
			out := outcome{Decision: result.Decision, Reason: result.Reason, Warnings: result.Warnings}
			if err != nil {
				var refusal *webhook.Refusal
				if !errors.As(err, &refusal) {
					t.Fatalf("%T: %v", err, err)
				}
				out.Refused = err.Error()
			}
			base := filepath.Join(injectDir, name)
			golden(t, base+".out.yaml", toYAML(t, out))
			if result.Decision != webhook.Injected {
				golden(t, base+".pod.yaml", nil)
				golden(t, base+".patch.json", nil)
				return
			}
			golden(t, base+".pod.yaml", toYAML(t, result.Pod))
			patch, err := webhook.Patch(&c.Pod, result.Pod)
			if err != nil {
				t.Fatal(err)
			}
			var ops []any
			if err := json.Unmarshal(patch, &ops); err != nil {
				t.Fatal(err)
			}
			indented, err := json.MarshalIndent(ops, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, base+".patch.json", append(indented, '\n'))
			checkPatch(t, c.raw, patch, result.Pod)
			checkAgain(t, c, result.Pod)
		})
	}
}

// checkPatch applies the patch to the object as the API server has it, with a
// member that our types do not know.
func checkPatch(t *testing.T, raw, patch []byte, want *corev1.Pod) {
	t.Helper()
	decoded, err := jsonpatch.DecodePatch(patch)
	if err != nil {
		t.Fatal(err)
	}
	raw = []byte(strings.Replace(string(raw), `"containers":[{`, `"containers":[{"newerField":{"a":1},`, 1))
	patched, err := decoded.Apply(raw)
	if err != nil {
		t.Fatalf("%v\n%s", err, patch)
	}
	var got corev1.Pod
	if err := json.Unmarshal(patched, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(toYAML(t, want)), string(toYAML(t, got))); diff != "" {
		t.Errorf("the patch makes another pod:\n%s", diff)
	}
	if !strings.Contains(string(patched), `"newerField":{"a":1}`) {
		t.Error("the patch loses a field it does not know")
	}
}

// checkAgain injects what is injected: nothing changes.
func checkAgain(t *testing.T, c *injectCase, pod *corev1.Pod) {
	t.Helper()
	again, err := c.injector(t).Inject(pod, c.namespace())
	if err != nil {
		t.Fatalf("injected pod: %v", err)
	}
	patch, err := webhook.Patch(pod, again.Pod)
	if err != nil || patch != nil {
		t.Errorf("injected again it changes: %s %v", patch, err)
	}
}

// The proxy takes the document that it is given, through the variable as the
// kubelet passes it on.
func TestProxyTakesItsDocument(t *testing.T) {
	for name, c := range injectCases(t) {
		result, err := c.injector(t).Inject(&c.Pod, c.namespace())
		if err != nil || result.Decision != webhook.Injected {
			continue
		}
		found := 0
		for _, container := range append(result.Pod.Spec.InitContainers, result.Pod.Spec.Containers...) {
			for _, e := range container.Env {
				if e.Name != "CASTELLAN_PROXY_CONFIG" {
					continue
				}
				found++
				if strings.Contains(e.Value, "$") {
					t.Errorf("%s: the kubelet would expand %s", name, e.Value)
				}
				t.Setenv(e.Name, e.Value)
				var doc config.Proxy
				if err := config.LoadEnv(e.Name, &doc); err != nil {
					t.Errorf("%s: %s: %v", name, container.Name, err)
				}
			}
		}
		if found != 2 {
			t.Errorf("%s: %d containers have a document, want the init step and the proxy", name, found)
		}
	}
}

// A pod that an API server (v1.36) has filled in and stored, injected, is what people
// copy and create anew: nothing of it changes, and so neither does what they see.
func TestReadBackIsUnchanged(t *testing.T) {
	data, err := os.ReadFile("testdata/readback.json")
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(data, &pod); err != nil {
		t.Fatal(err)
	}
	result, err := newInjector(t, config.Inject{}).Inject(&pod, webhook.Namespace{Name: "shop", Selected: true})
	if err != nil {
		t.Fatal(err)
	}
	if patch, err := webhook.Patch(&pod, result.Pod); err != nil || patch != nil {
		t.Errorf("%s %v", patch, err)
	}
}

// A copy of an injected pod that lost its labels, as kubectl debug makes one, is in
// the mesh again; one whose sidecar was changed gets it anew.
func TestCopiesAreMended(t *testing.T) {
	in, ns := newInjector(t, config.Inject{}), webhook.Namespace{Name: "shop", Selected: true}
	c := injectCases(t)["probes"]
	first, err := in.Inject(&c.Pod, ns)
	if err != nil {
		t.Fatal(err)
	}
	pod := first.Pod.DeepCopy()
	pod.Labels = nil
	proxy := &pod.Spec.InitContainers[1]
	user := int64(0)
	proxy.Image, proxy.SecurityContext.RunAsUser, proxy.VolumeMounts = "evil", &user, nil
	pod.Spec.Containers[0].LivenessProbe = nil
	again, err := in.Inject(pod, ns)
	if err != nil {
		t.Fatal(err)
	}
	want := first.Pod.DeepCopy()
	want.Spec.Containers[0].LivenessProbe = nil
	if diff := cmp.Diff(want.Labels, again.Pod.Labels); diff != "" {
		t.Error(diff)
	}
	got := again.Pod.Spec.InitContainers[1]
	if got.Image != want.Spec.InitContainers[1].Image || *got.SecurityContext.RunAsUser != 1337 || len(got.VolumeMounts) != 2 {
		t.Errorf("%+v", got)
	}
	if strings.Contains(got.Env[0].Value, "/app-health/http/livez") {
		t.Error("a probe that is gone is kept")
	}
	// A document that is no more what was written cannot say what the probes were.
	broken := first.Pod.DeepCopy()
	broken.Spec.InitContainers[1].Env[0].Value = "{}"
	if _, err := in.Inject(broken, ns); err == nil || !strings.Contains(err.Error(), "it was changed since it was injected") {
		t.Errorf("%v", err)
	}
	broken.Spec.InitContainers = broken.Spec.InitContainers[2:]
	if _, err := in.Inject(broken, ns); err == nil || !strings.Contains(err.Error(), "what it asked is lost") {
		t.Errorf("%v", err)
	}
}
