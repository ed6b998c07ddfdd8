package kubernetes_test

import (
	"testing"
)

// Promise: injected pods talk over mutual TLS, on one node and across two.
func TestInjectedPodsTalk(t *testing.T) {
	needCluster(t)
	t.Parallel()
	const ns = "talk"
	namespace(t, ns, injected)
	service(t, ns, "api")
	apps := deploy(t, ns,
		pod{Name: "web", Node: "node-1"},
		pod{Name: "api-1", App: "api", Account: "api", Node: "node-1"},
		pod{Name: "api-2", App: "api", Account: "api", Node: "node-2"},
	)
	for _, to := range []string{"api-1", "api-2"} {
		calledBy(t, apps["web"].reaches(t, apps[to].url(8080, "/")), apps["web"])
	}
	calledBy(t, apps["web"].reaches(t, "http://api/"), apps["web"])
}
