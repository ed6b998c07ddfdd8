package webhook_test

import (
	"os"
	"slices"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	"sigs.k8s.io/yaml"

	"castellan.dev/internal/config"
	"castellan.dev/webhook"
)

func TestConflicts(t *testing.T) {
	data, err := os.ReadFile("testdata/istio.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var others admissionregistrationv1.MutatingWebhookConfigurationList
	if err := yaml.UnmarshalStrict(data, &others); err != nil {
		t.Fatal(err)
	}
	ours, _ := newInjector(t, config.Inject{}).Configurations()
	list := append(others.Items, *ours)
	off := false
	there := []webhook.Namespace{{Name: "kube-system"}, {Name: "legacy", Labels: map[string]string{"istio-injection": "enabled"}}}
	for name, row := range map[string]struct {
		cfg        config.Inject
		namespaces []webhook.Namespace
		want       []string
	}{
		"both want the default labels": {config.Inject{}, nil, []string{
			"webhook rev.namespace.sidecar-injector.istio.io of istio-sidecar-injector selects the same pods in a namespace labelled istio.io/rev=default",
			"webhook rev.object.sidecar-injector.istio.io of istio-sidecar-injector selects the same pods labelled istio.io/rev=default in a namespace labelled not at all",
			"webhook namespace.sidecar-injector.istio.io of istio-sidecar-injector selects the same pods in a namespace labelled istio-injection=enabled",
			"webhook object.sidecar-injector.istio.io of istio-sidecar-injector selects the same pods labelled sidecar.istio.io/inject=true in a namespace labelled not at all",
		}},
		"side by side":  {config.Inject{DefaultRevision: &off}, nil, nil},
		"same revision": {config.Inject{DefaultRevision: &off, Revision: "canary"}, nil, []string{"webhook rev.namespace.sidecar-injector.istio.io of istio-sidecar-injector-canary selects the same pods in a namespace labelled istio.io/rev=canary"}},
		"a namespace there is": {config.Inject{Revision: "canary", DefaultRevision: nil}, there, []string{
			"webhook rev.namespace.sidecar-injector.istio.io of istio-sidecar-injector selects the same pods in a namespace labelled istio.io/rev=default",
			"webhook rev.object.sidecar-injector.istio.io of istio-sidecar-injector selects the same pods labelled istio.io/rev=default in a namespace labelled not at all",
			"webhook namespace.sidecar-injector.istio.io of istio-sidecar-injector selects the same pods in namespace legacy",
			"webhook object.sidecar-injector.istio.io of istio-sidecar-injector selects the same pods labelled sidecar.istio.io/inject=true in a namespace labelled not at all",
			"webhook rev.namespace.sidecar-injector.istio.io of istio-sidecar-injector-canary selects the same pods in a namespace labelled istio.io/rev=canary",
			"webhook sidecars.mesh.example of from-elsewhere selects the same pods in namespace legacy",
		}},
		"its namespace is not ours": {config.Inject{DefaultRevision: &off}, there, nil},
	} {
		var got []string
		for _, c := range newInjector(t, row.cfg).Conflicts(list, webhook.InjectorConfiguration, row.namespaces) {
			got = append(got, c.String())
			if c.Hint() == "" {
				t.Errorf("%s: no hint", name)
			}
		}
		if !slices.Equal(got, row.want) {
			t.Errorf("%s:\n got %q\nwant %q", name, got, row.want)
		}
	}
}
