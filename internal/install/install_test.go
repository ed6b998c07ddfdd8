package install_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"castellan.dev/internal/install"
)

const namespace = install.DefaultNamespace

func mustInstall(t testing.TB, c *fakeCluster, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := c.installer(t).Install(ctx, render(t, text), false); err != nil {
		t.Fatal(err)
	}
}

func position(t testing.TB, list []string, what string) int {
	t.Helper()
	i := slices.Index(list, what)
	if i < 0 {
		t.Fatalf("no %q in\n%s", what, strings.Join(list, "\n"))
	}
	return i
}

func TestInstall(t *testing.T) {
	c := newCluster(t)
	mustInstall(t, c, "")
	writes := c.writes()
	last := -1
	for _, what := range []string{
		"patch namespaces castellan-system", "patch configmaps castellan-install",
		"patch customresourcedefinitions authorizationpolicies.security.istio.io", "patch secrets castellan-ca",
		"patch deployments castellan-server", "patch daemonsets castellan-agent", "patch mutatingwebhookconfigurations castellan-sidecar-injector",
	} {
		at := position(t, writes, what)
		if at < last {
			t.Errorf("%s comes too early in\n%s", what, strings.Join(writes, "\n"))
		}
		last = at
	}
	for _, o := range render(t, "").Objects {
		if n := len(slices.DeleteFunc(slices.Clone(writes), func(w string) bool { return !strings.HasSuffix(w, "s "+o.GetName()) })); n == 0 {
			t.Errorf("%s %s was not applied", o.GetKind(), o.GetName())
		}
	}
	if ns := c.get(t, "", "namespaces", "", namespace); ns.GetLabels()["pod-security.kubernetes.io/enforce"] != "privileged" {
		t.Errorf("%v", ns.GetLabels())
	}
}

// What others wrote into our objects stays when we apply them again.
func TestUpgradeKeeps(t *testing.T) {
	c := newCluster(t)
	mustInstall(t, c, "")
	secret := c.get(t, "", "secrets", namespace, "castellan-ca")
	secret.Object["data"] = map[string]any{"root.key": "a2V5"}
	c.put(t, "secrets", secret)
	validator := c.get(t, "admissionregistration.k8s.io", "validatingwebhookconfigurations", "", "castellan-validator")
	hooks, _, _ := unstructured.NestedSlice(validator.Object, "webhooks")
	hook := hooks[0].(map[string]any)
	if hook["failurePolicy"] != "Ignore" {
		t.Errorf("it begins as %v", hook["failurePolicy"])
	}
	hook["failurePolicy"] = "Fail"
	hook["clientConfig"].(map[string]any)["caBundle"] = "cm9vdA=="
	if err := unstructured.SetNestedSlice(validator.Object, hooks, "webhooks"); err != nil {
		t.Fatal(err)
	}
	c.put(t, "validatingwebhookconfigurations", validator)

	mustInstall(t, c, "server: {logLevel: debug}")
	if data, _, _ := unstructured.NestedStringMap(c.get(t, "", "secrets", namespace, "castellan-ca").Object, "data"); data["root.key"] != "a2V5" {
		t.Errorf("keys are lost: %v", data)
	}
	validator = c.get(t, "admissionregistration.k8s.io", "validatingwebhookconfigurations", "", "castellan-validator")
	hooks, _, _ = unstructured.NestedSlice(validator.Object, "webhooks")
	hook = hooks[0].(map[string]any)
	if hook["failurePolicy"] != "Fail" || hook["clientConfig"].(map[string]any)["caBundle"] != "cm9vdA==" {
		t.Errorf("the server's fields are reset: %v", hook)
	}
}

// What this version, or these values, do not have is removed, unless it is kept or
// has become somebody else's.
func TestPrune(t *testing.T) {
	c := newCluster(t)
	mustInstall(t, c, "")
	policy := c.get(t, "networking.k8s.io", "networkpolicies", namespace, "castellan-agent")
	policy.SetLabels(map[string]string{"app.kubernetes.io/managed-by": "somebody"})
	c.put(t, "networkpolicies", policy)

	mustInstall(t, c, "networkPolicy: {enabled: false}\nledger: {existingClaim: other}")
	if o := c.get(t, "networking.k8s.io", "networkpolicies", namespace, "castellan-server"); o != nil {
		t.Error("castellan-server's NetworkPolicy is still there")
	}
	if o := c.get(t, "networking.k8s.io", "networkpolicies", namespace, "castellan-agent"); o == nil {
		t.Error("somebody else's object was removed")
	}
	if o := c.get(t, "", "persistentvolumeclaims", namespace, "castellan-ledger"); o == nil {
		t.Error("the ledger was removed")
	}
	inventory, _, _ := unstructured.NestedString(c.get(t, "", "configmaps", namespace, "castellan-install").Object, "data", "objects")
	if strings.Contains(inventory, "NetworkPolicy") {
		t.Error("the inventory has what is gone")
	}
}

// Webhooks that are turned off go before the server that answered them, and the
// taint goes with the permission to keep it.
func TestTurnedOff(t *testing.T) {
	c := newCluster(t, taintedNode("node-1"))
	mustInstall(t, c, "")
	node, err := c.typed.CoreV1().Nodes().Get(t.Context(), "node-1", metav1.GetOptions{})
	if err != nil || len(node.Spec.Taints) != 2 {
		t.Errorf("the server's taint was taken away: %v %v", err, node.Spec.Taints)
	}
	c.dynamic.ClearActions()
	mustInstall(t, c, "injection: {enabled: false}\nvalidation: {enabled: false}\nagent: {taintNodes: false}")
	writes := c.writes()
	server := position(t, writes, "patch deployments castellan-server")
	for _, what := range []string{"delete mutatingwebhookconfigurations castellan-sidecar-injector", "delete validatingwebhookconfigurations castellan-validator"} {
		if position(t, writes, what) > server {
			t.Errorf("%s comes too late in\n%s", what, strings.Join(writes, "\n"))
		}
	}
	if node, err = c.typed.CoreV1().Nodes().Get(t.Context(), "node-1", metav1.GetOptions{}); err != nil || len(node.Spec.Taints) != 1 {
		t.Errorf("the taint stays: %v %v", err, node.Spec.Taints)
	}
}

// An installation that fails half-way has said beforehand what it may have made.
func TestInterrupted(t *testing.T) {
	c := newCluster(t)
	ctx, cancel := context.WithCancel(t.Context())
	in, err := install.New(install.Config{Dynamic: c.dynamic, Kubernetes: c.typed, Poll: time.Millisecond, Progress: func(line string) {
		if strings.Contains(line, "waiting for castellan-server") {
			cancel()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	err = in.Install(ctx, render(t, ""), true)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "interrupted while waiting for castellan-server: 0 of 1 ready") {
		t.Fatalf("%v", err)
	}
	mustInstall(t, c, "networkPolicy: {enabled: false}")
	if o := c.get(t, "networking.k8s.io", "networkpolicies", namespace, "castellan-server"); o != nil {
		t.Error("what the first run made is not known to the second")
	}
}

func TestSomebodyElses(t *testing.T) {
	helm := map[string]any{"metadata": map[string]any{"labels": map[string]any{"app.kubernetes.io/managed-by": "Helm"}}}
	c := newCluster(t, object("rbac.authorization.k8s.io/v1", "ClusterRole", "", "castellan-server", helm))
	err := c.installer(t).Install(t.Context(), render(t, ""), false)
	var conflict *install.ConflictError
	if !errors.As(err, &conflict) || conflict.Manager != "Helm" {
		t.Errorf("%v", err)
	}
	c = newCluster(t, object("apps/v1", "Deployment", namespace, "castellan-server", helm))
	if err := c.installer(t).Uninstall(t.Context(), false); !errors.As(err, &conflict) {
		t.Errorf("%v", err)
	}
	restricted := map[string]any{"metadata": map[string]any{"labels": map[string]any{"pod-security.kubernetes.io/enforce": "restricted"}}}
	c = newCluster(t, object("v1", "Namespace", "", namespace, restricted))
	if err := c.installer(t).Install(t.Context(), render(t, ""), false); err == nil || !strings.Contains(err.Error(), "keeps the agents' pods out") {
		t.Errorf("%v", err)
	}
}

// What another installation left behind on purpose is taken over, as it is.
func TestLeftBehind(t *testing.T) {
	c := newCluster(t, object("v1", "Secret", namespace, "castellan-ca", map[string]any{
		"metadata": map[string]any{
			"labels": map[string]any{"app.kubernetes.io/managed-by": "Helm"}, "annotations": map[string]any{"helm.sh/resource-policy": "keep"},
		},
		"data": map[string]any{"root.pem": "cm9vdA=="},
	}))
	if got := outcome(t, c.installer(t).Precheck(t.Context(), render(t, "")), "existing installation"); got.Status != install.OK {
		t.Errorf("%+v", got)
	}
	mustInstall(t, c, "")
	secret := c.get(t, "", "secrets", namespace, "castellan-ca")
	if data, _, _ := unstructured.NestedStringMap(secret.Object, "data"); data["root.pem"] != "cm9vdA==" || secret.GetLabels()["app.kubernetes.io/managed-by"] != "castellan" {
		t.Errorf("%v", secret.Object)
	}
}

func taintedNode(name string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{
			{Key: "other", Effect: corev1.TaintEffectNoSchedule}, {Key: install.TaintKey, Effect: corev1.TaintEffectNoSchedule},
		}},
		Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{OperatingSystem: "linux", Architecture: "amd64", KernelVersion: "6.1.0"}},
	}
}

func TestUninstall(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop"}, Spec: corev1.PodSpec{
		Volumes: []corev1.Volume{{Name: "identity", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: install.Driver}}}},
	}}
	c := newCluster(t, taintedNode("node-1"), pod)
	mustInstall(t, c, "")
	c.dynamic.ClearActions()
	if err := c.installer(t).Uninstall(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	writes := c.writes()
	last := -1
	for _, what := range []string{
		"delete mutatingwebhookconfigurations castellan-sidecar-injector", "delete validatingwebhookconfigurations castellan-validator",
		"delete deployments castellan-server", "delete daemonsets castellan-agent", "delete clusterroles castellan-server", "delete configmaps castellan-install",
	} {
		at := position(t, writes, what)
		if at < last {
			t.Errorf("%s comes too early in\n%s", what, strings.Join(writes, "\n"))
		}
		last = at
	}
	node, err := c.typed.CoreV1().Nodes().Get(t.Context(), "node-1", metav1.GetOptions{})
	if err != nil || len(node.Spec.Taints) != 1 || node.Spec.Taints[0].Key != "other" {
		t.Errorf("%v %+v", err, node.Spec.Taints)
	}
	for resource, name := range map[string]string{"secrets": "castellan-ca", "persistentvolumeclaims": "castellan-ledger"} {
		if c.get(t, "", resource, namespace, name) == nil {
			t.Errorf("%s %s is gone", resource, name)
		}
	}
	if c.get(t, "", "namespaces", "", namespace) == nil {
		t.Error("the namespace is gone, and with it the keys")
	}
	if !strings.Contains(c.heard(), "1 pods still have an identity of Castellan: shop (1)") {
		t.Errorf("no warning in\n%s", c.heard())
	}
	// Again: nothing is left to do, and that is no error.
	if err := c.installer(t).Uninstall(t.Context(), false); err != nil {
		t.Error(err)
	}
}

func TestPurge(t *testing.T) {
	c := newCluster(t)
	mustInstall(t, c, "")
	if err := c.installer(t).Uninstall(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	for resource, name := range map[string]string{"secrets": "castellan-ca", "persistentvolumeclaims": "castellan-ledger"} {
		if c.get(t, "", resource, namespace, name) != nil {
			t.Errorf("%s %s is still there", resource, name)
		}
	}
	if c.get(t, "", "namespaces", "", namespace) != nil {
		t.Error("the namespace is still there")
	}

	// A namespace that was there before is not ours to remove.
	c = newCluster(t, object("v1", "Namespace", "", namespace, nil))
	mustInstall(t, c, "")
	if err := c.installer(t).Uninstall(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if c.get(t, "", "namespaces", "", namespace) == nil {
		t.Error("somebody's namespace is gone")
	}
}

// Where the inventory was lost, what bears our label is found all the same.
func TestUninstallWithoutInventory(t *testing.T) {
	c := newCluster(t)
	mustInstall(t, c, "")
	lost := c.get(t, "", "configmaps", namespace, "castellan-install")
	if err := c.dynamic.Tracker().Delete(configMaps, namespace, lost.GetName()); err != nil {
		t.Fatal(err)
	}
	if err := c.installer(t).Uninstall(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	for _, gone := range [][3]string{{"apps", "deployments", "castellan-server"}, {"apps", "daemonsets", "castellan-agent"}} {
		if c.get(t, gone[0], gone[1], namespace, gone[2]) != nil {
			t.Errorf("%v is still there", gone)
		}
	}
}
