package kubernetes_test

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
)

// callers are pods that many tests call from. They stay until the cluster goes.
type callers struct {
	// web and far have one account, on the first and the second node.
	web, far *app
	// other has another account.
	other *app
	// plain is outside the mesh.
	plain *app
}

var (
	callersOnce  = new(sync.Once)
	callersFound *callers
)

// site makes the callers, or finds those of an earlier run in this cluster.
func site(t testing.TB) *callers {
	t.Helper()
	needCluster(t)
	callersOnce.Do(func() {
		ensureNamespace(t, "callers", object{"istio-injection": "enabled"})
		ensureNamespace(t, "outside", nil)
		pods := []pod{
			{Name: "web", Account: "web", Node: "node-1"},
			{Name: "far", Account: "web", Node: "node-2"},
			{Name: "other", Node: "node-1"},
		}
		ensurePods(t, "callers", pods...)
		ensurePods(t, "outside", pod{Name: "plain", Node: "node-1"})
		callersFound = &callers{
			web: awaitPod(t, "callers", "web"), far: awaitPod(t, "callers", "far"), other: awaitPod(t, "callers", "other"),
			plain: awaitPod(t, "outside", "plain"),
		}
	})
	if callersFound == nil {
		t.Fatal("the pods that call did not become ready: see the first test that failed")
	}
	return callersFound
}

func ensureNamespace(t testing.TB, name string, labels object) {
	t.Helper()
	eventually(t, "namespace "+name, func() error {
		err := api.post("/api/v1/namespaces", object{"metadata": object{"name": name, "labels": labels}}, nil)
		if !isStatus(err, http.StatusConflict) {
			return err
		}
		var ns struct{ Status struct{ Phase string } }
		if err := api.get("/api/v1/namespaces/"+name, &ns); err != nil {
			return err
		}
		if ns.Status.Phase != "Active" {
			return fmt.Errorf("it is %s", ns.Status.Phase)
		}
		return nil
	})
}

func ensurePods(t testing.TB, ns string, pods ...pod) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			dumpNamespace(t, ns)
		}
	})
	for _, p := range pods {
		if err := account(ns, p.account()); err != nil {
			t.Fatal(err)
		}
		if err := createPod(ns, p); err != nil && !isStatus(err, http.StatusConflict) {
			t.Fatal(err)
		}
	}
}

// forgotten lets site make the callers again.
func forgotten() { callersOnce, callersFound = new(sync.Once), nil }

// forgetCallers makes anew what site makes: their proxies are of an older image.
func forgetCallers() error {
	for _, ns := range []string{"callers", "outside", "steady"} {
		if err := api.remove("/api/v1/namespaces/" + ns); err != nil && !isStatus(err, http.StatusNotFound) {
			return err
		}
	}
	return nil
}
