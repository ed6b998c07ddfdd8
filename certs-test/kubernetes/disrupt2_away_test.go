package kubernetes_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// scaleServer sets how many servers there are, and waits until it is so.
func scaleServer(t *testing.T, replicas int) {
	t.Helper()
	const url = "/apis/apps/v1/namespaces/castellan-system/deployments/castellan-server"
	if err := api.merge(url, object{"spec": object{"replicas": replicas}}); err != nil {
		t.Fatal(err)
	}
	within(t, 2*patience, fmt.Sprintf("%d servers are ready", replicas), func() error {
		ready := 0
		pods := listPods(t, "castellan-system", "app%3Dcastellan-server")
		for _, p := range pods {
			if p.ready() {
				ready++
			}
		}
		if len(pods) != replicas || ready != replicas {
			return fmt.Errorf("%d pods, %d ready", len(pods), ready)
		}
		return nil
	})
}

// Promise: while no server answers, pods that would be injected and policies wait
// (they fail closed), all else goes on, and the server needs nobody's leave to come
// back: there is no deadlock.
func TestDisruptWebhookDown(t *testing.T) {
	needCluster(t)
	const labelled, plain = "away-labelled", "away-plain"
	namespace(t, labelled, injected)
	namespace(t, plain)
	for _, ns := range []string{labelled, plain} {
		if err := account(ns, "app"); err != nil {
			t.Fatal(err)
		}
	}
	disrupted(t, func(l *loads) {
		scaleServer(t, 0)
		back := false
		defer func() {
			if !back {
				scaleServer(t, 1)
			}
		}()
		try := func(ns string, p pod) error {
			p.Name, p.Account = "app", "app"
			return api.post("/api/v1/namespaces/"+ns+"/pods?dryRun=All", p.object(ns), nil)
		}
		if err := try(labelled, pod{}); err == nil || !strings.Contains(err.Error(), "webhook") {
			t.Errorf("a pod that is to be injected: %v, want that it is refused", err)
		}
		if err := try(labelled, pod{Labels: map[string]string{"sidecar.istio.io/inject": "false"}}); err != nil {
			t.Errorf("a pod that declines: %v", err)
		}
		for _, ns := range []string{plain, "kube-system", "castellan-system"} {
			if err := account(ns, "app"); err != nil {
				t.Fatal(err)
			}
			if err := try(ns, pod{}); err != nil {
				t.Errorf("a pod of %s: %v", ns, err)
			}
		}
		says(t, negative, []string{"castellan-server", "hint"}, "check")
		text := refused(t, "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x, namespace: away-plain}\nspec: {rules: [{}]}\n")
		if !strings.Contains(text, "webhook") {
			t.Errorf("a policy is refused, but by %s", text)
		}
		// What there is can be taken away.
		if _, err := kubectl("", "delete", "authorizationpolicy", "-n", plain, "none", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
		// An agent that starts now has no certificates to serve; its proxies hold theirs.
		crash(t, agents(t)[0], func(*podStatus) bool { return true })
		l.goesOn(20)
		back = true
		scaleServer(t, 1)
	})
	works(t, "webhook-down")
}

// Promise: a pod that is deleted while its certificate is being issued goes at once,
// and leaves nothing on the node.
func TestDisruptPodDeletedMidIssuance(t *testing.T) {
	needCluster(t)
	const ns = "mid-issuance"
	namespace(t, ns)
	// served compares what the agent serves with the pods on its node that have a volume.
	served := func() error {
		got, err := readMetric(agentOf(t, "node-1"), 15015, "castellan_agent_volumes")
		if err != nil {
			return err
		}
		if want := fmt.Sprint(withVolume(t, "node-1")); got != want {
			return fmt.Errorf("%s volumes, want %s", got, want)
		}
		return nil
	}
	eventually(t, "the agent serves every pod", served)
	scaleServer(t, 0)
	back := false
	defer func() {
		if !back {
			scaleServer(t, 1)
		}
	}()
	// Nobody answers: issuing is under way until the pod goes.
	waiting := one(t, ns, pod{Name: "waiting", Node: "node-1", Volume: true, Socket: true})
	eventually(t, "the agent serves the pod that waits too", served)
	deletePod(t, ns, "waiting")
	// These are deleted each at another point.
	points := []func(*podStatus) bool{
		func(*podStatus) bool { return true },
		func(p *podStatus) bool { return p.Spec.NodeName != "" },
		func(p *podStatus) bool { return p.is("PodReadyToStartContainers") },
		func(p *podStatus) bool { return p.Status.Phase == "Running" },
		func(p *podStatus) bool { return p.is("Ready") },
	}
	var pods []pod
	for i := range points {
		pods = append(pods, pod{Name: fmt.Sprintf("brief-%d", i), Account: "brief", Node: "node-1", Volume: true, Socket: true})
	}
	create(t, ns, pods...)
	for i, p := range pods {
		url := "/api/v1/namespaces/" + ns + "/pods/" + p.Name
		eventually(t, p.Name+" has come so far", func() error {
			var now podStatus
			if err := api.get(url, &now); err != nil {
				return err
			}
			if !points[i](&now) {
				return fmt.Errorf("%+v", now.Status)
			}
			return nil
		})
		if err := api.remove(url + "?gracePeriodSeconds=0"); err != nil {
			t.Error(err)
		}
	}
	back = true
	scaleServer(t, 1)
	for _, p := range pods {
		eventually(t, p.Name+" is gone", func() error {
			if err := api.get("/api/v1/namespaces/"+ns+"/pods/"+p.Name, nil); !isStatus(err, 404) {
				return fmt.Errorf("still there: %w", err)
			}
			return nil
		})
	}
	eventually(t, "the agent serves nothing of them", served)
	node, err := shared.Node("node-1")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the kubelet has removed the pod's folder", func() error {
		left, err := filepath.Glob(filepath.Join(node.Root, "var/lib/kubelet/pods", waiting.UID, "*"))
		if len(left) > 0 {
			return fmt.Errorf("%v, %w", left, os.ErrExist)
		}
		return err
	})
}

// is says whether a condition of the pod is true.
func (p *podStatus) is(condition string) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == condition {
			return c.Status == "True"
		}
	}
	return false
}

// withVolume counts the pods on a node that have a volume of ours.
func withVolume(t *testing.T, node string) (n int) {
	t.Helper()
	var list struct{ Items []podObject }
	if err := api.get("/api/v1/pods?fieldSelector=spec.nodeName%3D"+node, &list); err != nil {
		t.Fatal(err)
	}
	for _, p := range list.Items {
		for _, v := range p.Spec.Volumes {
			if v.CSI != nil && v.CSI.Driver == "csi.castellan.dev" {
				n++
			}
		}
	}
	return n
}

// readMetric is a value of a pod's metrics, with the name as it stands there, labels
// and all.
func readMetric(a *app, port int, name string) (string, error) {
	text, err := fetch(a.url(port, "/metrics"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value), nil
		}
	}
	return "", fmt.Errorf("%s has no metric %q", a.Name, name)
}

func fetch(url string) (string, error) {
	resp, err := controller().Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var b strings.Builder
	if _, err := io.Copy(&b, resp.Body); err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", &statusError{resp.StatusCode, b.String()}
	}
	return b.String(), nil
}
