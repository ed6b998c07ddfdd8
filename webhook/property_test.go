package webhook_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"castellan.dev/internal/config"
	"castellan.dev/webhook"
)

// pods draws pods as people might write them.
func pods() *rapid.Generator[*corev1.Pod] {
	word := rapid.SampledFrom([]string{"a", "b", "app", "web", "istio", "x-y", ""})
	values := map[string][]string{
		"sidecar.istio.io/nativeSidecar":                   {"true", "false", "?"},
		"sidecar.istio.io/rewriteAppHTTPProbers":           {"true", "false"},
		"sidecar.istio.io/proxyCPU":                        {"1", "100m", "0.5", "1e3", "x"},
		"sidecar.istio.io/proxyMemoryLimit":                {"1Gi", "100000000", "64Mi"},
		"traffic.sidecar.istio.io/includeInboundPorts":     {"", "*", "80", "80,*", "1-9"},
		"traffic.sidecar.istio.io/excludeInboundPorts":     {"", "15020", "80,15021"},
		"traffic.sidecar.istio.io/includeOutboundIPRanges": {"", "*", "10.0.0.0/8"},
		"traffic.sidecar.istio.io/includeOutboundPorts":    {"", "443", "*"},
		"castellan.dev/workload-socket":                    {"true", "false", "c0", "i0,c1"},
		"proxy.istio.io/config":                            {"holdApplicationUntilProxyStarts: true", "{}", "null", "a: b"},
	}
	return rapid.Custom(func(t *rapid.T) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Labels: map[string]string{"app": word.Draw(t, "app")}}}
		for _, name := range slices.Sorted(maps.Keys(values)) {
			choices := values[name]
			if rapid.IntRange(0, 4).Draw(t, name) == 0 {
				metav1.SetMetaDataAnnotation(&p.ObjectMeta, name, rapid.SampledFrom(choices).Draw(t, name+" value"))
			}
		}
		for i := range rapid.IntRange(0, 2).Draw(t, "init containers") {
			p.Spec.InitContainers = append(p.Spec.InitContainers, aContainer(t, "i"+string(rune('0'+i))))
		}
		for i := range rapid.IntRange(1, 3).Draw(t, "containers") {
			p.Spec.Containers = append(p.Spec.Containers, aContainer(t, "c"+string(rune('0'+i))))
		}
		if rapid.Bool().Draw(t, "volume") {
			name := rapid.SampledFrom([]string{"v", "workload-socket"}).Draw(t, "volume name")
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: "csi.castellan.dev"}}}, corev1.Volume{Name: "w"})
			p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: name, MountPath: "/x"}, corev1.VolumeMount{Name: name, MountPath: "/y"})
		}
		return p
	})
}

func aContainer(t *rapid.T, name string) corev1.Container {
	c := corev1.Container{Name: name, Image: "i", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}}}
	for _, at := range []**corev1.Probe{&c.LivenessProbe, &c.ReadinessProbe, &c.StartupProbe} {
		if rapid.Bool().Draw(t, "probe") {
			*at = &corev1.Probe{ProbeHandler: aHandler(t), TimeoutSeconds: rapid.SampledFrom([]int32{0, 1, 5, 100000}).Draw(t, "timeout")}
		}
	}
	return c
}

func aHandler(t *rapid.T) corev1.ProbeHandler {
	port := rapid.SampledFrom([]intstr.IntOrString{intstr.FromInt32(80), intstr.FromString("web"), intstr.FromString("none"), intstr.FromString("81"), intstr.FromInt32(15020), intstr.FromInt32(0)}).Draw(t, "port")
	switch rapid.IntRange(0, 3).Draw(t, "kind") {
	case 0:
		h := &corev1.HTTPGetAction{Port: port, Path: rapid.SampledFrom([]string{"", "/", "x", "/a?b=$(c)", "/app-health/c0/livez"}).Draw(t, "path")}
		h.Host = rapid.SampledFrom([]string{"", "", "h"}).Draw(t, "host")
		if rapid.Bool().Draw(t, "header") {
			h.HTTPHeaders = []corev1.HTTPHeader{{Name: "n", Value: rapid.String().Draw(t, "header value")}}
		}
		return corev1.ProbeHandler{HTTPGet: h}
	case 1:
		return corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: port}}
	case 2:
		service := "s"
		return corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 9000, Service: rapid.SampledFrom([]*string{nil, &service}).Draw(t, "service")}}
	default:
		return corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}
	}
}

// Injecting twice is injecting once; the patch makes exactly the pod; and what is
// not the sidecar's stays as it was.
func TestInjectProperties(t *testing.T) {
	in := newInjector(t, config.Inject{})
	injected := 0
	rapid.Check(t, func(t *rapid.T) {
		pod := pods().Draw(t, "pod")
		ns := webhook.Namespace{Name: "shop", Selected: true}
		result, err := in.Inject(pod, ns)
		if err != nil {
			return
		}
		injected++
		before, patch := mustJSON(t, pod), mustPatch(t, pod, result.Pod)
		decoded, err := jsonpatch.DecodePatch(patch)
		if err != nil {
			t.Fatal(err)
		}
		patched, err := decoded.Apply(before)
		if err != nil {
			t.Fatal(err)
		}
		var got corev1.Pod
		if err := json.Unmarshal(patched, &got); err != nil {
			t.Fatal(err)
		}
		if after := mustJSON(t, result.Pod); !bytes.Equal(after, mustJSON(t, &got)) {
			t.Fatalf("patch makes\n%s, want\n%s", mustJSON(t, &got), after)
		}
		again, err := in.Inject(&got, ns)
		if err != nil {
			t.Fatalf("injected again: %v", err)
		}
		if patch := mustPatch(t, &got, again.Pod); patch != nil {
			t.Fatalf("injected again it changes: %s", patch)
		}
		checkDocument(t, result.Pod)
		for _, c := range result.Pod.Spec.Containers {
			if s := c.SecurityContext; c.Name != "istio-proxy" && s != nil {
				t.Fatalf("container %s got a security context", c.Name)
			}
		}
	})
	if injected == 0 {
		t.Error("every pod was refused")
	}
}

// checkDocument reads what the proxy reads, as it reads it, and finds every probe
// unchanged that was drawn.
func checkDocument(t *rapid.T, pod *corev1.Pod) {
	for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		for _, e := range c.Env {
			var doc config.Proxy
			if e.Name != "CASTELLAN_PROXY_CONFIG" {
				continue
			}
			if err := config.Unmarshal([]byte(e.Value), &doc); err != nil {
				t.Fatalf("%v: %s", err, e.Value)
			}
			var plain config.Proxy
			if err := json.Unmarshal([]byte(e.Value), &plain); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(mustJSON(t, doc), mustJSON(t, plain)) {
				t.Fatalf("as YAML it says %s, as JSON %s", mustJSON(t, doc), mustJSON(t, plain))
			}
			if err := doc.Validate(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func mustJSON(t *rapid.T, v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func mustPatch(t *rapid.T, before, after *corev1.Pod) []byte {
	patch, err := webhook.Patch(before, after)
	if err != nil {
		t.Fatal(err)
	}
	return patch
}

// Any two pods: the patch leads from one to the other, whatever was moved or removed.
func TestPatchProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		from, to := pods().Draw(t, "from"), pods().Draw(t, "to")
		patch := mustPatch(t, from, to)
		if patch == nil {
			patch = []byte("[]")
		}
		decoded, err := jsonpatch.DecodePatch(patch)
		if err != nil {
			t.Fatal(err)
		}
		patched, err := decoded.Apply(mustJSON(t, from))
		if err != nil {
			t.Fatalf("%v: %s", err, patch)
		}
		var got corev1.Pod
		if err := json.Unmarshal(patched, &got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(mustJSON(t, to), mustJSON(t, &got)) {
			t.Fatalf("%s\nmakes %s\nof %s\nwant %s", patch, patched, mustJSON(t, from), mustJSON(t, to))
		}
	})
}
