package install_test

import (
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"castellan.dev/internal/install"
)

func node(name string, change ...func(*corev1.Node)) *corev1.Node {
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/os": "linux"}},
		Status:     corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{OperatingSystem: "linux", Architecture: "amd64", KernelVersion: "6.1.0-18-amd64"}},
	}
	for _, c := range change {
		c(n)
	}
	return n
}

func storageClass(name string, isDefault bool) *storagev1.StorageClass {
	c := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if isDefault {
		c.Annotations = map[string]string{"storageclass.kubernetes.io/is-default-class": "true"}
	}
	return c
}

// istio is an injector of Istio's that selects namespaces by its usual label.
func istio() *admissionregistrationv1.MutatingWebhookConfiguration {
	path := "/inject"
	return &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "istio-sidecar-injector"},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{
			Name:         "namespace.sidecar-injector.istio.io",
			ClientConfig: admissionregistrationv1.WebhookClientConfig{Service: &admissionregistrationv1.ServiceReference{Name: "istiod", Namespace: "istio-system", Path: &path}},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"istio-injection": "enabled"}},
		}},
	}
}

func labelled(labels map[string]any) map[string]any {
	return map[string]any{"metadata": map[string]any{"labels": labels}}
}

// result finds a check's outcome; its worst, where there are several.
func outcome(t testing.TB, list []install.Result, check string) install.Result {
	t.Helper()
	rank := map[string]int{install.OK: 0, install.Warning: 1, install.Failed: 2}
	var worst *install.Result
	for i, r := range list {
		if r.Check == check && (worst == nil || rank[r.Status] > rank[worst.Status]) {
			worst = &list[i]
		}
	}
	if worst == nil {
		t.Fatalf("no check %q in %+v", check, list)
	}
	return *worst
}

func TestPrecheck(t *testing.T) {
	good := []runtime.Object{node("node-1"), storageClass("standard", true)}
	crd := func(served bool) *unstructured.Unstructured {
		return object("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", "authorizationpolicies.security.istio.io", map[string]any{
			"spec": map[string]any{"versions": []any{map[string]any{"name": "v1", "served": served}}},
		})
	}
	tests := map[string]struct {
		objects []runtime.Object
		values  string
		setup   func(*fakeCluster)

		check, status, message, hint string
	}{
		"version": {objects: good, check: "Kubernetes version", status: install.OK, message: "v1.36.3"},
		"an old version": {objects: good, setup: func(c *fakeCluster) { c.version("v1.30.9-gke.1") },
			check: "Kubernetes version", status: install.Failed, message: "v1.30.9-gke.1 is older than v1.31.0", hint: "upgrade the cluster"},
		"permissions": {objects: good, check: "your permissions", status: install.OK},
		"not an administrator": {objects: good, setup: func(c *fakeCluster) { c.denied["create clusterroles"] = true },
			check: "your permissions", status: install.Failed, message: "you may not create clusterroles.rbac.authorization.k8s.io", hint: "cluster administrator"},
		"nothing there": {objects: good, check: "existing installation", status: install.OK, message: "none"},
		"by Helm": {objects: append(good, object("apps/v1", "Deployment", namespace, "castellan-server", labelled(map[string]any{"app.kubernetes.io/managed-by": "Helm"}))),
			check: "existing installation", status: install.Failed, message: "managed by Helm", hint: "upgrade it with Helm"},
		"in another namespace": {objects: append(good, object("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "", "castellan-server", map[string]any{
			"subjects": []any{map[string]any{"kind": "ServiceAccount", "name": "castellan-server", "namespace": "mesh"}},
		})), check: "existing installation", status: install.Failed, message: "namespace mesh", hint: "-n mesh"},
		"pod security": {objects: append(good, object("v1", "Namespace", "", namespace, labelled(map[string]any{"pod-security.kubernetes.io/enforce": "baseline"}))),
			check: "namespace " + namespace, status: install.Failed, message: "enforce=baseline", hint: "kubectl label namespace"},
		"no CRDs":      {objects: good, check: "policy CRDs", status: install.OK, message: "3 kinds to install"},
		"Istio's CRDs": {objects: append(good, crd(true)), check: "policy CRDs", status: install.OK, message: "those of another installation are used: authorizationpolicies"},
		"old CRDs":     {objects: append(good, crd(false)), check: "policy CRDs", status: install.Failed, message: "does not serve v1"},
		"alone":        {objects: good, check: "other injectors", status: install.OK},
		"Istio":        {objects: append(good, istio()), check: "other injectors", status: install.Failed, message: "istio-sidecar-injector", hint: "defaultRevision=false"},
		"beside Istio": {objects: append(good, istio()), values: "injection: {defaultRevision: false}", check: "other injectors", status: install.OK},
		"no injection": {objects: append(good, istio()), values: "injection: {enabled: false}", check: "other injectors", status: install.OK},
		"nodes":        {objects: good, check: "nodes", status: install.OK, message: "1 of 1"},
		"windows": {objects: append(good, node("win", func(n *corev1.Node) { n.Status.NodeInfo.OperatingSystem = "windows" })),
			check: "nodes", status: install.Warning, message: "win runs windows"},
		"platform": {objects: append(good, node("z", func(n *corev1.Node) { n.Status.NodeInfo.Architecture = "s390x" })),
			check: "nodes", status: install.Failed, message: "z is s390x"},
		"kernel": {objects: append(good, node("old", func(n *corev1.Node) { n.Status.NodeInfo.KernelVersion = "4.18.0-553.el8" })),
			check: "nodes", status: install.Warning, message: "4.18.0"},
		"no node":          {objects: []runtime.Object{storageClass("standard", true)}, check: "nodes", status: install.Failed, message: "none can run an agent"},
		"default class":    {objects: good, check: "ledger's volume", status: install.OK, message: "standard"},
		"no default class": {objects: []runtime.Object{storageClass("fast", false)}, check: "ledger's volume", status: install.Failed, message: "no StorageClass is the default", hint: "there are fast"},
		"a class":          {objects: []runtime.Object{storageClass("fast", false)}, values: "ledger: {storageClass: fast}", check: "ledger's volume", status: install.OK, message: "fast"},
		"no such class":    {objects: good, values: "ledger: {storageClass: fast}", check: "ledger's volume", status: install.Failed, message: "no StorageClass fast", hint: "there are standard"},
		"no such claim":    {objects: good, values: "ledger: {existingClaim: mine}", check: "ledger's volume", status: install.Failed, message: "the claim mine does not exist"},
		"a claim": {objects: []runtime.Object{object("v1", "PersistentVolumeClaim", namespace, "mine", nil)}, values: "ledger: {existingClaim: mine}",
			check: "ledger's volume", status: install.OK, message: "the claim mine exists"},
		"trust domain": {objects: good, check: "trust domain", status: install.OK, message: "cluster.local"},
		"another trust domain": {objects: append(good, object("v1", "ConfigMap", namespace, "castellan-server", map[string]any{
			"data": map[string]any{"server.yaml": "mesh: {trustDomain: example.org}"},
		})), check: "trust domain", status: install.Failed, message: "it is example.org now and would be cluster.local", hint: "mesh.trustDomain=example.org"},
		"a root of before": {objects: append(good, object("v1", "Secret", namespace, "castellan-ca", map[string]any{"data": map[string]any{"root": "eA=="}})),
			check: "trust domain", status: install.OK, message: "the root of a former installation"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, tt.objects...)
			if tt.setup != nil {
				tt.setup(c)
			}
			got := outcome(t, c.installer(t).Precheck(t.Context(), render(t, tt.values)), tt.check)
			if got.Status != tt.status || !strings.Contains(got.Message, tt.message) || !strings.Contains(got.Hint, tt.hint) {
				t.Errorf("%+v, want %s: %q, hint %q", got, tt.status, tt.message, tt.hint)
			}
			if got.Status == install.Failed && got.Hint == "" {
				t.Error("a failure without a hint")
			}
		})
	}
	if writes := newClusterChecked(t, good); len(writes) > 0 {
		t.Errorf("a check changed something: %v", writes)
	}
}

func newClusterChecked(t *testing.T, objects []runtime.Object) []string {
	t.Helper()
	c := newCluster(t, objects...)
	c.installer(t).Precheck(t.Context(), render(t, ""))
	return c.writes()
}
