package kubernetes_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"castellan.dev/certs-test/cluster"
	"castellan.dev/certs-test/kubernetes/apps/control"
)

// loads are streams of calls that are not to fail.
type loads struct {
	t    *testing.T
	apps []*app
	ids  []string
	what []string
	// stopped: there is nothing left to stop.
	stopped bool
}

// startLoad calls a service from each of the callers, by every protocol, over
// connections that live and over new ones. One connection must outlive everything.
func startLoad(t *testing.T, host string, from ...*app) *loads {
	t.Helper()
	l := &loads{t: t}
	t.Cleanup(func() {
		if !l.stopped {
			for i := range l.ids {
				_, _ = l.report(i, "DELETE")
			}
		}
	})
	for _, caller := range from {
		for _, load := range []control.Load{
			{Every: 20 * time.Millisecond, Call: control.Call{Kind: "http", URL: "http://" + host + "/"}},
			{Every: 100 * time.Millisecond, Call: control.Call{Kind: "http", URL: "http://" + host + "/", Fresh: true}},
			{Every: 50 * time.Millisecond, Call: control.Call{Kind: "grpc", URL: host + ":9090"}},
			{Every: 100 * time.Millisecond, Call: control.Call{Kind: "tcp", URL: host + ":9000", Body: "x"}},
			{Every: 50 * time.Millisecond, Call: control.Call{Kind: "websocket", URL: "ws://" + host + "/ws", Body: "x"}},
			{Every: 50 * time.Millisecond, Call: control.Call{Kind: "stream", URL: host + ":9000", Body: "x"}},
		} {
			// What cannot be called at all is no matter of the load.
			first := load.Call
			if first.Kind == "stream" {
				first.Kind = "tcp"
			}
			succeeds(t, caller, first)
			var id string
			if err := caller.ask("POST", "/load", load, &id); err != nil {
				t.Fatal(err)
			}
			l.apps, l.ids = append(l.apps, caller), append(l.ids, id)
			l.what = append(l.what, fmt.Sprintf("%s: %s (new connections: %t)", caller.Name, load.Call.Kind, load.Call.Fresh || load.Call.Kind == "tcp"))
		}
	}
	// Without an answer there is nothing that could fail later.
	eventually(t, "the load is under way", func() error {
		for i := range l.ids {
			if r, err := l.report(i, "GET"); err != nil || r.Calls < 3 {
				return fmt.Errorf("%s: %+v, %w", l.what[i], r, err)
			}
		}
		return nil
	})
	return l
}

func (l *loads) report(i int, method string) (r control.Report, err error) {
	return r, l.apps[i].ask(method, "/load/"+l.ids[i], nil, &r)
}

// stop ends the load, of which nothing may have failed.
func (l *loads) stop() {
	l.t.Helper()
	l.stopped = true
	for i := range l.ids {
		r, err := l.report(i, "DELETE")
		if err != nil {
			l.t.Error(err)
			continue
		}
		l.t.Logf("%s: %d calls, the longest took %.0f ms", l.what[i], r.Calls, r.Longest)
		if r.Failed > 0 || r.Calls == 0 {
			l.t.Errorf("%s: %d of %d calls failed:\n%s", l.what[i], r.Failed, r.Calls, strings.Join(r.Failures, "\n"))
		}
	}
}

// end ends the streams of calls of a kind before the others.
func (l *loads) end(kind string) {
	l.t.Helper()
	for i := len(l.ids) - 1; i >= 0; i-- {
		if !strings.Contains(l.what[i], ": "+kind+" ") {
			continue
		}
		if _, err := l.report(i, "DELETE"); err != nil {
			l.t.Error(err)
		}
		l.apps, l.ids, l.what = slices.Delete(l.apps, i, i+1), slices.Delete(l.ids, i, i+1), slices.Delete(l.what, i, i+1)
	}
}

// goesOn waits until every stream has made more calls: the time that what was
// disturbed has to do its harm.
func (l *loads) goesOn(calls int) {
	l.t.Helper()
	before := make([]int, len(l.ids))
	for i := range l.ids {
		eventually(l.t, "the load is counted", func() error {
			r, err := l.report(i, "GET")
			before[i] = r.Calls
			return err
		})
	}
	eventually(l.t, "the load goes on", func() error {
		for i := range l.ids {
			if r, err := l.report(i, "GET"); err != nil || r.Calls < before[i]+calls {
				return fmt.Errorf("%s: %d calls, %w", l.what[i], r.Calls-before[i], errors.Join(err, errors.New("too few")))
			}
		}
		return nil
	})
}

const steadyHost = "api.steady"

// steady is a service on both nodes, with STRICT and an ALLOW policy, that load is on
// while everything else is disturbed.
func steady(t *testing.T) map[string]*app {
	t.Helper()
	site(t)
	const ns = "steady"
	ensureNamespace(t, ns, object{"istio-injection": "enabled"})
	if err := api.get("/api/v1/namespaces/"+ns+"/services/api", nil); isStatus(err, 404) {
		service(t, ns, "api")
	}
	// It stays for the tests after this one.
	if _, err := kubectl(strict(ns)+`---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: steady}
spec: {rules: [{from: [{source: {namespaces: [callers]}}]}]}
`, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	ensurePods(t, ns,
		pod{Name: "api-1", App: "api", Account: "api", Node: "node-1"},
		pod{Name: "api-2", App: "api", Account: "api", Node: "node-2"},
		pod{Name: "spiffe", Node: "node-1", Volume: true, Socket: true, Labels: map[string]string{"sidecar.istio.io/inject": "false"}},
	)
	apps := map[string]*app{}
	for _, name := range []string{"api-1", "api-2", "spiffe"} {
		apps[name] = awaitPod(t, ns, name)
	}
	return apps
}

// untouched remembers pods, and later fails if one was made anew or restarted.
func untouched(t *testing.T, namespaces ...string) (check func()) {
	t.Helper()
	state := func() map[string]string {
		found := map[string]string{}
		for _, ns := range namespaces {
			for _, p := range listPods(t, ns, "") {
				restarts := 0
				for _, c := range append(p.Status.ContainerStatuses, p.Status.InitContainerStatuses...) {
					restarts += c.RestartCount
				}
				found[ns+"/"+p.Metadata.Name] = fmt.Sprintf("%s with %d restarts", p.Metadata.UID, restarts)
			}
		}
		return found
	}
	before := state()
	return func() {
		t.Helper()
		// A restart stays counted; but what a kubelet tells that has just started may lag.
		eventually(t, "the pods are as they were", func() (err error) {
			after := state()
			for name, was := range before {
				if after[name] != was {
					err = errors.Join(err, fmt.Errorf("pod %s was %s, is %s", name, was, after[name]))
				}
			}
			return err
		})
	}
}

// works proves that everything works again: a pod on each node is injected, gets its
// identity and is called, and a policy made now is enforced.
func works(t *testing.T, ns string) {
	t.Helper()
	from := site(t)
	namespace(t, ns, injected)
	service(t, ns, "api")
	deploy(t, ns,
		pod{Name: "api-1", App: "api", Account: "api", Node: "node-1"},
		pod{Name: "api-2", App: "api", Account: "api", Node: "node-2"},
	)
	everyProtocol(t, from.web, "api."+ns, "")
	apply(t, fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web-only, namespace: %s}
spec: {rules: [{from: [{source: {principals: ["cluster.local/ns/callers/sa/web"]}}]}]}
`, ns))
	for range 2 { // both endpoints, by turns
		from.other.answers(t, 403, "http://api."+ns+"/")
		from.far.reaches(t, "http://api."+ns+"/")
	}
	programmed(t, ns, "web-only")
}

// kill ends a container of a pod as a crash would, and waits until it is ready again.
func kill(t testing.TB, p podStatus) {
	t.Helper()
	crash(t, p, func(now *podStatus) bool { return now.ready() })
}

// crash waits until the container runs again and then is well.
func crash(t testing.TB, p podStatus, well func(now *podStatus) bool) {
	t.Helper()
	node, err := shared.Node(p.Spec.NodeName)
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://")
	task(t, node, "kill", "--signal", "SIGKILL", id)
	eventually(t, p.Metadata.Name+" runs again", func() error {
		var now podStatus
		if err := api.get("/api/v1/namespaces/castellan-system/pods/"+p.Metadata.Name, &now); err != nil {
			return err
		}
		if !well(&now) || now.Status.ContainerStatuses[0].RestartCount <= p.Status.ContainerStatuses[0].RestartCount {
			return fmt.Errorf("%+v", now.Status)
		}
		return nil
	})
}

func task(t testing.TB, node *cluster.Node, args ...string) {
	t.Helper()
	if err := tryTask(node, args...); err != nil {
		t.Fatal(err)
	}
}

func tryTask(node *cluster.Node, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if out, err := node.Command(ctx, "ctr", append([]string{"--namespace", "k8s.io", "tasks"}, args...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ctr tasks %v: %w: %s", args, err, out)
	}
	return nil
}
