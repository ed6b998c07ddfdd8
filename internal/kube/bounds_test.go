package kube_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// manySlices are of one service, each with a thousand addresses of nobody.
func manySlices(n int, change func(*discoveryv1.EndpointSlice)) []runtime.Object {
	var out []runtime.Object
	for i := range n {
		out = append(out, sliceOf("evil", "many", func(s *discoveryv1.EndpointSlice) {
			s.Name = fmt.Sprint("many-", i)
			for k := range 1000 {
				s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("192.%d.%d.%d", i, k>>8, k&255)}})
			}
			change(s)
		}))
	}
	return out
}

// TestManyEnding: slices of endpoints that all end cost what they are long, not the
// square of it; whoever writes them would stop the news of all others.
func TestManyEnding(t *testing.T) {
	yes, no := true, false
	objects := manySlices(100, func(s *discoveryv1.EndpointSlice) {
		for i := range s.Endpoints {
			s.Endpoints[i].Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
		}
	})
	began := time.Now()
	s := newScene(t, append(objects, svc("evil", "many", ""))...)
	if n := len(s.inv.Current().Services[0].Endpoints); n != 5000 {
		t.Errorf("%d endpoints", n)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("reading took %v", took)
	}
}

// TestPlacesOfAService: ports multiply endpoints, and every proxy of the mesh holds
// the product.
func TestPlacesOfAService(t *testing.T) {
	const ports = 100
	many := svc("evil", "many", "", func(s *corev1.Service) {
		s.Spec.Ports = nil
		for p := range ports {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprint("p", p), Port: int32(1000 + p)})
		}
	})
	objects := manySlices(5, func(s *discoveryv1.EndpointSlice) {
		s.Ports = nil
		for p := range ports {
			name, number := fmt.Sprint("p", p), int32(1000+p)
			s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &number})
		}
	})
	s := newScene(t, append(objects, many)...)
	places := 0
	for _, e := range s.inv.Current().Services[0].Endpoints {
		places += len(e.Ports)
	}
	if places != 20_000 || !strings.Contains(s.log.String(), "20000 times the ports they serve") {
		t.Errorf("%d places; log %s", places, s.log)
	}
}

// TestPortsOfAService: one that has too many is left out, and declares nothing of
// its pods beyond the bound; services beside it stay.
func TestPortsOfAService(t *testing.T) {
	s := newScene(t, meshPod("shop", "orders-1", "orders", "10.0.0.1"), svc("shop", "orders", "orders"),
		svc("shop", "wide", "orders", func(s *corev1.Service) {
			s.Spec.Ports = nil
			for p := range 1001 {
				s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprint("http-", p), Port: int32(10_000 + p), TargetPort: intstr.FromInt32(int32(10_000 + p))})
			}
		}))
	f := s.inv.Current()
	if len(f.Services) != 1 || f.Services[0].Name != "orders" || !strings.Contains(s.log.String(), "more than the 1000 that are allowed") {
		t.Errorf("%v; log %s", f.Services, s.log)
	}
	if n := len(f.Workloads[0].Ports); n != 1001 { // 8080 is one
		t.Errorf("%d ports are declared", n)
	}
}

// TestPlacesOfANamespace: many services do not get around the bound of one, and
// other namespaces keep what they have; within the bound again, all are back.
func TestPlacesOfANamespace(t *testing.T) {
	const ports = 20
	s := newScene(t, meshPod("shop", "orders-1", "orders", "10.0.0.1"), svc("shop", "orders", "orders"),
		sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", "uid-orders-1"}))
	name := func(i int) string { return fmt.Sprint("many-", i) }
	for i := range 6 {
		many := svc("evil", name(i), "")
		many.Spec.Ports = nil
		slice := manySlices(1, func(*discoveryv1.EndpointSlice) {})[0].(*discoveryv1.EndpointSlice)
		slice.Name, slice.Labels, slice.Ports = name(i), map[string]string{discoveryv1.LabelServiceName: name(i)}, nil
		for p := range ports {
			port, number := fmt.Sprint("p", p), int32(1000+p)
			many.Spec.Ports = append(many.Spec.Ports, corev1.ServicePort{Name: port, Port: number})
			slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &port, Port: &number})
		}
		if err := s.client.Tracker().Add(many); err != nil {
			t.Fatal(err)
		}
		if err := s.client.Tracker().Add(slice); err != nil {
			t.Fatal(err)
		}
	}
	with := func() (evil, shop int) {
		for _, svc := range s.inv.Current().Services {
			switch {
			case len(svc.Endpoints) == 0:
			case svc.Namespace == "evil":
				evil++
			default:
				shop++
			}
		}
		return evil, shop
	}
	revision := func() uint64 {
		services := s.inv.Current().Services
		return services[len(services)-2].Revision // the last of evil's
	}
	eventually(t, "five of six", func() bool {
		evil, shop := with()
		return evil == 5 && shop == 1 && len(s.inv.Current().Services) == 7
	})
	before := revision()
	if err := s.client.CoreV1().Services("evil").Delete(t.Context(), name(0), metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the sixth", func() bool {
		evil, shop := with()
		return evil == 5 && shop == 1 && len(s.inv.Current().Services) == 6
	})
	if revision() == before {
		t.Error("the service has its endpoints back, and is called the same")
	}
}
