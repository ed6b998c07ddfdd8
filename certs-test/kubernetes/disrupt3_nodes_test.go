package kubernetes_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
)

const agentTaint = "castellan.dev/agent-not-ready"

func hasTaint(node string) (bool, error) {
	var n struct {
		Spec struct{ Taints []struct{ Key string } }
	}
	err := api.get("/api/v1/nodes/"+node, &n)
	return slices.ContainsFunc(n.Spec.Taints, func(t struct{ Key string }) bool { return t.Key == agentTaint }), err
}

// Promise: a node is tainted until its agent is ready, so that no pod starts without
// one; a pod that wants to go there waits.
func TestDisruptNodeWithoutAgentIsTainted(t *testing.T) {
	needCluster(t)
	const ns = "tainted"
	namespace(t, ns, injected)
	// An agent that hangs is as good as none.
	name := agentOf(t, "node-2").Name
	taint := func(want bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("node-2 is tainted: %t", want), func() error {
			if tainted, err := hasTaint("node-2"); err != nil || tainted != want {
				return fmt.Errorf("%t, %w", tainted, err)
			}
			return nil
		})
	}
	taint(false)
	if err := account(ns, "waits"); err != nil {
		t.Fatal(err)
	}
	node, err := shared.Node("node-2")
	if err != nil {
		t.Fatal(err)
	}
	id := containerOf(t, name)
	task(t, node, "pause", id)
	resume := sync.OnceFunc(func() {
		eventually(t, "the agent goes on", func() error {
			err := tryTask(node, "resume", id)
			if err != nil && containerOf(t, name) != id {
				return nil // its liveness probe has made an end of it meanwhile
			}
			return err
		})
	})
	defer resume()
	taint(true)
	create(t, ns, pod{Name: "waits", Node: "node-2"})
	eventually(t, "the pod waits", func() error {
		var p podStatus
		if err := api.get("/api/v1/namespaces/"+ns+"/pods/waits", &p); err != nil {
			return err
		}
		for _, c := range p.Status.Conditions {
			if c.Type == "PodScheduled" && c.Status == "False" {
				return nil
			}
		}
		return fmt.Errorf("%+v", p.Status)
	})
	resume()
	awaitPod(t, ns, "waits")
	taint(false)
}

// containerOf is the ID of the one container of a pod of ours; empty while it has none.
func containerOf(t *testing.T, name string) string {
	t.Helper()
	var p podStatus
	if err := api.get("/api/v1/namespaces/castellan-system/pods/"+name, &p); err != nil {
		t.Fatal(err)
	}
	if len(p.Status.ContainerStatuses) == 0 {
		return ""
	}
	return strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://")
}

// Promise: a node is drained, and no request fails: the pods that come in place of
// those that go get their identities elsewhere.
func TestDisruptNodeDrained(t *testing.T) {
	needCluster(t)
	from := site(t)
	const ns = "drained"
	namespace(t, ns, injected)
	service(t, ns, "api")
	p := pod{Name: "api", Labels: map[string]string{"drain": "me"}, Change: func(spec object) {
		spec["terminationGracePeriodSeconds"] = 30
		c := spec["containers"].([]object)[0]
		// As any application that must not lose requests: it serves until it is out of
		// everybody's endpoints, however slow the machine.
		c["lifecycle"] = object{"preStop": object{"sleep": object{"seconds": 12}}}
		spec["topologySpreadConstraints"] = []object{{
			"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
			"labelSelector": object{"matchLabels": object{"app": "api"}},
		}}
	}}
	if err := account(ns, "api"); err != nil {
		t.Fatal(err)
	}
	template := p.object(ns)
	delete(template["metadata"].(object), "name")
	err := api.post("/apis/apps/v1/namespaces/"+ns+"/deployments", object{
		"metadata": object{"name": "api"},
		"spec":     object{"replicas": 2, "selector": object{"matchLabels": object{"app": "api"}}, "template": template},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ready := func(want int, on func(string) bool) error {
		found := 0
		for _, p := range listPods(t, ns, "app%3Dapi") {
			if p.ready() && p.Metadata.DeletionTimestamp == nil && on(p.Spec.NodeName) {
				found++
			}
		}
		if found != want {
			return fmt.Errorf("%d pods are ready", found)
		}
		return nil
	}
	within(t, 2*patience, "a pod on each node", func() error {
		if err := ready(2, func(string) bool { return true }); err != nil {
			return err
		}
		err := ready(1, func(n string) bool { return n == "node-2" })
		if err != nil { // both are on one: to spread them is a wish only
			_ = api.remove("/api/v1/namespaces/" + ns + "/pods/" + listPods(t, ns, "app%3Dapi")[0].Metadata.Name)
		}
		return err
	})
	l := startLoad(t, "api."+ns, from.web)
	l.end("stream") // a connection to a pod that goes ends with it
	defer func() {
		if _, err := kubectl("", "uncordon", "node-2"); err != nil {
			t.Error(err)
		}
	}()
	if _, err := kubectl("", "drain", "node-2", "--ignore-daemonsets", "--delete-emptydir-data", "--pod-selector=drain=me", "--timeout=120s"); err != nil {
		t.Error(err)
	}
	within(t, 2*patience, "both pods on the other node", func() error { return ready(2, func(n string) bool { return n == "node-1" }) })
	l.goesOn(20)
	l.stop()
}
