package kubernetes_test

import (
	"fmt"
	"slices"
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
	agent := agents(t)[slices.IndexFunc(agents(t), func(p podStatus) bool { return p.Spec.NodeName == "node-2" })]
	if tainted, err := hasTaint("node-2"); tainted || err != nil {
		t.Fatalf("tainted from the start: %t, %v", tainted, err)
	}
	node, err := shared.Node("node-2")
	if err != nil {
		t.Fatal(err)
	}
	id := agent.Status.ContainerStatuses[0].ContainerID[len("containerd://"):]
	task(t, node, "pause", id)
	hangs := true
	defer func() {
		if hangs {
			task(t, node, "resume", id)
		}
	}()
	eventually(t, "node-2 is tainted", func() error {
		if tainted, err := hasTaint("node-2"); !tainted {
			return fmt.Errorf("no taint, %w", err)
		}
		return nil
	})
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
	task(t, node, "resume", id)
	hangs = false
	awaitPod(t, ns, "waits")
	if tainted, err := hasTaint("node-2"); tainted || err != nil {
		t.Errorf("still tainted: %t, %v", tainted, err)
	}
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
		spec["terminationGracePeriodSeconds"] = 10
		c := spec["containers"].([]object)[0]
		// As any application that must not lose requests: it serves until it is out of
		// everybody's endpoints.
		c["lifecycle"] = object{"preStop": object{"sleep": object{"seconds": 3}}}
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
	eventually(t, "a pod on each node", func() error {
		if err := ready(2, func(string) bool { return true }); err != nil {
			return err
		}
		return ready(1, func(n string) bool { return n == "node-2" })
	})
	l := startLoad(t, "api."+ns, from.web)
	l.end("stream") // a connection to a pod that goes ends with it
	defer func() {
		if _, err := kubectl("", "uncordon", "node-2"); err != nil {
			t.Error(err)
		}
	}()
	if _, err := kubectl("", "drain", "node-2", "--ignore-daemonsets", "--delete-emptydir-data", "--pod-selector=drain=me", "--timeout=60s"); err != nil {
		t.Error(err)
	}
	eventually(t, "both pods on the other node", func() error { return ready(2, func(n string) bool { return n == "node-1" }) })
	l.goesOn(20)
	l.stop()
}
