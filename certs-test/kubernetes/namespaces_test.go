package kubernetes_test

import (
	"testing"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// everyProtocol makes one call of each kind to the host and wants an answer.
func everyProtocol(t *testing.T, from *app, host string, httpPort string) {
	t.Helper()
	for _, c := range []control.Call{
		{Kind: "http", URL: "http://" + host + httpPort + "/"},
		{Kind: "h2c", URL: "http://" + host + ":9002/"},
		{Kind: "http", URL: "http://" + host + ":9002/"},
		{Kind: "grpc", URL: host + ":9090", Body: "hello"},
		{Kind: "grpc", URL: host + ":9002", Body: "hello"},
		{Kind: "websocket", URL: "ws://" + host + httpPort + "/ws", Body: "hello"},
		{Kind: "tcp", URL: host + ":9000", Body: "hello"},
		{Kind: "greeting", URL: host + ":9001", Body: "hello"},
	} {
		succeeds(t, from, c)
	}
}

// succeeds makes the call until it is answered.
func succeeds(t *testing.T, from *app, c control.Call) (r control.Result) {
	t.Helper()
	c.Fresh = true
	eventually(t, from.Name+" calls "+c.Kind+" "+c.URL, func() (err error) {
		if r, err = from.call(c); err != nil {
			return err
		}
		return outcome(r)
	})
	return r
}

// Promise: pods of namespaces that are not labelled are left alone.
func TestUnlabelledNamespaceIsLeftAlone(t *testing.T) {
	needCluster(t)
	t.Parallel()
	const ns = "unlabelled"
	namespace(t, ns)
	service(t, ns, "api")
	apps := deploy(t, ns, pod{Name: "web", Node: "node-1"}, pod{Name: "api", Node: "node-2"})
	for name := range apps {
		if got := containers(t, ns, name); len(got) != 1 {
			t.Errorf("%s has containers %q", name, got)
		}
	}
	everyProtocol(t, apps["web"], "api", "")
}
