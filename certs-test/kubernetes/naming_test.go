package kubernetes_test

import (
	"testing"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// slice is an EndpointSlice written by hand.
func slice(t *testing.T, ns, service, name string, to *app) {
	t.Helper()
	var ports []object
	for port, n := range map[string]int{"http": control.HTTP, "tcp": control.TCP, "grpc": control.GRPC} {
		ports = append(ports, object{"name": port, "port": n, "protocol": "TCP"})
	}
	err := api.post("/apis/discovery.k8s.io/v1/namespaces/"+ns+"/endpointslices", object{
		"metadata":    object{"name": name, "labels": object{"kubernetes.io/service-name": service}},
		"addressType": "IPv4", "ports": ports,
		"endpoints": []object{{"addresses": []string{to.IP}, "conditions": object{"ready": true}}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
}

// Promise: secure naming refuses a service whose endpoints run as another account,
// whoever wrote them.
func TestSecureNaming(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns = "naming"
	namespace(t, ns, injected)
	apps := deploy(t, ns, pod{Name: "pay", Node: "node-1"}, pod{Name: "thief", Node: "node-2"})
	call := func(service string) []control.Call {
		return []control.Call{
			{Kind: "http", URL: "http://" + service + "." + ns + "/"},
			{Kind: "grpc", URL: service + "." + ns + ":9090"},
			{Kind: "tcp", URL: service + "." + ns + ":9000", Body: "x"},
		}
	}
	none := func(spec object) { spec["selector"] = object{"app": "nobody"} }
	without := func(spec object) { delete(spec, "selector") }
	service(t, ns, "pay")               // selects pay
	service(t, ns, "empty", none)       // selects nobody
	service(t, ns, "declared", without) // says who may answer
	if err := api.merge("/api/v1/namespaces/"+ns+"/services/declared",
		object{"metadata": object{"annotations": object{"alpha.istio.io/canonical-serviceaccounts": apps["pay"].id()}}}); err != nil {
		t.Fatal(err)
	}
	slice(t, ns, "declared", "declared-pay", apps["pay"])
	for _, s := range []string{"pay", "declared"} {
		for _, c := range call(s) {
			succeeds(t, from.web, c)
		}
	}
	for _, s := range []string{"empty", "declared", "pay"} {
		slice(t, ns, s, s+"-by-hand", apps["thief"])
	}
	// The pod answers as itself; and whoever knows the service that was made last knows
	// all that was written before it.
	service(t, ns, "thief")
	calledBy(t, from.web.reaches(t, "http://thief."+ns+"/"), from.web)
	for _, c := range call("empty") {
		from.web.fails(t, c)
	}
	// Where a rightful endpoint stands beside, it answers or nobody does.
	for _, s := range []string{"pay", "declared"} {
		for i := range 20 {
			r, err := from.web.get("http://" + s + "." + ns + "/")
			if err != nil {
				t.Fatal(err)
			}
			if r.Seen != nil && r.Seen.Pod != "pay" {
				t.Fatalf("call %d of %s was answered by %s", i, s, r.Seen.Pod)
			}
		}
	}
	if err := api.remove("/apis/discovery.k8s.io/v1/namespaces/" + ns + "/endpointslices/declared-pay"); err != nil {
		t.Fatal(err)
	}
	for _, c := range call("declared") {
		from.web.fails(t, c)
	}
}
