package kube_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"

	"castellan.dev/internal/kube"
	"castellan.dev/internal/workloads"
)

// scene is a cluster of fakes with an inventory of it.
type scene struct {
	t      *testing.T
	client *fake.Clientset
	inv    *kube.Inventory
	log    *bytes.Buffer // to be read when nothing changes any more
}

func newScene(t *testing.T, objects ...runtime.Object) *scene {
	t.Helper()
	s := &scene{t: t, client: fake.NewClientset(objects...), log: &bytes.Buffer{}}
	i, err := kube.NewInformers(kube.InformersConfig{Kubernetes: s.client, Dynamic: dynamicfake.NewSimpleDynamicClient(runtime.NewScheme())})
	if err != nil {
		t.Fatal(err)
	}
	s.inv = kube.NewInventory(kube.InventoryConfig{Informers: i, Log: slog.New(slog.NewTextHandler(s.log, nil))})
	if s.inv.Current() != nil {
		t.Error("something is known before Run")
	}
	opened := watchCount(s.client, s.client.Tracker())
	background(t, i.Run, s.inv.Run)
	eventually(t, "first reading", func() bool { return s.inv.Current() != nil && opened.Load() >= kindsWatched })
	return s
}

func (s *scene) become(want ...string) {
	s.t.Helper()
	var got []string
	deadline := time.Now().Add(patience)
	for {
		got = describe(s.inv.Current())
		if slices.Equal(got, want) {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the cluster reads\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// describe writes a reading, one line for each workload and service.
func describe(f *workloads.File) []string {
	out := []string{}
	for _, w := range f.Workloads {
		line := fmt.Sprintf("pod %s/%s %s %s %v", w.Namespace, w.PodName, w.ServiceAccount, w.Node, append([]string{w.Address}, w.Addresses...))
		for _, p := range w.Ports {
			line += fmt.Sprintf(" %d=%s", p.Number, p.Protocol)
		}
		if w.OutsideMesh {
			line += " outside"
		}
		out = append(out, line)
	}
	for _, s := range f.Services {
		line := fmt.Sprintf("service %s/%s %v", s.Namespace, s.Name, s.Addresses)
		for _, p := range s.Ports {
			line += fmt.Sprintf(" %d=%s", p.Number, p.Protocol)
		}
		line += fmt.Sprintf(" accounts %v", s.Accounts)
		if len(s.SubjectAltNames) > 0 {
			line += fmt.Sprintf(" declared %v", s.SubjectAltNames)
		}
		for _, e := range s.Endpoints {
			line += fmt.Sprintf(" [%s@%s %v", e.Workload, e.Address, e.Ports)
			if e.OutsideMesh {
				line += " outside"
			}
			line += "]"
		}
		out = append(out, line)
	}
	return out
}

// meshPod is a running pod of the mesh, of the account of its app.
func meshPod(namespace, name, app, ip string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID("uid-" + name),
			Labels: map[string]string{"app": app, "security.istio.io/tlsMode": "istio"}},
		Spec: corev1.PodSpec{NodeName: "node-1", ServiceAccountName: app,
			Containers: []corev1.Container{{Name: "app", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip},
	}
	if ip != "" {
		p.Status.PodIPs = []corev1.PodIP{{IP: ip}}
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func outside(p *corev1.Pod) { delete(p.Labels, "security.istio.io/tlsMode") }

func onHost(p *corev1.Pod) { p.Spec.HostNetwork = true }

// svc is a service that selects an app, "" for none.
func svc(namespace, name, app string, change ...func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID("svc-" + name)},
		Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("web")}}},
	}
	if app != "" {
		s.Spec.Selector = map[string]string{"app": app}
	}
	for _, c := range change {
		c(s)
	}
	return s
}

func declares(text string) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Annotations = map[string]string{"alpha.istio.io/canonical-serviceaccounts": text}
	}
}

// endpoint is an address of a slice and, unless empty, the UID its targetRef claims.
type endpoint struct{ address, uid string }

func sliceOf(namespace, service string, change func(*discoveryv1.EndpointSlice), endpoints ...endpoint) *discoveryv1.EndpointSlice {
	name, port, tcp := "http", int32(8080), corev1.ProtocolTCP
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: service + "-x", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &tcp}},
	}
	for _, e := range endpoints {
		de := discoveryv1.Endpoint{Addresses: []string{e.address}}
		if e.uid != "" {
			de.TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, UID: types.UID(e.uid)}
		}
		s.Endpoints = append(s.Endpoints, de)
	}
	if change != nil {
		change(s)
	}
	return s
}

const (
	podOrders  = "pod shop/orders-1 orders node-1 [10.0.0.1] 8080=http"
	podOrders0 = "pod shop/orders-1 orders node-1 [10.0.0.1]" // no service declares its ports
	podEvil    = "pod evil/evil-1 evil node-1 [10.0.0.9]"
)

// TestSecureNaming is rule 33 on Kubernetes, as one who can write EndpointSlices
// would try it.
func TestSecureNaming(t *testing.T) {
	orders := meshPod("shop", "orders-1", "orders", "10.0.0.1")
	evil := meshPod("evil", "evil-1", "evil", "10.0.0.9")
	tests := map[string]struct {
		objects []runtime.Object
		want    []string
	}{
		"a service's pods answer for it": {
			[]runtime.Object{orders, svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", "uid-orders-1"})},
			[]string{podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]]"},
		},
		"a pod of another namespace put into the slice keeps its own identity, which is not expected": {
			[]runtime.Object{orders, evil, svc("shop", "orders", "orders"),
				sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", "uid-orders-1"}, endpoint{"10.0.0.9", "uid-evil-1"})},
			[]string{podEvil, podOrders,
				"service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]] [uid-evil-1@10.0.0.9 map[80:8080]]"},
		},
		"a slice that lies about whose address it is": {
			[]runtime.Object{orders, evil, svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"10.0.0.9", "uid-orders-1"})},
			[]string{podEvil, podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-evil-1@10.0.0.9 map[80:8080]]"},
		},
		"no targetRef: the address tells": {
			[]runtime.Object{orders, svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", ""})},
			[]string{podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]]"},
		},
		"an address of no pod is no endpoint of a service with a selector": {
			[]runtime.Object{orders, svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"192.0.2.1", ""}, endpoint{"192.0.2.2", "uid-orders-1"})},
			[]string{podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders]"},
		},
		"nor is a pod outside the mesh that it does not select": {
			[]runtime.Object{orders, meshPod("evil", "evil-1", "evil", "10.0.0.9", outside), svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"10.0.0.9", "uid-evil-1"})},
			[]string{podEvil + " outside", podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders]"},
		},
		"a pod outside the mesh that it does select is, and adds no identity": {
			[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1", outside), svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", ""})},
			[]string{podOrders + " outside", "service shop/orders [10.96.0.1] 80=http accounts [] [uid-orders-1@10.0.0.1 map[80:8080] outside]"},
		},
		"without a selector nobody is expected, so that nobody is accepted": {
			[]runtime.Object{orders, svc("shop", "manual", ""), sliceOf("shop", "manual", nil, endpoint{"10.0.0.1", ""}, endpoint{"192.0.2.1", ""})},
			[]string{podOrders0, "service shop/manual [10.96.0.1] 80=http accounts [] [uid-orders-1@10.0.0.1 map[80:8080]] [@192.0.2.1 map[80:8080] outside]"},
		},
		"declared identities are demanded of every endpoint": {
			[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1", outside), svc("shop", "manual", "", declares("spiffe://cluster.local/ns/shop/sa/orders, other.td/ns/a/sa/b")),
				sliceOf("shop", "manual", nil, endpoint{"10.0.0.1", ""}, endpoint{"192.0.2.1", ""})},
			[]string{podOrders0 + " outside", "service shop/manual [10.96.0.1] 80=http accounts [] declared [spiffe://cluster.local/ns/shop/sa/orders spiffe://other.td/ns/a/sa/b]" +
				" [uid-orders-1@10.0.0.1 map[80:8080]] [@192.0.2.1 map[80:8080]]"},
		},
		"a declaration that nobody can read declares nobody, and is not as if there were none": {
			[]runtime.Object{svc("shop", "manual", "", declares("*")), sliceOf("shop", "manual", nil, endpoint{"192.0.2.1", ""})},
			[]string{"service shop/manual [10.96.0.1] 80=http accounts [] [@192.0.2.1 map[80:8080]]"},
		},
		"pods on the host's network share an address: the slice chooses among them": {
			[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1", onHost), meshPod("shop", "other-1", "other", "10.0.0.1", onHost), svc("shop", "orders", "orders"),
				sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", "uid-orders-1"})},
			[]string{podOrders, "pod shop/other-1 other node-1 [10.0.0.1]", "service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]]"},
		},
		"and without its word nobody does": {
			[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1", onHost), svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", ""})},
			[]string{podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders]"},
		},
		"a service in another namespace selects none of its pods": {
			[]runtime.Object{orders, svc("evil", "orders", "orders"), sliceOf("evil", "orders", nil, endpoint{"10.0.0.1", "uid-orders-1"})},
			[]string{podOrders0, "service evil/orders [10.96.0.1] 80=http accounts [] [uid-orders-1@10.0.0.1 map[80:8080]]"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			newScene(t, tt.objects...).become(tt.want...)
		})
	}
}

func TestConversion(t *testing.T) {
	yes, no := true, false
	web := "kubernetes.io/h2c"
	ended := func(phase corev1.PodPhase) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Status.Phase = phase }
	}
	tests := map[string]struct {
		objects []runtime.Object
		want    []string
	}{
		"pods that have ended or are nowhere yet are none": {
			[]runtime.Object{meshPod("shop", "a", "orders", "", ended(corev1.PodSucceeded)), meshPod("shop", "b", "orders", "", ended(corev1.PodFailed)),
				meshPod("shop", "c", "orders", "", func(p *corev1.Pod) { p.Spec.NodeName = "" }), meshPod("shop", "d", "orders", "", ended(corev1.PodPending))},
			[]string{"pod shop/d orders node-1 []"},
		},
		"what cannot be represented does not hold up the rest": {
			[]runtime.Object{meshPod("shop", "bad", "Not_A_Name", "10.0.0.2"), meshPod("shop", "orders-1", "orders", "10.0.0.1"),
				svc("shop", "Bad_Name", "orders"), svc("shop", "orders", "orders")},
			[]string{podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders]"},
		},
		"both families": {
			[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1", func(p *corev1.Pod) {
				p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: "fd00::1"})
			}), svc("shop", "orders", "orders", func(s *corev1.Service) { s.Spec.ClusterIPs = []string{"10.96.0.1", "fd00:96::1"} }),
				sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", "uid-orders-1"}),
				sliceOf("shop", "orders", func(s *discoveryv1.EndpointSlice) { s.Name, s.AddressType = "v6", discoveryv1.AddressTypeIPv6 }, endpoint{"fd00::1", "uid-orders-1"})},
			[]string{"pod shop/orders-1 orders node-1 [10.0.0.1 fd00::1] 8080=http",
				"service shop/orders [10.96.0.1 fd00:96::1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]] [uid-orders-1@fd00::1 map[80:8080]]"},
		},
		"headless, and of none but other protocols, and by another name": {
			[]runtime.Object{
				svc("shop", "headless", "orders", func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "None", []string{"None"} }),
				svc("shop", "dns", "orders", func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolUDP }),
				svc("shop", "elsewhere", "", func(s *corev1.Service) {
					s.Spec.Type, s.Spec.ExternalName = corev1.ServiceTypeExternalName, "example.com"
				})},
			[]string{"service shop/headless [] 80=http accounts []"},
		},
		"ports say their protocol": {
			[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1"), svc("shop", "orders", "orders", func(s *corev1.Service) {
				s.Spec.Ports = []corev1.ServicePort{
					{Name: "grpc-api", Port: 1}, {Name: "http2", Port: 2}, {Name: "grpc-web-x", Port: 3}, {Name: "https-x", Port: 4}, {Name: "tls", Port: 5},
					{Name: "mysql-db", Port: 6}, {Name: "unknown", Port: 7}, {Name: "tcp", Port: 8, AppProtocol: &web}, {Name: "db", Port: 3306},
					{Name: "named", Port: 9, TargetPort: intstr.FromString("web")}, {Name: "http", Port: 10, TargetPort: intstr.FromString("nowhere")},
					{Name: "http-udp", Port: 11, Protocol: corev1.ProtocolUDP}, {Name: "tcp-8080", Port: 12, TargetPort: intstr.FromInt32(1)}}
			})},
			// 1 is declared twice, as grpc and as tcp: then nobody declares it.
			[]string{"pod shop/orders-1 orders node-1 [10.0.0.1] 1= 2=http2 3=http 4=https 5=tls 6=tcp 7= 8=http2 3306=tcp 8080=",
				"service shop/orders [10.96.0.1] 1=grpc 2=http2 3=http 4=https 5=tls 6=tcp 7= 8=http2 3306=tcp 9= 10=http 12=tcp accounts [shop/orders]"},
		},
		"endpoints that are ready, or serve to their end where none is": {
			[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1"), meshPod("shop", "orders-2", "orders", "10.0.0.2"),
				svc("shop", "orders", "orders"), svc("shop", "ending", "orders"),
				sliceOf("shop", "orders", func(s *discoveryv1.EndpointSlice) {
					s.Endpoints[0].Conditions.Ready = &no
					s.Endpoints[0].Conditions.Serving, s.Endpoints[0].Conditions.Terminating = &yes, &yes
					s.Endpoints[1].Conditions.Ready = &yes
				}, endpoint{"10.0.0.1", ""}, endpoint{"10.0.0.2", ""}),
				sliceOf("shop", "ending", func(s *discoveryv1.EndpointSlice) {
					for i := range s.Endpoints {
						s.Endpoints[i].Conditions.Ready = &no
					}
					s.Endpoints[0].Conditions.Serving, s.Endpoints[0].Conditions.Terminating = &yes, &yes
				}, endpoint{"10.0.0.1", ""}, endpoint{"10.0.0.2", ""})},
			[]string{podOrders, strings.ReplaceAll(strings.ReplaceAll(podOrders, "0.1", "0.2"), "orders-1", "orders-2"),
				"service shop/ending [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]]",
				"service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-2@10.0.0.2 map[80:8080]]"},
		},
		"odd slices": {
			[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1"), svc("shop", "orders", "orders"),
				sliceOf("shop", "orders", func(s *discoveryv1.EndpointSlice) { s.Name, s.AddressType = "a", discoveryv1.AddressTypeFQDN }, endpoint{"example.com", ""}),
				sliceOf("shop", "orders", func(s *discoveryv1.EndpointSlice) { s.Name = "b"; s.Ports[0].Port = nil }, endpoint{"10.0.0.1", ""}),
				sliceOf("shop", "orders", func(s *discoveryv1.EndpointSlice) { s.Name = "c"; *s.Ports[0].Name = "other" }, endpoint{"10.0.0.1", ""}),
				sliceOf("shop", "orders", func(s *discoveryv1.EndpointSlice) { s.Name = "d"; *s.Ports[0].Port = 70000 }, endpoint{"10.0.0.1", ""}),
				sliceOf("shop", "orders", func(s *discoveryv1.EndpointSlice) { s.Name = "e"; s.Endpoints[0].Addresses = nil }, endpoint{"10.0.0.1", ""}),
				sliceOf("shop", "orders", func(s *discoveryv1.EndpointSlice) { s.Name = "f" }, endpoint{"not an address", ""}),
				sliceOf("shop", "gone", nil, endpoint{"10.0.0.1", ""})},
			[]string{podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders]"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			newScene(t, tt.objects...).become(tt.want...)
		})
	}
}

// TestChanges: whatever happens to one object is seen in all that hang on it.
func TestChanges(t *testing.T) {
	s := newScene(t, meshPod("shop", "orders-1", "orders", "10.0.0.1"))
	ctx := t.Context()
	core, slicesOf := s.client.CoreV1(), s.client.DiscoveryV1().EndpointSlices("shop")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	s.become(podOrders0)
	_, err := core.Services("shop").Create(ctx, svc("shop", "orders", "orders"), metav1.CreateOptions{})
	check(err)
	s.become(podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders]")
	_, err = slicesOf.Create(ctx, sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", ""}, endpoint{"10.0.0.2", ""}), metav1.CreateOptions{})
	check(err)
	s.become(podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]]")
	// The pod behind an address that was nobody's.
	_, err = core.Pods("shop").Create(ctx, meshPod("shop", "orders-2", "orders", "10.0.0.2"), metav1.CreateOptions{})
	check(err)
	second := strings.ReplaceAll(strings.ReplaceAll(podOrders, "0.1", "0.2"), "orders-1", "orders-2")
	s.become(podOrders, second, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]] [uid-orders-2@10.0.0.2 map[80:8080]]")
	// It leaves the mesh, and what else hangs on it stays.
	before := s.inv.Current()
	_, err = core.Pods("shop").Update(ctx, meshPod("shop", "orders-2", "orders", "10.0.0.2", outside), metav1.UpdateOptions{})
	check(err)
	s.become(podOrders, second+" outside", "service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]] [uid-orders-2@10.0.0.2 map[80:8080] outside]")
	after := s.inv.Current()
	if before.Workloads[0].Revision != after.Workloads[0].Revision || before.Workloads[1].Revision == after.Workloads[1].Revision || before.Services[0].Revision == after.Services[0].Revision {
		t.Errorf("revisions before %+v, after %+v", before, after)
	}
	if n := s.inv.Matching("shop", map[string]string{"app": "orders"}); n != 1 {
		t.Errorf("%d workloads of the mesh match", n)
	}
	check(core.Pods("shop").Delete(ctx, "orders-2", metav1.DeleteOptions{}))
	s.become(podOrders, "service shop/orders [10.96.0.1] 80=http accounts [shop/orders] [uid-orders-1@10.0.0.1 map[80:8080]]")
	// What a selector no longer selects loses what the service declared of it.
	_, err = core.Services("shop").Update(ctx, svc("shop", "orders", "other"), metav1.UpdateOptions{})
	check(err)
	s.become(podOrders0, "service shop/orders [10.96.0.1] 80=http accounts [] [uid-orders-1@10.0.0.1 map[80:8080]]")
	check(slicesOf.Delete(ctx, "orders-x", metav1.DeleteOptions{}))
	s.become(podOrders0, "service shop/orders [10.96.0.1] 80=http accounts []")
	check(core.Services("shop").Delete(ctx, "orders", metav1.DeleteOptions{}))
	s.become(podOrders0)
	// Recreated under the same name: another pod.
	check(core.Pods("shop").Delete(ctx, "orders-1", metav1.DeleteOptions{}))
	s.become()
	_, err = core.Pods("shop").Create(ctx, meshPod("shop", "orders-1", "orders", "10.0.0.1", func(p *corev1.Pod) { p.UID = "uid-again" }), metav1.CreateOptions{})
	check(err)
	s.become(podOrders0)
	if uid := s.inv.Current().Workloads[0].PodUID; uid != "uid-again" {
		t.Errorf("UID %s", uid)
	}
}

// TestLeftOut: what is left out is said once, unless it is only the moment between
// a pod and the slice that names it.
func TestLeftOut(t *testing.T) {
	tests := map[string]struct {
		objects []runtime.Object
		want    string // in the log; empty: nothing is
	}{
		"a pod that is gone": {[]runtime.Object{svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", "uid-gone"})}, ""},
		"a pod without an address yet": {[]runtime.Object{meshPod("shop", "orders-1", "orders", ""), svc("shop", "orders", "orders"),
			sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", "uid-orders-1"})}, ""},
		"an address that a pod does not have": {[]runtime.Object{meshPod("shop", "orders-1", "orders", "10.0.0.1"), svc("shop", "orders", "orders"),
			sliceOf("shop", "orders", nil, endpoint{"192.0.2.1", "uid-orders-1"})}, "192.0.2.1"},
		"an address of nobody":     {[]runtime.Object{svc("shop", "orders", "orders"), sliceOf("shop", "orders", nil, endpoint{"192.0.2.1", ""})}, "192.0.2.1"},
		"a name that is none":      {[]runtime.Object{meshPod("shop", "bad", "Not_A_Name", "10.0.0.2")}, "Not_A_Name"},
		"an identity that is none": {[]runtime.Object{svc("shop", "orders", "", declares("https://x"))}, "https://x"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			log := newScene(t, tt.objects...).log.String()
			if tt.want == "" && log != "" || strings.Count(log, "level=WARN") > 1 || !strings.Contains(log, tt.want) {
				t.Errorf("log: %s", log)
			}
		})
	}
}
