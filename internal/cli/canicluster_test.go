package cli_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	castellanv1 "castellan.dev/api/castellan/v1"
)

const serverYAML = `apiVersion: castellan.dev/v1alpha1
kind: ServerConfig
dataDir: /var/lib/castellan
attestation: {}
kubernetes: {}
mesh: {trustDomain: cluster.local, rootNamespace: castellan-system, outboundPolicy: %s}
`

// shop puts into the cluster: the service orders with the pods orders-1 and orders-2,
// the pod legacy-1, which is outside the mesh, with its service, and mesh settings.
func (c *fakeCluster) shop() {
	c.settings("REGISTRY_ONLY")
	c.pods = []corev1.Pod{
		meshed("orders-1", "orders", "10.0.0.1", map[string]string{"app": "orders"}), meshed("orders-2", "orders", "10.0.0.2", map[string]string{"app": "orders"}),
		meshed("legacy-1", "legacy", "10.0.0.3", map[string]string{"app": "legacy"}),
	}
	delete(c.pods[2].Labels, "security.istio.io/tlsMode")
	c.set("/api/v1/namespaces/shop/pods/orders-1", c.pods[0])
	c.inventory()
	c.policies("")
}

func (c *fakeCluster) settings(outbound string) {
	c.set("/api/v1/namespaces/castellan-system/configmaps/castellan-server", corev1.ConfigMap{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"}, Data: map[string]string{"server.yaml": fmt.Sprintf(serverYAML, outbound)},
	})
}

func meshed(name, account, ip string, labels map[string]string) corev1.Pod {
	p := runningPod("shop", name, account, "node-1")
	p.Labels = map[string]string{"security.istio.io/tlsMode": "istio"}
	for k, v := range labels {
		p.Labels[k] = v
	}
	p.Status.PodIP = ip
	return p
}

// inventory publishes the pods, and services with endpoints for them.
func (c *fakeCluster) inventory() {
	c.set("/api/v1/namespaces/shop/pods", corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, Items: c.pods})
	c.set("/api/v1/namespaces/empty/pods", corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}})
	services := corev1.ServiceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceList"}}
	endpoints := discoveryv1.EndpointSliceList{TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"}}
	c.set("/api/v1/namespaces/empty/services", services)
	c.set("/apis/discovery.k8s.io/v1/namespaces/empty/endpointslices", endpoints)
	for _, app := range []string{"orders", "legacy"} {
		s := corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: app}}
		s.Spec = corev1.ServiceSpec{ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"}, Selector: map[string]string{"app": app}, Ports: []corev1.ServicePort{
			{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}, {Name: "tcp-db", Port: 9000}, {Name: "misc", Port: 9100},
		}}
		services.Items = append(services.Items, s)
		slice := discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: app + "-x", Labels: map[string]string{discoveryv1.LabelServiceName: app}},
			AddressType: discoveryv1.AddressTypeIPv4,
		}
		for name, port := range map[string]int32{"http": 8080, "tcp-db": 9000, "misc": 9100} {
			slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port})
		}
		for i := range c.pods {
			if c.pods[i].Labels["app"] == app {
				slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{c.pods[i].Status.PodIP}, TargetRef: &corev1.ObjectReference{Kind: "Pod", UID: c.pods[i].UID}})
			}
		}
		endpoints.Items = append(endpoints.Items, slice)
	}
	c.set("/api/v1/namespaces/shop/services", services)
	c.set("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices", endpoints)
}

// dualStack adds endpoints at addresses of the other family to the service orders.
func (c *fakeCluster) dualStack() {
	const path = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices"
	for i := range c.pods {
		c.pods[i].Status.PodIPs = []corev1.PodIP{{IP: c.pods[i].Status.PodIP}, {IP: fmt.Sprintf("fd00::%d", i+1)}}
	}
	c.inventory()
	c.mu.Lock()
	defer c.mu.Unlock()
	list, _ := c.objects[path].(discoveryv1.EndpointSliceList)
	second := *list.Items[0].DeepCopy()
	second.Name, second.AddressType = "orders-6", discoveryv1.AddressTypeIPv6
	for i := range second.Endpoints {
		second.Endpoints[i].Addresses = []string{fmt.Sprintf("fd00::%d", i+1)}
	}
	list.Items = append(list.Items, second)
	c.objects[path] = list
}

// policies publishes documents of YAML as the cluster's.
func (c *fakeCluster) policies(text string) {
	const group = "/apis/security.istio.io/v1"
	kinds := map[string]string{"AuthorizationPolicy": "authorizationpolicies", "RequestAuthentication": "requestauthentications", "PeerAuthentication": "peerauthentications"}
	resources := metav1.APIResourceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIResourceList"}, GroupVersion: "security.istio.io/v1"}
	for kind, resource := range kinds {
		resources.APIResources = append(resources.APIResources, metav1.APIResource{Name: resource, Kind: kind, Namespaced: true})
		for _, ns := range []string{"shop", "empty", "castellan-system"} {
			c.set(group+"/namespaces/"+ns+"/"+resource, map[string]any{"apiVersion": "security.istio.io/v1", "kind": kind + "List", "items": []any{}})
		}
	}
	c.set(group, resources)
	for doc := range strings.SplitSeq(text, "---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		data, err := yaml.YAMLToJSON([]byte(doc))
		if err != nil {
			c.t.Fatal(err)
		}
		var object map[string]any
		if err := json.Unmarshal(data, &object); err != nil {
			c.t.Fatal(err)
		}
		meta, _ := object["metadata"].(map[string]any)
		meta["uid"], meta["generation"] = fmt.Sprint("uid-", meta["name"]), 1
		kind, _ := object["kind"].(string)
		path := fmt.Sprintf("%s/namespaces/%s/%s", group, meta["namespace"], kinds[kind])
		c.mu.Lock()
		list, _ := c.objects[path].(map[string]any)
		items, _ := list["items"].([]any)
		list["items"] = append(items, object)
		c.mu.Unlock()
	}
}

const ordersForGET = `---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: orders, namespace: shop}
spec: {selector: {matchLabels: {app: orders}}, rules: [{from: [{source: {principals: ["cluster.local/ns/shop/sa/frontend"]}}], to: [{operation: {methods: [GET]}}]}]}
`

// shopCluster is a cluster with a shop, asked as its developer is: without a way to
// the server's admin socket.
func shopCluster(t *testing.T, policies string) *fakeCluster {
	t.Helper()
	c := newCluster(t)
	c.shop()
	c.policies(policies)
	return c
}

func (c *fakeCluster) canI(args ...string) result {
	c.t.Helper()
	return c.run(append([]string{"authz", "can-i", "--from", "shop/frontend"}, args...)...)
}

func TestCanIOnCluster(t *testing.T) {
	c := shopCluster(t, ordersForGET)
	for _, to := range [][]string{{"orders"}, {"orders", "-n", "shop"}, {"shop/orders"}, {"orders.shop.svc.cluster.local"}, {"orders", "--port", "80"}, {"pod/orders-1"}} {
		c.canI(append([]string{"--to"}, to...)...).want(t, 0, "allowed: shop/frontend -> shop/orders GET /: allowed by rule (ALLOW shop/orders, rule 0)\n", "  at orders-1")
	}
	r := c.canI("--to", "orders").want(t, 0, "  at orders-1, orders-2\n")
	if r.err != "" {
		t.Errorf("%s", r.err)
	}
	c.canI("--to", "orders", "POST", "/").want(t, 2, "denied (403)")
	c.canI("--to", "orders", "--method", "POST", "--path", "/pay").want(t, 2, "POST /pay")
	c.run("authz", "can-i", "--from", "guest/intruder", "--to", "orders").want(t, 2)
	var d decided
	c.canI("--to", "orders", "-o", "json").want(t, 0).decode(t, &d)
	if !d.Allowed || d.Enforced != "unknown" || !slices.Equal(d.Pods, []string{"orders-1", "orders-2"}) || d.Policy != "shop/orders" || len(d.Endpoints) != 0 {
		t.Errorf("%+v", d)
	}
	c.canI("--to", "orders", "--explain").want(t, 0, "mutual TLS on port 8080: ", "whether it is enforced as written could not be asked: ")
	// A pod with two addresses is one endpoint.
	c.dualStack()
	c.canI("--to", "orders").want(t, 0, "  at orders-1, orders-2\n")
	// The service's ports, by what they are declared.
	c.canI("--to", "orders", "--port", "9000").want(t, 2, "tcp port 9000")
	c.canI("--to", "orders", "--port", "9100", "--tcp").want(t, 2, "port 9100 declares no protocol and has rules about HTTP: what is not HTTP is refused there")
	c.canI("--to", "orders", "--port", "9100").want(t, 0, "GET /: allowed by rule")
	c.canI("--to", "orders", "--port", "81").want(t, 0, "declares no port 81")
	// Policies of files in place of the cluster's.
	deny := writeFile(t, "deny.yaml", []byte(policyOf("none", "{}")))
	c.canI("--to", "orders", "-n", "shop", "-f", deny).want(t, 2, "no ALLOW rule matches")

	// Names that say their namespace themselves.
	c.canI("--to", "orders.empty.svc").want(t, 3, `--to "orders.empty.svc" is neither`)
	c.run("authz", "can-i", "--context", "elsewhere", "--from", "shop/frontend", "--to", "orders.shop").want(t, 0)
	c.run("authz", "can-i", "--context", "elsewhere", "--from", "shop/frontend", "--to", "orders").want(t, 3, `in namespace default`)

	c.canI("--to", "nosuch").want(t, 3, `--to "nosuch" is neither a workload nor a service of this mesh`)
	c.canI("--to", "pod/nosuch").want(t, 3, `--to "pod/nosuch"`)
	c.canI("--to", "empty/orders").want(t, 3, `--to "empty/orders" is neither`)
	c.canI("--to", "shop/orders", "-n", "blog").want(t, 3, `--to "shop/orders" is not in namespace "blog"`)
	c.forbid("/api/v1/namespaces/shop/services")
	c.canI("--to", "orders").want(t, 1, "this needs the verb list on pods, services and endpointslices in namespace shop")
	c.forbid("/api/v1/namespaces/castellan-system/configmaps/castellan-server")
	c.canI("--to", "orders").want(t, 1, "mesh settings: ", "this needs the verb get on configmaps in namespace castellan-system", "or give them with --mesh FILE")
}

// Every endpoint is judged, and all must allow.
func TestCanIEndpointsDiffer(t *testing.T) {
	c := shopCluster(t, ordersForGET+policyOf("v2", `{action: DENY, selector: {matchLabels: {version: v2}}, rules: [{}]}`))
	c.pods = append(c.pods, meshed("orders-3", "orders", "10.0.0.9", map[string]string{"app": "orders", "version": "v2"}))
	c.inventory()
	c.canI("--to", "orders").want(t, 2, "denied (403): shop/frontend -> shop/orders GET /: not all endpoints decide the same\n",
		"  allowed: shop/orders GET /: allowed by rule (ALLOW shop/orders, rule 0)\n    at orders-1, orders-2\n",
		"  denied (403): shop/orders GET /: denied by rule (DENY shop/v2, rule 0)\n    at orders-3\n")
	var d decided
	c.canI("--to", "orders", "-o", "json").want(t, 2).decode(t, &d)
	if d.Allowed || len(d.Endpoints) != 2 || d.Policy != "shop/v2" {
		t.Errorf("%+v", d)
	}
	// One that answers for a service that is not its own's to answer for.
	c.policies("")
	c.pods = c.pods[:2]
	c.inventory()
	impostor := meshed("evil-1", "evil", "10.0.0.8", map[string]string{"app": "evil"})
	c.set("/api/v1/namespaces/shop/pods", corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, Items: append(c.pods, impostor)})
	port, name := int32(8080), "http"
	c.mu.Lock()
	slices, _ := c.objects["/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices"].(discoveryv1.EndpointSliceList)
	slices.Items = append(slices.Items, discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: "orders-y", Labels: map[string]string{discoveryv1.LabelServiceName: "orders"}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}}, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.8"}}},
	})
	c.objects["/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices"] = slices
	c.mu.Unlock()
	c.canI("--to", "orders").want(t, 2, "denied (503): shop/evil GET /: the caller's proxy refuses it: shop/evil is none of those who may answer for service shop/orders\n    at evil-1")
}

// Where no proxy stands before the receiver, the caller's decides.
func TestCanIOutsideTheMesh(t *testing.T) {
	c := shopCluster(t, "")
	c.canI("--to", "legacy").want(t, 2, "denied (503): ", "it is outside the mesh: the caller's proxy does not speak in the clear (outboundPolicy REGISTRY_ONLY)")
	c.run("authz", "can-i", "--from", "none", "--to", "legacy").want(t, 0, "nothing is enforced")
	c.settings("ALLOW_ANY")
	c.canI("--to", "legacy").want(t, 0, "allowed: ", "the caller's speaks to it in the clear, and nothing is enforced (outboundPolicy ALLOW_ANY)")
}

// Who may ask the server hears where what is written is not what is enforced.
func TestCanIEnforced(t *testing.T) {
	const broken = `---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: broken, namespace: shop}
spec: {action: PERMIT}
`
	synced := func() *castellanv1.PoliciesResponse {
		return &castellanv1.PoliciesResponse{Workloads: []*castellanv1.WorkloadStatus{following("shop", "orders-1", "v1", "v1"), following("shop", "orders-2", "v1", "v1")}}
	}
	ask := func(t *testing.T, policies string, status *castellanv1.PoliciesResponse) (*fakeCluster, func(int, ...string) decided) {
		c := shopCluster(t, policies)
		if status != nil {
			c.server(status)
		}
		return c, func(code int, texts ...string) (d decided) {
			t.Helper()
			c.canI("--to", "orders").want(t, code, texts...)
			c.canI("--to", "orders", "-o", "json").want(t, code).decode(t, &d)
			return d
		}
	}
	t.Run("as written", func(t *testing.T) {
		_, ask := ask(t, ordersForGET, synced())
		if d := ask(0); d.Enforced != "yes" || len(d.Warnings) != 0 {
			t.Errorf("%+v", d)
		}
	})
	t.Run("not acknowledged", func(t *testing.T) {
		status := synced()
		status.Workloads[1].Version = "v2"
		_, ask := ask(t, ordersForGET, status)
		if d := ask(0, "pod orders-2 does not enforce it as it is now: STALE: offered v2, has v1"); d.Enforced != "no" || len(d.Warnings) != 1 || len(d.Endpoints) != 0 {
			t.Errorf("%+v", d)
		}
	})
	t.Run("refused, the last good one in force", func(t *testing.T) {
		status := synced()
		status.Policies = []*castellanv1.PolicyStatus{{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "broken", LastGoodInForce: true}}
		_, ask := ask(t, ordersForGET+broken, status)
		if d := ask(0, "AuthorizationPolicy shop/broken is refused as it is written; its last good version is in force"); d.Enforced != "no" {
			t.Errorf("%+v", d)
		}
	})
	t.Run("refused, nothing in its place", func(t *testing.T) {
		status := synced()
		status.Policies = []*castellanv1.PolicyStatus{{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "broken"}}
		_, ask := ask(t, ordersForGET+broken, status)
		ask(2, "AuthorizationPolicy shop/broken was refused and has no last good version")
	})
	t.Run("refused, and nobody to ask", func(t *testing.T) {
		_, ask := ask(t, ordersForGET+broken, nil)
		if d := ask(2, "unless an earlier version of it is in force, everything is denied"); d.Enforced != "unknown" {
			t.Errorf("%+v", d)
		}
	})
	t.Run("refused, of others", func(t *testing.T) {
		_, ask := ask(t, ordersForGET+strings.Replace(broken, "spec: {", "spec: {selector: {matchLabels: {app: web}}, ", 1), nil)
		ask(0)
	})
	t.Run("the server denies all", func(t *testing.T) {
		status := synced()
		for _, w := range status.Workloads {
			w.DenyAll, w.DenyReason = true, "somebody's policy was refused"
		}
		_, ask := ask(t, ordersForGET, status)
		ask(2, "somebody's policy was refused")
	})
}

// What is not given and matters is said.
func TestCanIUnsaid(t *testing.T) {
	c := shopCluster(t, policyOf("inside", `{rules: [{from: [{source: {ipBlocks: ["10.0.0.0/8"]}}]}]}`))
	c.canI("--to", "orders").want(t, 2, "AuthorizationPolicy shop/inside is about the caller's address, taken to be 127.0.0.1; give --source-ip")
	if r := c.canI("--to", "orders", "--source-ip", "10.0.0.7").want(t, 0); r.err != "" {
		t.Errorf("%s", r.err)
	}
}
