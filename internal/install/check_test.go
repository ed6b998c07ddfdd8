package install_test

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"

	"castellan.dev/internal/install"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

// running is a cluster in which all is well, for cases to change.
type running struct {
	*fakeCluster
	root string // PEM
}

func pod(ns, name, app, nodeName, image string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": app}},
		Spec:       corev1.PodSpec{NodeName: nodeName, Containers: []corev1.Container{{Name: app, Image: image}}},
		Status: corev1.PodStatus{
			Phase:             corev1.PodRunning,
			Conditions:        []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: app, Image: image, Ready: true}},
		},
	}
	for _, c := range change {
		c(p)
	}
	return p
}

// injected gives a pod a sidecar.
func injected(tag string, ready bool) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Labels["security.istio.io/tlsMode"] = "istio"
		image := "docker.io/castellan/castellan-proxy:" + tag
		p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: "istio-proxy", Image: image})
		status := corev1.ContainerStatus{Name: "istio-proxy", Image: image, Ready: ready}
		if !ready {
			status.State.Running = &corev1.ContainerStateRunning{}
		}
		p.Status.InitContainerStatuses = append(p.Status.InitContainerStatuses, status)
	}
}

func csiNode(name string, drivers ...string) *storagev1.CSINode {
	n := &storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, d := range drivers {
		n.Spec.Drivers = append(n.Spec.Drivers, storagev1.CSINodeDriver{Name: d, NodeID: name})
	}
	return n
}

func well(t testing.TB, more ...runtime.Object) *running {
	t.Helper()
	root := tlsconftest.NewRoot(t)
	r := &running{root: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Cert.Raw}))}
	r.fakeCluster = newCluster(t, append([]runtime.Object{
		node("node-1"), node("node-2"), csiNode("node-1", "other", install.Driver), csiNode("node-2", install.Driver),
		pod(namespace, "server", "castellan-server", "node-1", "docker.io/castellan/castellan-server:dev"),
		pod(namespace, "agent-1", "castellan-agent", "node-1", "docker.io/castellan/castellan-agent:dev"),
		pod(namespace, "agent-2", "castellan-agent", "node-2", "docker.io/castellan/castellan-agent:dev"),
		pod("shop", "web", "web", "node-1", "docker.io/local/web:1", injected("dev", true)),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio-injection": "enabled"}}},
	}, more...)...)
	mustInstall(t, r.fakeCluster, "")
	r.status(t, "deployments", "castellan-server", map[string]any{"updatedReplicas": int64(1), "availableReplicas": int64(1), "replicas": int64(1)})
	r.status(t, "daemonsets", "castellan-agent", map[string]any{"desiredNumberScheduled": int64(2), "updatedNumberScheduled": int64(2), "numberAvailable": int64(2)})
	r.set(t, "", "secrets", namespace, "castellan-ca", map[string]any{"root.key": "a2V5"}, "data")
	r.set(t, "", "configmaps", namespace, "castellan-bundle", map[string]any{"bundle.pem": r.root}, "data")
	r.trust(t, "mutatingwebhookconfigurations", "castellan-sidecar-injector", r.root, "Fail")
	r.trust(t, "validatingwebhookconfigurations", "castellan-validator", r.root, "Fail")
	return r
}

func (r *running) set(t testing.TB, group, resource, ns, name string, value any, path ...string) {
	t.Helper()
	o := r.get(t, group, resource, ns, name)
	if err := unstructured.SetNestedField(o.Object, value, path...); err != nil {
		t.Fatal(err)
	}
	r.put(t, resource, o)
}

func (r *running) status(t testing.TB, resource, name string, status map[string]any) {
	t.Helper()
	r.set(t, "apps", resource, namespace, name, status, "status")
}

func (r *running) trust(t testing.TB, resource, name, pemText, failurePolicy string) {
	t.Helper()
	o := r.get(t, "admissionregistration.k8s.io", resource, "", name)
	hooks, _, err := unstructured.NestedSlice(o.Object, "webhooks")
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range hooks {
		hook := h.(map[string]any)
		hook["clientConfig"].(map[string]any)["caBundle"] = base64.StdEncoding.EncodeToString([]byte(pemText))
		hook["failurePolicy"] = failurePolicy
	}
	if err := unstructured.SetNestedSlice(o.Object, hooks, "webhooks"); err != nil {
		t.Fatal(err)
	}
	r.put(t, resource, o)
}

func (r *running) policy(t testing.TB, conditions ...any) {
	t.Helper()
	o := object("security.istio.io/v1", "AuthorizationPolicy", "shop", "allow", map[string]any{"status": map[string]any{"conditions": conditions}})
	r.put(t, "authorizationpolicies", o)
}

func policyCondition(kind, status, message string) map[string]any {
	return map[string]any{"type": kind, "status": status, "message": message}
}

func TestCheckWell(t *testing.T) {
	r := well(t)
	r.policy(t, policyCondition("Accepted", "True", ""), policyCondition("Programmed", "True", ""))
	for _, got := range r.installer(t).Check(t.Context()) {
		if got.Status != install.OK {
			t.Errorf("%+v", got)
		}
	}
}

func TestCheckNothing(t *testing.T) {
	got := newCluster(t).installer(t).Check(t.Context())
	if len(got) != 1 || got[0].Status != install.Failed || !strings.Contains(got[0].Message, "Castellan is not in namespace castellan-system") {
		t.Errorf("%+v", got)
	}
}

// Who may not read the nodes is told what of the rest is well.
func TestCheckInPart(t *testing.T) {
	r := well(t)
	r.typed.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "", errors.New("no"))
	})
	list := r.installer(t).Check(t.Context())
	for check, status := range map[string]string{"node taints": install.Failed, "agent on each node": install.Failed, "server": install.OK, "sidecars": install.OK, "versions": install.OK} {
		if got := outcome(t, list, check); got.Status != status {
			t.Errorf("%+v", got)
		}
	}
}

func TestCheckFinds(t *testing.T) {
	other := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tlsconftest.NewRoot(t).Cert.Raw}))
	expired := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tlsconftest.NewRoot(t, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	}).Cert.Raw}))
	tests := map[string]struct {
		more  []runtime.Object
		spoil func(*testing.T, *running)

		check, status, message, hint string
	}{
		"an object is gone": {spoil: func(t *testing.T, r *running) {
			if err := r.dynamic.Tracker().Delete(configMaps, namespace, "castellan-agent"); err != nil {
				t.Fatal(err)
			}
		}, check: "installation", status: install.Failed, message: "ConfigMap castellan-system/castellan-agent"},
		"server": {spoil: func(t *testing.T, r *running) {
			r.status(t, "deployments", "castellan-server", map[string]any{"updatedReplicas": int64(1), "replicas": int64(1)})
		}, check: "server", status: install.Failed, message: "0 of 1 ready"},
		"a server scaled to none": {spoil: func(t *testing.T, r *running) {
			r.set(t, "apps", "deployments", namespace, "castellan-server", int64(0), "spec", "replicas")
			r.status(t, "deployments", "castellan-server", map[string]any{})
		}, check: "server", status: install.Failed, message: "0 of 1 ready"},
		"a rollout": {spoil: func(t *testing.T, r *running) {
			r.status(t, "daemonsets", "castellan-agent", map[string]any{"desiredNumberScheduled": int64(2), "updatedNumberScheduled": int64(1), "numberAvailable": int64(2)})
		}, check: "agents", status: install.Failed, message: "1 of 2 ready"},
		"a node without an agent": {more: []runtime.Object{node("node-3")}, check: "agent on node-3", status: install.Failed, message: "none is ready"},
		"not registered": {more: []runtime.Object{
			node("node-3"), csiNode("node-3"), pod(namespace, "agent-3", "castellan-agent", "node-3", "docker.io/castellan/castellan-agent:dev"),
		}, check: "CSI driver", status: install.Failed, message: "not registered on node-3"},
		"tainted": {more: []runtime.Object{taintedNode("node-3")}, check: "node taints", status: install.Failed, message: "node-3"},
		"no keys": {spoil: func(t *testing.T, r *running) {
			r.set(t, "", "secrets", namespace, "castellan-ca", map[string]any{}, "data")
		}, check: "authority's keys", status: install.Failed, message: "is empty"},
		"no roots": {spoil: func(t *testing.T, r *running) {
			r.set(t, "", "configmaps", namespace, "castellan-bundle", map[string]any{}, "data")
		}, check: "published roots", status: install.Failed, message: "holds none"},
		"roots that are none": {spoil: func(t *testing.T, r *running) {
			r.set(t, "", "configmaps", namespace, "castellan-bundle", map[string]any{"bundle.pem": "hello"}, "data")
		}, check: "published roots", status: install.Failed, message: "holds none"},
		"an expired root": {spoil: func(t *testing.T, r *running) {
			r.set(t, "", "configmaps", namespace, "castellan-bundle", map[string]any{"bundle.pem": expired}, "data")
		}, check: "published roots", status: install.Failed, message: "expired at"},
		"no caBundle": {spoil: func(t *testing.T, r *running) {
			r.trust(t, "mutatingwebhookconfigurations", "castellan-sidecar-injector", "", "Fail")
		}, check: "castellan-sidecar-injector", status: install.Failed, message: "it has no caBundle"},
		"another's caBundle": {spoil: func(t *testing.T, r *running) {
			r.trust(t, "validatingwebhookconfigurations", "castellan-validator", other, "Fail")
		}, check: "castellan-validator", status: install.Failed, message: "none of the published roots"},
		"old and new": {spoil: func(t *testing.T, r *running) {
			r.trust(t, "validatingwebhookconfigurations", "castellan-validator", other+r.root, "Fail")
		}, check: "castellan-validator", status: install.OK},
		"failures ignored": {spoil: func(t *testing.T, r *running) {
			r.trust(t, "validatingwebhookconfigurations", "castellan-validator", r.root, "Ignore")
		}, check: "castellan-validator", status: install.Warning, message: "failures are ignored"},
		"an old agent": {more: []runtime.Object{
			node("node-3"), csiNode("node-3", install.Driver), pod(namespace, "agent-3", "castellan-agent", "node-3", "docker.io/castellan/castellan-agent:v0@sha256:00"),
		}, check: "versions", status: install.Warning, message: "node-3 has v0"},
		"an old sidecar": {more: []runtime.Object{pod("shop", "old", "old", "node-1", "x:1", injected("v0", true))},
			check: "versions", status: install.Warning, message: "shop/old"},
		"a pod without a sidecar": {more: []runtime.Object{pod("shop", "plain", "plain", "node-1", "x:1")},
			check: "sidecars", status: install.Warning, message: "shop/plain"},
		"a pod that opted out": {more: []runtime.Object{pod("shop", "out", "out", "node-1", "x:1", func(p *corev1.Pod) { p.Labels["sidecar.istio.io/inject"] = "false" })},
			check: "sidecars", status: install.OK},
		"an unready sidecar": {more: []runtime.Object{pod("shop", "stuck", "stuck", "node-1", "x:1", injected("dev", false))},
			check: "sidecars", status: install.Failed, message: "shop/stuck (no identity or no policy yet)", hint: "kubectl logs -n shop stuck -c istio-proxy;"},
		"a refused policy": {spoil: func(t *testing.T, r *running) {
			r.policy(t, policyCondition("Accepted", "False", "spec.rules[0].from: nonsense"))
		}, check: "AuthorizationPolicy shop/allow", status: install.Failed, message: "refused: spec.rules[0].from: nonsense"},
		"not acknowledged": {spoil: func(t *testing.T, r *running) {
			r.policy(t, policyCondition("Accepted", "True", ""), policyCondition("Programmed", "False", "1 of 2 proxies"))
		}, check: "AuthorizationPolicy shop/allow", status: install.Warning, message: "1 of 2 proxies"},
		"not looked at": {spoil: func(t *testing.T, r *running) { r.policy(t) },
			check: "AuthorizationPolicy shop/allow", status: install.Warning, message: "has not looked at it"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := well(t, tt.more...)
			if tt.spoil != nil {
				tt.spoil(t, r)
			}
			got := outcome(t, r.installer(t).Check(t.Context()), tt.check)
			if got.Status != tt.status || !strings.Contains(got.Message, tt.message) {
				t.Errorf("%+v, want %s: %q", got, tt.status, tt.message)
			}
			if got.Status == install.Failed && got.Hint == "" || !strings.HasPrefix(got.Hint, tt.hint) {
				t.Errorf("the hint is %q, want %q", got.Hint, tt.hint)
			}
		})
	}
}
