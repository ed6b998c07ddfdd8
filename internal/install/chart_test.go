package install_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"castellan.dev/internal/config"
	"castellan.dev/internal/install"
	"castellan.dev/webhook"
)

// podSpec is that of a Deployment or DaemonSet.
func podTemplate(t *testing.T, o *unstructured.Unstructured) *corev1.PodTemplateSpec {
	t.Helper()
	if o.GetKind() == "Deployment" {
		return &as[appsv1.Deployment](t, o).Spec.Template
	}
	return &as[appsv1.DaemonSet](t, o).Spec.Template
}

// Every container of ours is confined, bounded and watched.
func TestContainers(t *testing.T) {
	for name, text := range variants {
		t.Run(name, func(t *testing.T) {
			r := render(t, text)
			for _, o := range []*unstructured.Unstructured{need(t, r, "Deployment", "castellan-server"), need(t, r, "DaemonSet", "castellan-agent")} {
				template := podTemplate(t, o)
				spec := template.Spec
				if s := spec.SecurityContext; s == nil || s.SeccompProfile == nil || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
					t.Errorf("%s: seccomp %+v", o.GetName(), spec.SecurityContext)
				}
				if spec.HostNetwork || spec.HostPID || spec.HostIPC || spec.PriorityClassName == "" || spec.TerminationGracePeriodSeconds == nil {
					t.Errorf("%s: %+v", o.GetName(), spec)
				}
				if template.Labels["app"] != o.GetName() || template.Labels["sidecar.istio.io/inject"] != "false" {
					t.Errorf("%s: labels %v", o.GetName(), template.Labels)
				}
				if template.Annotations["checksum/config"] == "" {
					t.Errorf("%s does not restart when its configuration changes", o.GetName())
				}
				if !slices.ContainsFunc(spec.Tolerations, func(tol corev1.Toleration) bool {
					return tol.Key == install.TaintKey && tol.Operator == corev1.TolerationOpExists && tol.Effect == ""
				}) {
					t.Errorf("%s waits for what it removes: %+v", o.GetName(), spec.Tolerations)
				}
				for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
					checkContainer(t, c)
				}
			}
		})
	}
}

func checkContainer(t *testing.T, c corev1.Container) {
	t.Helper()
	if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().IsZero() {
		t.Errorf("%s: resources %+v", c.Name, c.Resources)
	}
	if c.LivenessProbe == nil || c.ReadinessProbe == nil || c.StartupProbe == nil {
		t.Errorf("%s is not watched", c.Name)
	}
	if c.TerminationMessagePolicy != corev1.TerminationMessageFallbackToLogsOnError {
		t.Errorf("%s: %s", c.Name, c.TerminationMessagePolicy)
	}
	s := c.SecurityContext
	if s == nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
		t.Fatalf("%s: %+v", c.Name, s)
	}
	if s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || s.Privileged != nil || s.Capabilities == nil ||
		!slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 {
		t.Errorf("%s: %+v", c.Name, s)
	}
}

func TestServerPod(t *testing.T) {
	spec := podTemplate(t, need(t, render(t, ""), "Deployment", "castellan-server")).Spec
	s := spec.SecurityContext
	if s.RunAsNonRoot == nil || !*s.RunAsNonRoot || *s.RunAsUser != 65532 || *s.FSGroup != 65532 {
		t.Errorf("%+v", s)
	}
	strategy := as[appsv1.Deployment](t, need(t, render(t, ""), "Deployment", "castellan-server")).Spec.Strategy
	if strategy.Type != appsv1.RecreateDeploymentStrategyType {
		t.Errorf("two servers on one ledger: %+v", strategy)
	}

	rich := podTemplate(t, need(t, render(t, variants["rich"]), "Deployment", "castellan-server"))
	if rich.Labels["team"] != "mesh" || rich.Annotations["a"] != "b" || rich.Spec.NodeSelector["pool"] != "infra" || rich.Spec.ImagePullSecrets[0].Name != "pull" {
		t.Errorf("%+v", rich)
	}
	c := rich.Spec.Containers[0]
	if c.Image != "registry.example.org/mesh/castellan-server:v1.2.3" || c.ImagePullPolicy != corev1.PullAlways {
		t.Errorf("%s %s", c.Image, c.ImagePullPolicy)
	}
	volumes := map[string]corev1.Volume{}
	for _, v := range rich.Spec.Volumes {
		volumes[v.Name] = v
	}
	if volumes["ledger"].PersistentVolumeClaim.ClaimName != "my-claim" || volumes["chain"].Secret.SecretName != "cacerts" {
		t.Errorf("%+v", volumes)
	}
	if find(render(t, variants["rich"]), "PersistentVolumeClaim", "castellan-ledger") != nil {
		t.Error("a claim is made although there is one")
	}
}

// The pods start anew when their configuration changes, and only then.
func TestChecksum(t *testing.T) {
	sums := func(text string) string {
		r := render(t, text)
		return podTemplate(t, need(t, r, "Deployment", "castellan-server")).Annotations["checksum/config"] + " " +
			podTemplate(t, need(t, r, "DaemonSet", "castellan-agent")).Annotations["checksum/config"]
	}
	before := sums("")
	if again := sums("networkPolicy: {enabled: false}"); again != before {
		t.Error("restarted for nothing")
	}
	after := sums("mesh: {trustDomain: example.org}")
	old, now := strings.Fields(before), strings.Fields(after)
	if old[0] == now[0] || old[1] == now[1] {
		t.Errorf("%v, then %v", old, now)
	}
}

// What the server writes is not in what is applied, so that no upgrade resets it;
// what holds state is kept.
func TestState(t *testing.T) {
	r := render(t, "")
	for _, tt := range []struct {
		kind, name string
		kept       bool
	}{
		{"Secret", "castellan-ca", true}, {"PersistentVolumeClaim", "castellan-ledger", true},
		{"ConfigMap", "castellan-bundle", false}, {"Lease", "castellan-server", false},
	} {
		o := need(t, r, tt.kind, tt.name)
		for _, field := range []string{"data", "stringData", "immutable"} {
			if _, there := o.Object[field]; there {
				t.Errorf("%s %s has %s", tt.kind, tt.name, field)
			}
		}
		if got := o.GetAnnotations()["helm.sh/resource-policy"] == "keep"; got != tt.kept {
			t.Errorf("%s %s: kept %v", tt.kind, tt.name, got)
		}
	}
	if lease := need(t, r, "Lease", "castellan-server"); lease.Object["spec"] != nil {
		t.Errorf("%v", lease.Object)
	}
}

// The chart asks the API server for what the webhooks say they need.
func TestWebhooks(t *testing.T) {
	for name, text := range variants {
		t.Run(name, func(t *testing.T) {
			r := render(t, text)
			cm := as[corev1.ConfigMap](t, need(t, r, "ConfigMap", "castellan-server"))
			var cfg config.Server
			if err := config.Unmarshal([]byte(cm.Data["server.yaml"]), &cfg); err != nil {
				t.Fatal(err)
			}
			mutating, validating := find(r, "MutatingWebhookConfiguration", webhook.InjectorConfiguration), find(r, "ValidatingWebhookConfiguration", webhook.ValidatorConfiguration)
			if cfg.Webhook == nil {
				if mutating != nil || validating != nil {
					t.Error("nobody would answer")
				}
				return
			}
			injector, err := webhook.NewInjector(cfg.Webhook.Inject, "castellan-system")
			if err != nil {
				t.Fatal(err)
			}
			wantMutating, wantValidating := injector.Configurations()
			opts := cmp.Options{
				cmpopts.IgnoreTypes(metav1.ObjectMeta{}, metav1.TypeMeta{}), cmpopts.EquateEmpty(),
				cmpopts.SortSlices(func(a, b metav1.LabelSelectorRequirement) bool { return a.Key+fmt.Sprint(a) < b.Key+fmt.Sprint(b) }),
				// A user's choice.
				cmpopts.IgnoreFields(admissionregistrationv1.MutatingWebhook{}, "FailurePolicy", "TimeoutSeconds"),
			}
			if diff := cmp.Diff(wantMutating, as[admissionregistrationv1.MutatingWebhookConfiguration](t, mutating), opts); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(wantValidating, as[admissionregistrationv1.ValidatingWebhookConfiguration](t, validating), opts); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// The agents' account has no binding of any kind.
func TestAgentIsUnbound(t *testing.T) {
	for name, text := range variants {
		for _, o := range render(t, text).Objects {
			if !strings.HasSuffix(o.GetKind(), "Binding") {
				continue
			}
			subjects, _, err := unstructured.NestedSlice(o.Object, "subjects")
			if err != nil || len(subjects) == 0 {
				t.Fatalf("%v %v", subjects, err)
			}
			for _, s := range subjects {
				if subject, _ := s.(map[string]any); subject["kind"] != "ServiceAccount" || subject["name"] != "castellan-server" {
					t.Errorf("%s: %s binds %v", name, o.GetName(), s)
				}
			}
		}
	}
}

// Older clusters do not know the field, and would refuse the object or drop it.
func TestTokensInSecrets(t *testing.T) {
	for version, want := range map[string]bool{"v1.34.9": false, "v1.35.0": true, "v1.36.3-gke.100": true, "v1.35.0-rc.1": true} {
		r, err := install.Render(install.Options{KubeVersion: version})
		if err != nil {
			t.Fatal(err)
		}
		_, there, _ := unstructured.NestedBool(need(t, r, "CSIDriver", install.Driver).Object, "spec", "serviceAccountTokenInSecrets")
		if there != want {
			t.Errorf("%s: %v", version, there)
		}
	}
}

// Everything that is rendered is of a kind that the installer knows, and named as
// ours; what is in a namespace is in the one that was asked for.
func TestObjects(t *testing.T) {
	for name, text := range variants {
		r, err := install.Render(install.Options{Values: values(t, text), Namespace: "elsewhere"})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, o := range r.Objects {
			id := o.GetKind() + "/" + o.GetName()
			if seen[id] {
				t.Errorf("%s: %s twice", name, id)
			}
			seen[id] = true
			if !install.Known(o.GetKind()) {
				t.Errorf("%s: unknown kind %s", name, id)
			}
			if o.GetLabels()["app.kubernetes.io/managed-by"] != "castellan" || o.GetLabels()["app.kubernetes.io/name"] != "castellan" {
				t.Errorf("%s: %s: labels %v", name, id, o.GetLabels())
			}
			if ns := o.GetNamespace(); ns != "" && ns != "elsewhere" {
				t.Errorf("%s: %s is in %s", name, id, ns)
			}
		}
	}
}
