package kube

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"

	"castellan.dev/internal/workloads"
)

// byHand is a cluster whose readings are made by hand.
type byHand struct {
	tb  testing.TB
	inv *Inventory
	in  *Informers
	log *bytes.Buffer
	n   int
}

func newByHand(tb testing.TB) *byHand {
	tb.Helper()
	in, err := NewInformers(InformersConfig{Kubernetes: fake.NewClientset(), Dynamic: dynamicfake.NewSimpleDynamicClient(runtime.NewScheme())})
	if err != nil {
		tb.Fatal(err)
	}
	log, began := &bytes.Buffer{}, time.Now()
	return &byHand{tb: tb, in: in, log: log, inv: NewInventory(InventoryConfig{Informers: in,
		Log: slog.New(slog.NewTextHandler(log, nil)), Now: func() time.Time { return began }})}
}

// run makes one update, and returns it to be looked at.
func (h *byHand) run() *update {
	u := newUpdate(h.inv, h.inv.dirty)
	h.inv.dirty = noChanges()
	u.run()
	return u
}

// service is a service as it was made last, nil for one that is not known to the mesh.
func (h *byHand) service(key string) *workloads.Service {
	h.tb.Helper()
	s := h.inv.services[key]
	if s == nil {
		h.tb.Fatalf("%s is not there", key)
	}
	return s.made
}

func (h *byHand) put(objects ...runtime.Object) {
	h.tb.Helper()
	for _, o := range objects {
		h.n++
		m := o.(metav1.Object)
		m.SetResourceVersion(fmt.Sprint(h.n))
		to := h.in.pods
		switch o.(type) {
		case *corev1.Service:
			to = h.in.services
		case *discoveryv1.EndpointSlice:
			to = h.in.endpoints
		}
		if err := to.Add(to.reduce(o)); err != nil {
			h.tb.Fatal(err)
		}
	}
}

func meshPodNo(namespace string, i int, labels map[string]string) *corev1.Pod {
	l := map[string]string{"app": "orders", labelMesh: labelMeshValue}
	maps.Copy(l, labels)
	name := fmt.Sprint("p", i)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(namespace + name), Labels: l},
		Spec:       corev1.PodSpec{NodeName: "n", ServiceAccountName: "orders"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: fmt.Sprintf("10.1.%d.%d", i>>8, i&255)},
	}
}

func serviceNo(namespace string, i int, selector map[string]string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("s", i), UID: types.UID(fmt.Sprint(namespace, "s", i))},
		Spec: corev1.ServiceSpec{Selector: selector, ClusterIPs: []string{fmt.Sprintf("10.2.%d.%d", i>>8, i&255)}, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}}
}

// sliceNo lists endpoints of several addresses each, the first of them 10.1.0.0 and on.
func sliceNo(namespace string, i, endpoints, each int) *discoveryv1.EndpointSlice {
	name, port := "http", int32(8080)
	s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("s", i), Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprint("s", i)}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}}}
	for e := range endpoints {
		var addresses []string
		for a := range each {
			addresses = append(addresses, fmt.Sprintf("10.%d.%d.%d", a+1, e>>8, e&255))
		}
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: addresses})
	}
	return s
}

// work is how many services an update puts together anew, how many of these it reads
// the slices of, and how many places it looks at.
func work(u *update) (services, read, places int) {
	for key := range u.changes.services {
		services, places = services+1, places+len(u.services[key].listed)
	}
	return services, len(u.relist), places
}

// TestALabelCostsWhatHangsOnIt: services that list or select a pod are put together
// anew where what has changed of it matters to them, and never cost the product of
// services, their addresses and each other.
func TestALabelCostsWhatHangsOnIt(t *testing.T) {
	const all = 120
	h := newByHand(t)
	for i := range all {
		h.put(serviceNo("evil", i, nil), sliceNo("evil", i, 1000, 3))
	}
	h.put(serviceNo("shop", 0, map[string]string{"app": "orders"}), sliceNo("shop", 0, 1, 1), serviceNo("shop", 1, map[string]string{"tier": "front"}))
	h.put(meshPodNo("shop", 0, nil), meshPodNo("shop", 1, nil))
	h.run()
	if n := len(h.inv.users); n != 1000 {
		t.Errorf("%d addresses are followed: an endpoint has one that counts", n)
	}
	if n := len(slices.Collect(h.inv.users["10.1.0.0"].all())); n != 101 {
		t.Errorf("%d services are followed at an address; those beyond the namespace's share cost nothing", n)
	}
	tests := []struct {
		what           string
		labels         map[string]string
		services, most int
	}{
		{"a label that nobody asks for", map[string]string{"x": "1"}, 0, 0},
		{"one that another service selects", map[string]string{"tier": "front"}, 1, 0},
		{"and no more", nil, 1, 0},
		{"whether it is of the mesh", map[string]string{labelMesh: ""}, 101, 100_001},
		{"and again", nil, 101, 100_001},
	}
	for _, tt := range tests {
		h.put(meshPodNo("shop", 0, tt.labels))
		services, read, places := work(h.run())
		if services != tt.services || read != 0 || places > tt.most {
			t.Errorf("%s: %d services are put together, the slices of %d are read, %d places are looked at", tt.what, services, read, places)
		}
	}
	// One of its namespace joins those of an account that answers already.
	h.put(meshPodNo("shop", 2, nil))
	if services, _, _ := work(h.run()); services != 100 { // those that list its address, and not its own
		t.Errorf("a pod that is new: %d services", services)
	}
	h.put(meshPodNo("shop", 1100, nil))
	if services, _, _ := work(h.run()); services != 0 {
		t.Errorf("a pod that is new, at an address of nobody's: %d services", services)
	}
}

// BenchmarkLabel is one label of one pod that changes, in clusters where services
// have much to do with it: the label is none of theirs, or says whether the pod is
// of the mesh.
func BenchmarkLabel(b *testing.B) {
	for _, label := range []string{"any", labelMesh} {
		for _, s := range []int{50, 100, 200, 400} {
			b.Run(fmt.Sprintf("%s/%d services of 20000 addresses", label, s), func(b *testing.B) {
				h := newByHand(b)
				for i := range s {
					h.put(serviceNo("evil", i, nil), sliceNo("evil", i, 1000, 20))
				}
				flip(b, h, 1, label)
			})
		}
		for _, s := range []int{250, 1000, 4000} {
			b.Run(fmt.Sprintf("%s/%d services select 200 pods", label, s), func(b *testing.B) {
				h := newByHand(b)
				for i := range s {
					h.put(serviceNo("evil", i, map[string]string{"app": "orders"}))
				}
				flip(b, h, 200, label)
			})
		}
	}
}

func flip(b *testing.B, h *byHand, pods int, label string) {
	b.Helper()
	for i := range pods {
		h.put(meshPodNo("evil", i, nil))
	}
	h.inv.update()
	for b.Loop() {
		h.put(meshPodNo("evil", 0, map[string]string{label: fmt.Sprint(h.n)}))
		h.inv.update()
		h.put(meshPodNo("evil", 0, map[string]string{label: labelMeshValue}))
		h.inv.update()
	}
}
