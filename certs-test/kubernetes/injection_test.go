package kubernetes_test

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// Promise: labels choose who is injected, as with Istio; opting out is heard.
func TestWhoIsInjected(t *testing.T) {
	t.Parallel()
	needCluster(t)
	for name, c := range map[string]struct {
		namespace string // its label
		pod       map[string]string
		annotated map[string]string
		want      bool
	}{
		"by-namespace":   {namespace: injected, want: true},
		"by-revision":    {namespace: "istio.io/rev=castellan", want: true},
		"by-default":     {namespace: "istio.io/rev=default", want: true},
		"other-revision": {namespace: "istio.io/rev=stable"},
		"disabled":       {namespace: "istio-injection=disabled", pod: map[string]string{"sidecar.istio.io/inject": "true"}},
		"unlabelled":     {},
		"pod-asks":       {pod: map[string]string{"sidecar.istio.io/inject": "true"}, want: true},
		"pod-revision":   {pod: map[string]string{"istio.io/rev": "castellan"}, want: true},
		"pod-declines":   {namespace: injected, pod: map[string]string{"sidecar.istio.io/inject": "false"}},
		"pod-annotated":  {namespace: injected, annotated: map[string]string{"sidecar.istio.io/inject": "false"}},
		"host-network":   {namespace: injected, pod: map[string]string{"host": "yes"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := "who-" + name
			var labels []string
			if c.namespace != "" {
				labels = []string{c.namespace}
			}
			namespace(t, ns, labels...)
			p := pod{Name: "app", Labels: c.pod, Annotations: c.annotated, Change: func(spec object) {
				if c.pod["host"] != "" {
					spec["hostNetwork"] = true
				}
			}}
			if err := account(ns, "app"); err != nil {
				t.Fatal(err)
			}
			var made podObject
			if err := dryRun(ns, p, &made); err != nil {
				t.Fatal(err)
			}
			if got := made.containers(); (len(got) == 3) != c.want || len(got) != 1 && len(got) != 3 {
				t.Errorf("containers %q, injected: %t", got, c.want)
			}
			if got := made.Metadata.Labels["security.istio.io/tlsMode"]; (got == "istio") != c.want {
				t.Errorf("the label of the mesh is %q", got)
			}
		})
	}
}

// Promise: a namespace that is labelled has its next pods injected, and one that is no
// longer labelled does not; pods that are there stay as they are.
func TestLabelComesAndGoes(t *testing.T) {
	t.Parallel()
	needCluster(t)
	const ns = "label-comes"
	namespace(t, ns)
	deploy(t, ns, pod{Name: "before"})
	label := func(value any) {
		t.Helper()
		if err := api.merge("/api/v1/namespaces/"+ns, object{"metadata": object{"labels": object{"istio-injection": value}}}); err != nil {
			t.Fatal(err)
		}
	}
	becomes := func(want int) {
		t.Helper()
		eventually(t, fmt.Sprintf("new pods have %d containers", want), func() error {
			var made podObject
			if err := dryRun(ns, pod{Name: "new", Account: "before"}, &made); err != nil {
				return err
			}
			if got := made.containers(); len(got) != want {
				return fmt.Errorf("%q", got)
			}
			return nil
		})
	}
	label("enabled")
	becomes(3)
	one(t, ns, pod{Name: "during"})
	label(nil)
	becomes(1)
	if got := containers(t, ns, "before"); len(got) != 1 {
		t.Errorf("the pod of before has %q", got)
	}
	if got := containers(t, ns, "during"); len(got) != 3 {
		t.Errorf("the pod of meanwhile has %q", got)
	}
}

// dryRun asks what would become of a pod.
func dryRun(ns string, p pod, made any) error {
	return admitted(func() error { return api.post("/api/v1/namespaces/"+ns+"/pods?dryRun=All", p.object(ns), made) })
}

type podObject struct {
	Metadata struct {
		Labels, Annotations map[string]string
	}
	Spec struct {
		InitContainers, Containers []struct {
			Name            string
			RestartPolicy   string
			SecurityContext struct {
				RunAsUser    *int64
				Capabilities struct{ Add, Drop []string }
			}
			VolumeMounts []struct{ Name, MountPath string }
		}
		Volumes []struct {
			Name string
			CSI  *struct{ Driver string }
		}
	}
}

func (p *podObject) containers() (names []string) {
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		names = append(names, c.Name)
	}
	return names
}

// Promise: an application that would be taken for the proxy, by its uid, is refused.
func TestProxysUIDIsRefused(t *testing.T) {
	t.Parallel()
	needCluster(t)
	const ns = "uid1337"
	namespace(t, ns, injected)
	if err := account(ns, "app"); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(object){
		"pod":       func(spec object) { spec["securityContext"] = object{"runAsUser": 1337} },
		"container": func(spec object) { spec["containers"].([]object)[0]["securityContext"] = object{"runAsUser": 1337} },
	} {
		err := dryRun(ns, pod{Name: "app", Change: change}, nil)
		if err == nil || !strings.Contains(err.Error(), "1337") {
			t.Errorf("%s: got %v, want a refusal that names the uid", name, err)
		}
	}
}

// Promise: probes of the kubelet work under STRICT, which it could not meet: over
// HTTP, TCP and gRPC.
func TestProbesUnderStrict(t *testing.T) {
	t.Parallel()
	needCluster(t)
	const ns = "probes"
	namespace(t, ns, injected)
	apply(t, strict(ns))
	probes := map[string]object{
		"http": {"httpGet": object{"path": "/", "port": "http"}},
		"tcp":  {"tcpSocket": object{"port": control.TCP}},
		"grpc": {"grpc": object{"port": control.GRPC}},
		"sick": {"httpGet": object{"path": "/status/500", "port": control.HTTP}},
	}
	var pods []pod
	for name, probe := range probes {
		p := pod{Name: name, Change: func(spec object) {
			c := spec["containers"].([]object)[0]
			for _, kind := range []string{"readinessProbe", "livenessProbe", "startupProbe"} {
				if name != "sick" || kind == "readinessProbe" {
					c[kind] = patiently(maps.Clone(probe))
				}
			}
		}}
		if name != "sick" {
			pods = append(pods, p)
		} else {
			create(t, ns, p)
		}
	}
	// Ready and started they are by two of the probes; of the third the kubelet tells.
	for _, a := range deploy(t, ns, pods...) {
		eventually(t, a.Name+" is probed for being alive", func() error {
			if n, err := probed(a, "Liveness", "successful"); err != nil || n < 3 {
				return fmt.Errorf("%v times, %w", n, err)
			}
			return nil
		})
	}
	// The proxy tells the kubelet what the application says, not what it likes to hear.
	eventually(t, "the probe of the sick pod fails", func() error {
		var list struct {
			Items []struct{ Reason, Message string }
		}
		if err := api.get("/api/v1/namespaces/"+ns+"/events?fieldSelector=involvedObject.name%3Dsick,reason%3DUnhealthy", &list); err != nil {
			return err
		}
		for _, e := range list.Items {
			if strings.Contains(e.Message, "Readiness") && strings.Contains(e.Message, "500") {
				return nil
			}
		}
		return fmt.Errorf("events %+v", list.Items)
	})
	for _, p := range listPods(t, ns, "app%21%3Dsick") {
		for _, c := range p.Status.ContainerStatuses {
			if c.RestartCount > 0 {
				t.Errorf("%s restarted: its liveness probe failed", p.Metadata.Name)
			}
		}
	}
}

// probed is how often the kubelet had this result of a pod's probes.
func probed(a *app, kind, result string) (times float64, err error) {
	var text string
	if err := api.get("/api/v1/nodes/"+a.Node+"/proxy/metrics/probes", &text); err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "prober_probe_total{") || !strings.Contains(line, `container="app"`) ||
			!strings.Contains(line, `pod_uid="`+a.UID+`"`) || !strings.Contains(line, `probe_type="`+kind+`"`) || !strings.Contains(line, `result="`+result+`"`) {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndex(line, " "):]), 64)
		if err != nil {
			return 0, err
		}
		times += n
	}
	return times, nil
}

// Promise: ports that annotations exclude are left alone, in both directions.
func TestExcludedPorts(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns = "excluded"
	namespace(t, ns, injected)
	apply(t, strict(ns))
	apps := deploy(t, ns,
		pod{Name: "callee", Node: "node-2", Annotations: map[string]string{
			"traffic.sidecar.istio.io/excludeInboundPorts": fmt.Sprintf("%d,%d", control.Control, control.Excluded)}},
		pod{Name: "caller", Node: "node-1", Annotations: map[string]string{
			"traffic.sidecar.istio.io/excludeOutboundPorts": fmt.Sprint(control.Excluded)}},
		pod{Name: "ranges", Node: "node-1", Annotations: map[string]string{
			"traffic.sidecar.istio.io/excludeOutboundIPRanges": from.plain.IP + "/32"}},
	)
	// Inbound: reached in the clear, by a pod outside the mesh, under STRICT.
	r := from.plain.reaches(t, apps["callee"].url(control.Excluded, "/"))
	if _, ok := r.Seen.Header["X-Forwarded-Client-Cert"]; ok {
		t.Error("a proxy stood between")
	}
	from.plain.fails(t, control.Call{Kind: "http", URL: apps["callee"].url(control.HTTP, "/")}, severed...)
	// Outbound: not the proxy's to refuse, though what is there is outside the mesh.
	apps["caller"].reaches(t, from.plain.url(control.Excluded, "/"))
	apps["caller"].fails(t, control.Call{Kind: "http", URL: from.plain.url(control.HTTP, "/")})
	apps["ranges"].reaches(t, from.plain.url(control.HTTP, "/"))
}

// Promise: the sidecar may do nothing: not even the init step holds more than the one
// capability it takes, and the volume with the socket is the proxy's alone.
func TestSidecarIsConfined(t *testing.T) {
	t.Parallel()
	site(t)
	var p podObject
	if err := api.get("/api/v1/namespaces/callers/pods/web", &p); err != nil {
		t.Fatal(err)
	}
	socket := ""
	for _, v := range p.Spec.Volumes {
		if v.CSI != nil && v.CSI.Driver == "csi.castellan.dev" {
			socket = v.Name
		}
	}
	if socket == "" {
		t.Fatal("the pod has no volume of ours")
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		mounted := slices.ContainsFunc(c.VolumeMounts, func(m struct{ Name, MountPath string }) bool { return m.Name == socket })
		switch c.Name {
		case "app":
		case "istio-proxy":
			if c.RestartPolicy != "Always" || c.SecurityContext.RunAsUser == nil || *c.SecurityContext.RunAsUser != 1337 || len(c.SecurityContext.Capabilities.Add) > 0 {
				t.Errorf("the proxy: %+v", c)
			}
		default:
			if !slices.Equal(c.SecurityContext.Capabilities.Add, []string{"NET_ADMIN"}) {
				t.Errorf("the init step may %q", c.SecurityContext.Capabilities.Add)
			}
		}
		if mounted != (c.Name == "istio-proxy") {
			t.Errorf("%s has the socket: %t", c.Name, mounted)
		}
		if c.Name != "app" && !slices.Equal(c.SecurityContext.Capabilities.Drop, []string{"ALL"}) {
			t.Errorf("%s drops %q", c.Name, c.SecurityContext.Capabilities.Drop)
		}
	}
}
