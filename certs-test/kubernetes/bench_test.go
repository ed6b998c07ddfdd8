package kubernetes_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"castellan.dev/agent/csi/csitest"
	"castellan.dev/certs-test/kubernetes/apps/control"
)

// BenchmarkFirstSVID: pod created until its first SVID is served, less what the pod
// takes to start without us: pods with our volume and pods without, by turns.
func BenchmarkFirstSVID(b *testing.B) {
	if shared == nil {
		b.Skip("a cluster needs root")
	}
	const ns, pairs = "bench-first", 9
	namespace(b, ns)
	var plain, served, proxied []time.Duration
	start := func(p pod) time.Duration {
		began := time.Now()
		a := one(b, ns, p)
		var s control.Started
		if err := a.ask("GET", "/started", nil, &s); err != nil {
			b.Fatal(err)
		}
		at := s.Started
		if p.Volume || p.Socket {
			id := a.identity(b)
			at = at.Add(id.Served)
		}
		deletePod(b, ns, p.Name)
		return at.Sub(began)
	}
	for range b.N {
		start(pod{Name: "warm", Node: "node-1", Volume: true, Socket: true})
		for i := range pairs {
			plain = append(plain, start(pod{Name: fmt.Sprintf("plain-%d", i), Account: "p", Node: "node-1"}))
			served = append(served, start(pod{Name: fmt.Sprintf("served-%d", i), Account: "p", Node: "node-1", Volume: true, Socket: true}))
			proxied = append(proxied, start(pod{Name: fmt.Sprintf("proxied-%d", i), Account: "p", Node: "node-1",
				Labels: map[string]string{"sidecar.istio.io/inject": "true"}}))
		}
	}
	without, _ := spread(plain)
	with, most := spread(served)
	sidecar, _ := spread(proxied)
	b.ReportMetric(float64((with - without).Milliseconds()), "ms-added")
	report(b, "pod created → its first SVID served, added to the pod's own start",
		fmt.Sprintf("median of %d pods of a go-spiffe program with our volume, less that of as many without, by turns", len(served)), "≤ 300 ms",
		"%s (%s with, at most %s; %s without)", ms(with-without), ms(with), ms(most), ms(without))
	report(b, "the same, application started behind a proxy that has identity and policy",
		"as above, with an injected sidecar; the kubelet looks at the proxy's startup probe once a second", "–", "%s (%s)", ms(sidecar-without), ms(sidecar))
}

// BenchmarkPolicy: kubectl apply until both nodes enforce it and the status says that
// every proxy has acknowledged it.
func BenchmarkPolicy(b *testing.B) {
	from := site(b)
	const ns, rounds = "bench-policy", 7
	namespace(b, ns, injected)
	service(b, ns, "api") // proxies call the pods of services only
	apps := deploy(b, ns,
		pod{Name: "api-1", App: "api", Account: "api", Node: "node-1"},
		pod{Name: "api-2", App: "api", Account: "api", Node: "node-2"},
	)
	for _, a := range apps {
		from.web.reaches(b, a.url(control.HTTP, "/"))
	}
	var command, enforced, acknowledged []time.Duration
	for i := range rounds * b.N {
		name := fmt.Sprintf("deny-%d", i)
		text := fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: %s, namespace: %s}
spec: {action: DENY, rules: [{to: [{operation: {paths: ["/%s"]}}]}]}
`, name, ns, name)
		began := time.Now()
		if _, err := kubectl(text, "apply", "-f", "-"); err != nil {
			b.Fatal(err)
		}
		applied := time.Now()
		var all sync.WaitGroup
		until := make([]time.Duration, 2)
		for n, a := range []*app{apps["api-1"], apps["api-2"]} {
			all.Go(func() {
				for {
					if r, err := from.web.call(control.Call{Kind: "http", URL: a.url(control.HTTP, "/"+name)}); err == nil && r.Status == 403 {
						until[n] = time.Since(applied)
						return
					}
					if time.Since(applied) > patience {
						b.Error("the policy is not enforced")
						return
					}
					time.Sleep(2 * time.Millisecond)
				}
			})
		}
		programmed(b, ns, name)
		acknowledged = append(acknowledged, time.Since(applied))
		all.Wait()
		enforced = append(enforced, slices.Max(until))
		command = append(command, applied.Sub(began))
	}
	e, eMost := spread(enforced)
	a, aMost := spread(acknowledged)
	k, _ := spread(command)
	b.ReportMetric(float64(a.Milliseconds()), "ms-acknowledged")
	report(b, "policy applied with kubectl → enforced and acknowledged by every proxy on both nodes",
		fmt.Sprintf("from the end of kubectl apply, which itself takes %s, to the first 403 on both nodes, and to Programmed in the status; %d policies", ms(k), len(enforced)), "≤ 1 s",
		"enforced %s (at most %s), status %s (at most %s)", ms(e), ms(eMost), ms(a), ms(aMost))
}

// fakeNode makes a node that no kubelet stands behind, and no agent of ours runs on.
func fakeNode(t testing.TB, name string) {
	t.Helper()
	err := api.post("/api/v1/nodes", object{"metadata": object{"name": name, "labels": object{"kubernetes.io/os": "none"}}}, nil)
	if err != nil && !isStatus(err, 409) {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.remove("/api/v1/nodes/" + name) })
}

// fakePod is a pod that is bound to such a node.
func fakePod(node, name, account string, labels object) object {
	return object{
		"metadata": object{"name": name, "labels": labels},
		"spec": object{
			"nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": false,
			"tolerations":                   []object{{"operator": "Exists"}},
			"terminationGracePeriodSeconds": 0,
			"containers":                    []object{{"name": "app", "image": "none", "ports": []object{{"name": "http", "containerPort": 8080}}}},
			"volumes":                       []object{{"name": "uds", "csi": object{"driver": "csi.castellan.dev", "readOnly": true}}},
		},
	}
}

// each does n things, so many at once, and joins their errors.
func each(n, atOnce int, do func(i int) error) error {
	errs := make([]error, n)
	turn := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for i := range n {
		turn <- struct{}{}
		all.Go(func() {
			errs[i] = do(i)
			<-turn
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// BenchmarkStorm: 500 pods' worth of CSRs at once through one agent, with real tokens
// and the real server. The kubelet's calls are ours; and the agent is one of ours, on a
// node without a kubelet, which would run so many pods.
func BenchmarkStorm(b *testing.B) {
	if shared == nil {
		b.Skip("a cluster needs root")
	}
	const pods = 500
	for range b.N {
		took, calls := storm(b, pods)
		b.ReportMetric(float64(took[len(took)-1].Milliseconds()), "ms-all-served")
		report(b, fmt.Sprintf("%d pods' worth of CSRs at once through one agent and one server", pods),
			"real tokens of the API server, the kubelet's CSI calls made by the benchmark, each pod's first X509-SVID read from its own socket", "all served in ≤ 5 s",
			"%s (half of them in %s)", ms(took[len(took)-1]), ms(took[len(took)/2]))
		report(b, "calls of the server to the API server meanwhile, local verification", "API server's audit log, watches left out", "none for a CSR", "%d", calls)
	}
}

// storm returns how long each pod took, the soonest first, and how often the server
// called the API server meanwhile.
func storm(t testing.TB, n int) (took []time.Duration, calls int) {
	t.Helper()
	const node, ns = "storm-node", "storm"
	fakeNode(t, node)
	namespace(t, ns)
	for i := range 20 {
		if err := account(ns, fmt.Sprintf("sa-%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	const after = "storm-after"
	namespace(t, after, injected)
	arrivals := make([]csitest.Arrival, n)
	err := each(n, 8, func(i int) (err error) {
		arrivals[i], err = arrive(ns, node, fmt.Sprintf("pod-%d", i), fmt.Sprintf("sa-%d", i%20))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// The server knows a pod's policy from its watch alone, which shows pods in the order
	// in which they were made: what it would ask for is what it has not been shown.
	one(t, after, pod{Name: "last"})
	kubelet := stormAgent(t, node)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	if err := kubelet.Register(ctx); err != nil {
		t.Fatal(err)
	}
	before := serverCalls(t)
	took, err = kubelet.Storm(ctx, arrivals, 50)
	if err != nil {
		t.Fatal(err)
	}
	return took, serverCalls(t) - before
}

// arrive makes a pod, and its token.
func arrive(ns, node, name, account string) (csitest.Arrival, error) {
	var made podStatus
	if err := api.post("/api/v1/namespaces/"+ns+"/pods", fakePod(node, name, account, object{"app": name}), &made); err != nil {
		return csitest.Arrival{}, err
	}
	token, err := requestToken(ns, account, name, made.Metadata.UID, "castellan.dev")
	return csitest.Arrival{Pod: csitest.Pod{Namespace: ns, Name: name, UID: made.Metadata.UID, ServiceAccount: account}, Token: token}, err
}

// serverCalls counts what the server has asked of the API server, without watches and
// the renewal of its lease.
func serverCalls(t testing.TB) (calls int) {
	t.Helper()
	audit(t, func(e *auditEvent) {
		if e.User.Username == serverUser && e.Verb != "watch" && e.ObjectRef.Resource != "leases" && e.Stage == "ResponseComplete" {
			calls++
		}
	})
	return calls
}

// stormAgent runs an agent as that of the node, in the network of node-1.
func stormAgent(t testing.TB, node string) *csitest.Kubelet {
	t.Helper()
	const system = "castellan-system"
	dir, err := os.MkdirTemp("", "storm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var agent podStatus
	p := fakePod(node, "storm-agent", "castellan-agent", object{})
	delete(p["spec"].(object), "volumes")
	if err := api.post("/api/v1/namespaces/"+system+"/pods", p, &agent); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.remove("/api/v1/namespaces/" + system + "/pods/storm-agent?gracePeriodSeconds=0") })
	token := podToken(t, system, "castellan-agent", "storm-agent", agent.Metadata.UID, "castellan.dev")
	var bundle struct{ Data map[string]string }
	if err := api.get("/api/v1/namespaces/"+system+"/configmaps/castellan-bundle", &bundle); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`apiVersion: castellan.dev/v1alpha1
kind: AgentConfig
trustDomain: cluster.local
node: %[1]s
tokenFile: %[2]s/token
server: {address: "%[3]s:15012", name: %[4]s, bundleFile: %[2]s/bundle.pem}
admin: 127.0.0.1:25015
adminSocket: %[2]s/admin.sock
csi: {kubeletDir: %[2]s/kubelet, stateDir: %[2]s/state}
`, node, dir, serviceIP(t, system, "castellan-server"), serverName)
	for name, text := range map[string]string{"token": token, "bundle.pem": bundle.Data["bundle.pem"], "agent.yaml": config} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"kubelet/plugins", "kubelet/plugins_registry", "kubelet/pods", "state"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := build(context.Background(), bin, "castellan-agent"); err != nil {
		t.Fatal(err)
	}
	inside, err := shared.Node("node-1")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := inside.Command(ctx, path("castellan-agent"), "-config", filepath.Join(dir, "agent.yaml"))
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		log.Close()
		if data, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("the agent of the storm:\n%s", tail(string(data), 40))
		}
	})
	return &csitest.Kubelet{Dir: filepath.Join(dir, "kubelet")}
}

// serverMemory is the resident memory of the server's process, by the kernel's account
// of its pod on the node.
func serverMemory(t testing.TB) (resident, peak int) {
	t.Helper()
	p := listPods(t, "castellan-system", "app%3Dcastellan-server")[0]
	node, err := shared.Node(p.Spec.NodeName)
	if err != nil {
		t.Fatal(err)
	}
	processes, err := filepath.Glob(filepath.Join(node.Root, "proc/[0-9]*/cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range processes {
		data, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(data), "/usr/bin/castellan-server\x00") {
			continue
		}
		status, err := os.ReadFile(filepath.Join(filepath.Dir(file), "status"))
		if err != nil {
			continue
		}
		value := func(name string) int {
			_, rest, _ := strings.Cut(string(status), name+":")
			n, _ := strconv.Atoi(strings.Fields(rest)[0])
			return n >> 10
		}
		return value("VmRSS"), value("VmHWM")
	}
	t.Fatal("no process of the server")
	return 0, 0
}

// BenchmarkZMemory: the server's memory with 10,000 pods, 1,000 policies and 1,000
// services with their endpoints, all in the real API server; no kubelet stands behind
// the pods.
func BenchmarkZMemory(b *testing.B) {
	if shared == nil {
		b.Skip("a cluster needs root")
	}
	const namespaces, pods, services, policies = 20, 10_000, 1_000, 1_000
	const node = "crowd"
	fakeNode(b, node)
	empty, _ := serverMemory(b)
	for i := range namespaces {
		namespace(b, fmt.Sprintf("crowd-%d", i))
		for a := range 10 {
			if err := account(fmt.Sprintf("crowd-%d", i), fmt.Sprintf("sa-%d", a)); err != nil {
				b.Fatal(err)
			}
		}
	}
	ns := func(i int) string { return fmt.Sprintf("crowd-%d", i%namespaces) }
	err := errors.Join(
		each(pods, 16, func(i int) error { return crowdPod(ns(i), node, i) }),
		each(services, 8, func(i int) error {
			return api.post("/api/v1/namespaces/"+ns(i)+"/services", object{"metadata": object{"name": fmt.Sprintf("svc-%d", i)}, "spec": object{
				"selector": object{"group": fmt.Sprint(i)}, "ports": []object{{"name": "http", "port": 80, "targetPort": 8080}, {"name": "grpc", "port": 9090}}}}, nil)
		}),
		each(policies, 8, func(i int) error {
			return api.post("/apis/security.istio.io/v1/namespaces/"+ns(i)+"/authorizationpolicies", crowdPolicy(i), nil)
		}),
	)
	if err != nil {
		b.Fatal(err)
	}
	// Every policy has its status: the server has seen all of it.
	within(b, 10*patience, "the server has seen everything", func() error {
		for i := range policies {
			var p policyStatus
			if err := api.get("/apis/security.istio.io/v1/namespaces/"+ns(i)+"/authorizationpolicies/"+fmt.Sprintf("policy-%d", i), &p); err != nil {
				return err
			}
			if p.condition("Accepted").Status != "True" {
				return fmt.Errorf("policy %d has no status", i)
			}
		}
		return nil
	})
	grown, peak := serverMemory(b)
	// And started anew, it reads all of it at once.
	kill(b, listPods(b, "castellan-system", "app%3Dcastellan-server")[0])
	eventually(b, "the server serves", func() error {
		// No proxies stand behind the pods, which the command answers with an error.
		if r, err := castellan(context.Background(), "proxy", "status"); !strings.Contains(r.out, "crowd-0/pod-") {
			return err
		}
		return nil
	})
	fresh, freshPeak := serverMemory(b)
	worst := max(grown, fresh)
	b.ReportMetric(float64(worst), "MB")
	report(b, "server's memory with 10,000 pods, 1,000 policies, 1,000 services",
		"VmRSS of the process, once every policy has its status; pods with addresses and Ready, bound to a node without a kubelet; EndpointSlices by Kubernetes' own controller; then the same after a restart of the server", "≤ 300 MB",
		"%d MB (highest ever %d), after a restart %d MB (highest ever %d); %d MB before", grown, peak, fresh, freshPeak, empty)
}

func crowdPod(ns, node string, i int) error {
	labels := object{"app": fmt.Sprintf("app-%d", i%2000), "group": fmt.Sprint(i % 1000), "version": "v1", "security.istio.io/tlsMode": "istio", "pod-template-hash": fmt.Sprintf("%08x", i)}
	name := fmt.Sprintf("pod-%d", i)
	if err := api.post("/api/v1/namespaces/"+ns+"/pods", fakePod(node, name, fmt.Sprintf("sa-%d", i%10), labels), nil); err != nil {
		return err
	}
	ip := fmt.Sprintf("10.%d.%d.%d", 100+i>>16, i>>8&255, i&255)
	now := time.Now().UTC().Format(time.RFC3339)
	return api.merge("/api/v1/namespaces/"+ns+"/pods/"+name+"/status", object{"status": object{
		"phase": "Running", "podIP": ip, "podIPs": []object{{"ip": ip}},
		"conditions": []object{{"type": "Ready", "status": "True", "lastTransitionTime": now}},
	}})
}

func crowdPolicy(i int) object {
	return object{
		"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": object{"name": fmt.Sprintf("policy-%d", i)},
		"spec": object{
			"selector": object{"matchLabels": object{"app": fmt.Sprintf("app-%d", i)}},
			"rules": []object{{
				"from": []object{{"source": object{"principals": []string{fmt.Sprintf("cluster.local/ns/crowd-%d/sa/sa-%d", i%20, i%10)}}}},
				"to":   []object{{"operation": object{"methods": []string{"GET", "POST"}, "paths": []string{fmt.Sprintf("/api/%d/*", i)}}}},
			}},
		},
	}
}
