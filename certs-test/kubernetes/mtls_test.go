package kubernetes_test

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// strict is a PeerAuthentication for all of a namespace.
func strict(ns string) string {
	return `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: ` + ns + `}
spec: {mtls: {mode: STRICT}}
`
}

// Promises: injected pods talk over mutual TLS, on one node and across two; native
// gRPC, WebSocket and TCP applications work, the server speaking first among them;
// STRICT refuses a pod outside the mesh; IPv6; a pod calls its own service.
func TestInjectedPodsTalk(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns = "talk"
	namespace(t, ns, injected)
	apply(t, strict(ns))
	service(t, ns, "api")
	apps := deploy(t, ns,
		pod{Name: "api-1", App: "api", Account: "api", Node: "node-1"},
		pod{Name: "api-2", App: "api", Account: "api", Node: "node-2"},
	)
	t.Run("by the pod's address", func(t *testing.T) {
		t.Parallel()
		for _, caller := range []*app{from.web, from.far} {
			for _, callee := range apps {
				calledBy(t, caller.reaches(t, callee.url(control.HTTP, "/")), caller)
				calledBy(t, caller.reaches(t, "http://"+net.JoinHostPort(callee.IP6, "8080")+"/"), caller)
			}
		}
	})
	t.Run("by the service, every protocol", func(t *testing.T) {
		t.Parallel()
		for _, caller := range []*app{from.web, from.far} {
			everyProtocol(t, caller, "api."+ns, "")
			calledBy(t, succeeds(t, caller, control.Call{Kind: "grpc", URL: "api." + ns + ":9090"}), caller)
		}
	})
	t.Run("by the service, both pods answer", func(t *testing.T) {
		t.Parallel()
		seen := map[string]bool{}
		eventually(t, "both answer", func() error {
			seen[from.web.reaches(t, "http://api."+ns+"/").Seen.Pod] = true
			if len(seen) < 2 {
				return fmt.Errorf("so far %v", seen)
			}
			return nil
		})
	})
	t.Run("its own service", func(t *testing.T) {
		t.Parallel()
		for range 6 { // both endpoints, itself among them
			calledBy(t, apps["api-1"].reaches(t, "http://api/"), apps["api-1"])
		}
	})
	t.Run("outside the mesh is refused", func(t *testing.T) {
		t.Parallel()
		for _, callee := range apps {
			for family, host := range map[string]string{"IPv4": callee.IP, "IPv6": "[" + callee.IP6 + "]"} {
				t.Run(callee.Name+" "+family, func(t *testing.T) {
					t.Parallel()
					turnedAway(t, from.plain, host)
				})
			}
		}
		from.plain.fails(t, control.Call{Kind: "http", URL: "http://api." + ns + "/"}, severed...)
	})
}

// turnedAway: whoever is outside the mesh speaks to the pod with this address in vain.
func turnedAway(t *testing.T, outside *app, host string) {
	t.Helper()
	// It is not the way there that is missing.
	outside.reaches(t, fmt.Sprintf("http://%s:%d/alive", host, control.Control))
	for _, c := range []control.Call{
		{Kind: "http", URL: "http://" + host + ":8080/"},
		{Kind: "h2c", URL: "http://" + host + ":9002/"},
		{Kind: "grpc", URL: host + ":9090"},
		{Kind: "tcp", URL: host + ":9000", Body: "x"},
		// Nobody speaks: the proxy waits for a first word, and gives up.
		{Kind: "greeting", URL: host + ":9001", Body: "x", Timeout: 60_000},
	} {
		outside.fails(t, c, severed...)
	}
}

// Promise: without STRICT a pod outside the mesh may call, as nobody: what it says of
// itself is taken away.
func TestPermissiveByDefault(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns = "permissive"
	namespace(t, ns, injected)
	service(t, ns, "api")
	api := one(t, ns, pod{Name: "api", Node: "node-2"})
	everyProtocol(t, from.plain, "api."+ns, "")
	r := from.plain.reaches(t, api.url(control.HTTP, "/"), "x-forwarded-client-cert", "By=x;URI="+from.web.id())
	if got := http.Header(r.Seen.Header).Values("x-forwarded-client-cert"); len(got) > 0 && strings.Contains(got[0], "URI=") {
		t.Errorf("the application was told %q", got)
	}
	calledBy(t, from.web.reaches(t, "http://api."+ns+"/", "x-forwarded-client-cert", "By=x;URI=spiffe://cluster.local/ns/a/sa/b"), from.web)
}

// Promise: proxies speak in the clear to nobody but where the mesh settings allow it;
// here they do not.
func TestNothingLeavesInTheClear(t *testing.T) {
	t.Parallel()
	from := site(t)
	from.web.fails(t, control.Call{Kind: "http", URL: from.plain.url(control.HTTP, "/")})
	from.web.fails(t, control.Call{Kind: "tcp", URL: from.plain.addr(control.TCP), Body: "x"}, severed...)
}
