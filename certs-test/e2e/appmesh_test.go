package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// Ports of the workload shop/orders beside the sample's own, by what is declared
// for them and what stands there.
const (
	onGRPC         = 9001 // declared grpc
	onHTTP         = 9002 // declared http
	onTCP          = 9003 // declared tcp
	onGreeting     = 9004 // declared tcp, the server speaks first
	onTCPAllowHTTP = 9005 // declared tcp, an ALLOW rule with HTTP fields
	onTCPDenyHTTP  = 9006 // declared tcp, a DENY rule with HTTP fields
	onAnyHTTP      = 9007 // undeclared, an ALLOW rule with HTTP fields
	onAnyTCP       = 9008 // undeclared
	onAnyGreeting  = 9009 // undeclared, the server speaks first
	onAnyGRPC      = 9010 // undeclared
	onClosedTCP    = 9011 // declared tcp, closed later by a policy
	onClosedHTTP   = 9012 // declared http, closed later by a policy
)

func protocolsByPort() map[int]string {
	return map[int]string{
		onGRPC: "grpc", onHTTP: "http", onTCP: "tcp", onGreeting: "tcp", onTCPAllowHTTP: "tcp", onTCPDenyHTTP: "tcp",
		onAnyHTTP: "", onAnyTCP: "", onAnyGreeting: "", onAnyGRPC: "", onClosedTCP: "tcp", onClosedHTTP: "http",
	}
}

const appsPolicy = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: apps, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/frontend"]}}]
    to: [{operation: {ports: ["9001", "9002", "9003", "9004", "9006", "9008", "9009", "9010", "9011", "9012"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: apps-http-fields, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/frontend"]}}]
    to: [{operation: {methods: ["GET"], ports: ["9005", "9007"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: apps-deny-path, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules:
  - to: [{operation: {paths: ["/forbidden"], ports: ["9006"]}}]
`

// appMesh is a mesh with further real proxies: one in front of real applications
// as shop/orders, and one each for two callers.
type appMesh struct {
	*mesh
	t         *testing.T
	grpc      *grpcApp
	http      *httpApp
	greeting  string
	apps      map[int]string // the application's address by workload port
	inbound   map[int]string
	receiver  *process
	admin     string                    // of the receiver
	callers   map[string]*process       // by workload
	outbounds map[string]map[int]string // address by workload and port
}

func startAppMesh(t *testing.T, flags ...string) *appMesh {
	t.Helper()
	a := &appMesh{
		mesh: start(t, shortDir(t), flags...), t: t, greeting: "220 ready\r\n",
		apps: map[int]string{}, inbound: map[int]string{}, callers: map[string]*process{}, outbounds: map[string]map[int]string{},
	}
	a.http = newHTTPApp(t)
	var grpcAddr string
	a.grpc, grpcAddr = newGRPCApp(t)
	echo, greeter := newTCPApp(t, ""), newTCPApp(t, a.greeting)
	for port := range protocolsByPort() {
		a.inbound[port] = ownPort(t)
		switch port {
		case onGRPC, onAnyGRPC:
			a.apps[port] = grpcAddr
		case onHTTP, onAnyHTTP, onClosedHTTP:
			a.apps[port] = a.http.addr
		case onGreeting, onAnyGreeting:
			a.apps[port] = greeter
		default:
			a.apps[port] = echo
		}
	}
	a.declare()
	a.write("50-apps.yaml", appsPolicy)
	a.receiver = a.receive("receiver", a.inbound)
	for _, caller := range []string{"shop/frontend", "guest/intruder"} {
		a.call(caller)
	}
	a.settle()
	return a
}

// declare adds the ports to orders and the service shop/apps to the workloads file.
func (a *appMesh) declare() {
	data, err := os.ReadFile(a.path("workloads.yaml"))
	if err != nil {
		a.t.Fatal(err)
	}
	var file map[string]any
	if err := yaml.Unmarshal(data, &file); err != nil {
		a.t.Fatal(err)
	}
	var ports, servicePorts []any
	endpoint := map[string]any{}
	for number, protocol := range protocolsByPort() {
		ports = append(ports, map[string]any{"number": number, "protocol": protocol})
		servicePorts = append(servicePorts, map[string]any{"number": number, "protocol": protocol, "name": fmt.Sprintf("p%d", number)})
		endpoint[fmt.Sprint(number)] = json.Number(portOf(a.inbound[number]))
	}
	var uid any
	for _, w := range file["workloads"].([]any) {
		w := w.(map[string]any)
		if w["serviceAccount"] == "orders" {
			uid = w["podUID"]
			w["ports"] = append(w["ports"].([]any), ports...)
		}
	}
	file["services"] = append(file["services"].([]any), map[string]any{
		"namespace": "shop", "name": "apps", "hosts": []any{"apps", "apps.shop.svc.cluster.local"},
		"ports": servicePorts, "endpoints": []any{map[string]any{"workload": uid, "ports": endpoint}},
	})
	out, err := yaml.Marshal(file)
	if err != nil {
		a.t.Fatal(err)
	}
	writeTo(a.t, a.path("workloads.yaml"), string(out))
}

// receive starts a proxy of shop/orders in front of the applications.
func (a *appMesh) receive(name string, inbound map[int]string) *process {
	a.admin = ownPort(a.t)
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: castellan.dev/v1alpha1\nkind: ProxyConfig\nagentSocket: %s\nadmin: %s\ndrainTimeout: 30s\ninbound:\n",
		a.file().Workloads["shop/orders"].Socket, a.admin)
	for port, addr := range inbound {
		fmt.Fprintf(&b, "- {listen: %q, port: %d, app: %q}\n", addr, port, a.apps[port])
	}
	p := launch(a.t, "castellan-proxy", writeTo(a.t, a.path(name+".yaml"), b.String()))
	eventually(a.t, name+" is ready", func() error { return ready(a.admin) })
	return p
}

// call starts a proxy with an outbound listener for every port.
func (a *appMesh) call(caller string) {
	admin := ownPort(a.t)
	a.outbounds[caller] = map[int]string{}
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: castellan.dev/v1alpha1\nkind: ProxyConfig\nagentSocket: %s\nadmin: %s\noutbound:\n", a.file().Workloads[caller].Socket, admin)
	for port := range protocolsByPort() {
		a.outbounds[caller][port] = ownPort(a.t)
		fmt.Fprintf(&b, "- {listen: %q, service: shop/apps, port: %d}\n", a.outbounds[caller][port], port)
	}
	a.callers[caller] = launch(a.t, "castellan-proxy", writeTo(a.t, a.path(strings.ReplaceAll(caller, "/", ".")+".yaml"), b.String()))
	eventually(a.t, caller+" is ready", func() error { return ready(admin) })
}

// settle waits until the ports, the service and the policies have arrived everywhere.
func (a *appMesh) settle() {
	for caller, want := range map[string]int{"shop/frontend": 200, "guest/intruder": 403} {
		for _, port := range []int{onHTTP, onAnyHTTP, onClosedHTTP} {
			eventually(a.t, fmt.Sprintf("%s reaches %d", caller, port), func() error {
				got, body, err := a.get(caller, port, "/headers")
				if err == nil && got != want {
					err = fmt.Errorf("%d %q", got, body)
				}
				return err
			})
		}
	}
}

// url of a port by way of a caller's own proxy.
func (a *appMesh) url(caller string, port int, path string) string {
	return "http://" + a.outbounds[caller][port] + path
}

func (a *appMesh) get(caller string, port int, path string, header ...string) (int, string, error) {
	return get(a.url(caller, port, path), header...)
}
