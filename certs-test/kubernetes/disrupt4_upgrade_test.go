package kubernetes_test

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// changed are the settings after the upgrade: another version, and the other choice
// wherever there is one. Leaves are as short as a test can wait for: with half of it left
// they outlive the server's being replaced, on a slow machine too.
var changed = []string{
	"--timeout", "3m", "--set", "image.pullPolicy=Never", "--set", "image.tag=next",
	"--set", "ca.leafTTL=60s",
	"--set", "attestation.verification=tokenReview",
	"--set", "mesh.outboundPolicy=ALLOW_ANY",
	"--set", "attestation.directCallers={callers/other}",
	"--set", "attestation.trustedNodeAccounts={callers/web}",
}

// install runs castellan install.
func install(t *testing.T, settings []string) {
	t.Helper()
	if _, err := castellan(context.Background(), append([]string{"install"}, settings...)...); err != nil {
		t.Fatal(err)
	}
}

// images are those that Castellan's own pods run.
func images(t *testing.T) (found []string) {
	t.Helper()
	var list struct {
		Items []struct {
			Spec struct{ Containers []struct{ Image string } }
		}
	}
	if err := api.get("/api/v1/namespaces/castellan-system/pods", &list); err != nil {
		t.Fatal(err)
	}
	for _, p := range list.Items {
		for _, c := range p.Spec.Containers {
			found = append(found, c.Image)
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// runs waits until Castellan's own pods run these images and no others: what ends may be
// there for a moment more.
func runs(t *testing.T, want ...string) {
	t.Helper()
	eventually(t, "Castellan's images", func() error {
		if got := images(t); !slices.Equal(got, want) {
			return fmt.Errorf("they are %q, want %q", got, want)
		}
		return nil
	})
}

// Promises: the chart is upgraded in place under load, the agents one after the other:
// no pod restarts, no request fails. After it, with short leaves, certificates rotate
// under load with no failed request; tokens that are reviewed by the API server get
// the same verdicts; with ALLOW_ANY proxies pass through what is not in the mesh.
func TestDisruptUpgrade(t *testing.T) {
	needCluster(t)
	from := site(t)
	ctx := context.Background()
	if err := loadImages(ctx, "next"); err != nil {
		t.Fatal(err)
	}
	outside := control.Call{Kind: "http", URL: from.plain.url(control.HTTP, "/"), Timeout: 3000}
	from.web.fails(t, outside)
	before := images(t)
	same := untouched(t, "callers", "outside")
	disrupted(t, func(l *loads) {
		install(t, changed)
		runs(t, "docker.io/castellan/castellan-agent:next", "docker.io/castellan/castellan-server:next")
		t.Run("rotation of short leaves", func(t *testing.T) { rotates(t, from) })
		t.Run("tokens are reviewed", func(t *testing.T) {
			verdicts(t)
			deletedPod(t, "deleted-reviewed")
		})
		t.Run("callers without an agent, and for others", func(t *testing.T) { otherCallers(t, from) })
		t.Run("what is outside the mesh is passed through", func(t *testing.T) {
			if r := succeeds(t, from.web, outside); len(r.Seen.Header["X-Forwarded-Client-Cert"]) > 0 {
				t.Errorf("%+v", r.Seen)
			}
			succeeds(t, from.web, control.Call{Kind: "tcp", URL: from.plain.addr(control.TCP), Body: "x"})
		})
		install(t, settings())
	})
	same()
	runs(t, before...)
	from.web.fails(t, outside)
	works(t, "upgraded")
}

// otherCallers: accounts that are listed may ask without an agent, as istio-agent does,
// or for other pods of their node, as ztunnel does; nobody else may.
func otherCallers(t *testing.T, from *callers) {
	t.Helper()
	conn := dialServer(t, nil)
	alone := request{token: from.other.token(t)}
	if got := issues(t, conn, alone).Leaf.URIs[0].String(); got != from.other.id() {
		t.Errorf("alone: %s", got)
	}
	_, err := issue(t, conn, request{token: from.far.token(t)})
	refuses(t, "alone, and not listed", err)

	node := request{token: from.web.token(t), agentToken: agentOf(t, from.web.Node).token(t), impersonates: from.other.id()}
	if got := issues(t, conn, node).Leaf.URIs[0].String(); got != from.other.id() {
		t.Errorf("for another pod of the node: %s", got)
	}
	node.impersonates = steady(t)["api-2"].id() // an account with a pod on either node
	issues(t, conn, node)
	node.impersonates = "spiffe://cluster.local/ns/callers/sa/nobody"
	_, err = issue(t, conn, node)
	refuses(t, "for nobody of the node", err)
	node = request{token: from.other.token(t), agentToken: agentOf(t, from.other.Node).token(t), impersonates: from.web.id()}
	_, err = issue(t, conn, node)
	refuses(t, "for another, and not listed", err)
}

// rotates waits until a go-spiffe program and the proxies have been given certificate
// after certificate.
func rotates(t *testing.T, from *callers) {
	t.Helper()
	spiffe := steady(t)["spiffe"]
	start := spiffe.identity(t)
	seen := map[string]map[string]bool{from.web.Name: {}, from.far.Name: {}}
	within(t, 3*patience, "certificates rotate", func() error {
		for name, serials := range seen {
			r, err := castellan(context.Background(), "cert", "fetch", "pod/"+name, "-n", "callers")
			if err != nil {
				return err
			}
			serials[r.out] = true
			if len(serials) < 2 {
				return fmt.Errorf("%s has had one certificate", name)
			}
		}
		if now := spiffe.identity(t); now.Updates < start.Updates+2 {
			return fmt.Errorf("%d renewals, until %s", now.Updates-start.Updates, now.NotAfter)
		}
		return nil
	})
}
