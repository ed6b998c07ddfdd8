package kubernetes_test

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// identity is what a go-spiffe program in the pod was given.
func (a *app) identity(t testing.TB) (id control.Identity) {
	t.Helper()
	eventually(t, a.Name+" has an identity", func() error { return a.ask("GET", "/identity", nil, &id) })
	return id
}

// Promise: go-spiffe programs use the CSI socket directly, without a proxy: each has
// its own identity, and peers of another are refused.
func TestGoSPIFFEPrograms(t *testing.T) {
	t.Parallel()
	needCluster(t)
	const ns = "gospiffe"
	namespace(t, ns)
	apps := deploy(t, ns,
		pod{Name: "client", Node: "node-1", Volume: true, Socket: true},
		pod{Name: "server", Node: "node-2", Volume: true, Socket: true},
		pod{Name: "neighbour", Account: "server", Node: "node-1", Volume: true, Socket: true},
	)
	for _, a := range apps {
		if id := a.identity(t); id.ID != a.id() {
			t.Errorf("%s is %s, want %s", a.Name, id.ID, a.id())
		}
	}
	inTime(t, "the first certificate, from the program's start,", 10*300*time.Millisecond, func() time.Duration {
		deletePod(t, ns, "quick")
		return one(t, ns, pod{Name: "quick", Account: "server", Node: "node-1", Volume: true, Socket: true}).identity(t).Served
	})
	for _, name := range []string{"server", "neighbour"} {
		c := control.Call{Kind: "spiffe", URL: "https://" + net.JoinHostPort(apps[name].IP, fmt.Sprint(control.SPIFFE)) + "/", Expect: apps[name].id()}
		r := succeeds(t, apps["client"], c)
		if r.Seen == nil || r.Seen.Peer != apps["client"].id() {
			t.Errorf("%s saw %+v, want %s", name, r.Seen, apps["client"].id())
		}
		c.Expect = apps["client"].id()
		apps["client"].fails(t, c, "unexpected ID")
	}
	if a, b := apps["server"].identity(t), apps["neighbour"].identity(t); a.Serial == b.Serial {
		t.Error("two pods were given one certificate")
	}
	var token string
	eventually(t, "JWT-SVID", func() error { return apps["client"].ask("GET", "/jwt?audience=shop", nil, &token) })
	if strings.Count(token, ".") != 2 {
		t.Errorf("JWT-SVID: %q", token)
	}
}

// Promise: an application gets the socket only if an annotation asks for it; then it
// holds the identity of its proxy's pod.
func TestSocketIsTheProxysAlone(t *testing.T) {
	t.Parallel()
	from := site(t)
	const dir = "/var/run/secrets/workload-spiffe-uds"
	eventually(t, "the application sees no socket", func() error {
		var mode string
		err := from.web.ask("GET", "/stat?path="+dir, nil, &mode)
		if isStatus(err, 404) {
			return nil
		}
		return fmt.Errorf("%q, %w", mode, err)
	})
	const ns = "socketed"
	namespace(t, ns, injected)
	service(t, ns, "asks")
	a := one(t, ns, pod{Name: "asks", Node: "node-1", Socket: true})
	if id := a.identity(t); id.ID != a.id() {
		t.Errorf("%s, want %s", id.ID, a.id())
	}
	calledBy(t, a.reaches(t, "http://asks."+ns+"/"), a)
}
