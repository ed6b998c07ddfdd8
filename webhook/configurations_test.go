package webhook_test

import (
	"bytes"
	"fmt"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"castellan.dev/internal/config"
	"castellan.dev/webhook"
)

func TestConfigurationsGolden(t *testing.T) {
	off := false
	for file, cfg := range map[string]config.Inject{
		"configurations.yaml":              {},
		"configurations-beside-istio.yaml": {DefaultRevision: &off, Revision: "blue", ExcludeNamespaces: []string{"storage"}},
	} {
		m, v := newInjector(t, cfg).Configurations()
		golden(t, "testdata/"+file, bytes.Join([][]byte{toYAML(t, m), toYAML(t, v)}, []byte("---\n")))
	}
}

// The API server selects by the configuration and the injector by its own reading
// of the same labels. Where they differ, a pod would be asked about in vain or, worse,
// never.
func TestSelectorsAreTheInjectors(t *testing.T) {
	off := false
	values := map[string][]string{
		"istio-injection":         {"", "enabled", "disabled", "other"},
		"istio.io/rev":            {"", "castellan", "default", "canary"},
		"sidecar.istio.io/inject": {"", "true", "false"},
	}
	sets := func(keys ...string) []map[string]string {
		out := []map[string]string{{}}
		for _, key := range keys {
			var next []map[string]string
			for _, set := range out {
				for _, value := range values[key] {
					more := map[string]string{}
					for k, v := range set {
						more[k] = v
					}
					if value != "" {
						more[key] = value
					}
					next = append(next, more)
				}
			}
			out = next
		}
		return out
	}
	for _, cfg := range []config.Inject{{}, {DefaultRevision: &off}, {Revision: "canary", ExcludeNamespaces: []string{"storage"}}} {
		in := newInjector(t, cfg)
		m, _ := in.Configurations()
		asked := 0
		for _, ns := range []string{"shop", "kube-system", "castellan-system", "storage"} {
			for _, nsLabels := range sets("istio-injection", "istio.io/rev") {
				for _, podLabels := range sets("istio.io/rev", "sidecar.istio.io/inject") {
					pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: podLabels},
						Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "a"}}}}
					result, err := in.Inject(pod, webhook.Namespace{Name: ns, Labels: nsLabels})
					if err != nil {
						t.Fatal(err)
					}
					n := selectedBy(t, m, ns, nsLabels, podLabels)
					if n > 1 {
						t.Errorf("%s %v %v: asked %d times", ns, nsLabels, podLabels, n)
					}
					if (n > 0) != (result.Decision == webhook.Injected) {
						t.Errorf("%s %v %v: asked %d times, but %s (%s)", ns, nsLabels, podLabels, n, result.Decision, result.Reason)
					}
					asked += n
				}
			}
		}
		if asked == 0 {
			t.Error("no pod is asked about")
		}
	}
}

// selectedBy counts the webhooks that would be called, as the API server does.
func selectedBy(t *testing.T, m *admissionregistrationv1.MutatingWebhookConfiguration, ns string, nsLabels, podLabels map[string]string) int {
	t.Helper()
	match := func(s *metav1.LabelSelector, set labels.Set) bool {
		selector, err := metav1.LabelSelectorAsSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		return selector.Matches(set)
	}
	n := 0
	for _, w := range m.Webhooks {
		of := labels.Merge(nsLabels, labels.Set{"kubernetes.io/metadata.name": ns})
		if match(w.NamespaceSelector, of) && match(w.ObjectSelector, podLabels) {
			n++
		}
	}
	return n
}

func TestConfigurationsFailAsDocumented(t *testing.T) {
	m, v := newInjector(t, config.Inject{}).Configurations()
	for _, w := range m.Webhooks {
		if *w.FailurePolicy != admissionregistrationv1.Fail || *w.SideEffects != admissionregistrationv1.SideEffectClassNone ||
			*w.ReinvocationPolicy != admissionregistrationv1.NeverReinvocationPolicy || *w.TimeoutSeconds > 10 {
			t.Errorf("%s: %+v", w.Name, w)
		}
	}
	for _, w := range v.Webhooks {
		for _, r := range w.Rules {
			if got := fmt.Sprint(r.Operations); got != "[CREATE UPDATE]" {
				t.Errorf("%s is asked about %s; a deletion must never wait for it", w.Name, got)
			}
		}
	}
}
