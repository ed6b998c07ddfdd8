package kubernetes_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"castellan.dev/certs-test/cluster"
)

// disrupted is load on a service while something happens to the installation. Nothing
// of it may fail, and no pod of an application may be restarted.
func disrupted(t *testing.T, happens func(l *loads)) {
	t.Helper()
	from := site(t)
	steady(t)
	same := untouched(t, "callers", "steady")
	l := startLoad(t, steadyHost, from.web, from.far)
	happens(l)
	l.goesOn(20)
	l.stop()
	same()
}

// Promise: an agent that is killed under load comes back: sockets are served again,
// streams reconnect, no pod restarts, no request fails.
func TestDisruptAgentKilled(t *testing.T) {
	needCluster(t)
	disrupted(t, func(l *loads) {
		spiffe := steady(t)["spiffe"]
		before := spiffe.identity(t)
		for _, p := range agents(t) {
			kill(t, p)
		}
		// The agent keeps tokens and no keys: what comes after is a new certificate.
		eventually(t, "the program's stream is back", func() error {
			if now := spiffe.identity(t); now.Serial == before.Serial {
				return fmt.Errorf("still %s", now.Serial)
			}
			return nil
		})
	})
	works(t, "agent-killed")
}

// Promise: a server that is killed under load comes back with the same authority.
func TestDisruptServerKilled(t *testing.T) {
	needCluster(t)
	before, err := roots()
	if err != nil {
		t.Fatal(err)
	}
	disrupted(t, func(l *loads) {
		kill(t, listPods(t, "castellan-system", "app%3Dcastellan-server")[0])
	})
	after, err := roots()
	if err != nil || !before.Equal(after) {
		t.Errorf("the roots are others: %v", err)
	}
	works(t, "server-killed")
}

// Promise: a kubelet that is killed under load comes back, and finds its volumes as
// they were.
func TestDisruptKubeletKilled(t *testing.T) {
	needCluster(t)
	restarted(t, cluster.Kubelet("node-1"), func(*loads) {})
	works(t, "kubelet-killed")
}

// Promise: while the API server is away, pods that are known get certificates, and
// nothing that runs is disturbed.
func TestDisruptAPIServerKilled(t *testing.T) {
	needCluster(t)
	from := site(t)
	conn := dialServer(t, nil)
	r := request{token: from.web.token(t), agentToken: agentOf(t, from.web.Node).token(t)}
	issues(t, conn, r)
	restarted(t, cluster.APIServer, func(l *loads) {
		for range 3 {
			issues(t, conn, r)
			l.goesOn(10)
		}
	})
	works(t, "apiserver-killed")
}

// away are the times in which a program of the cluster was away or starting. An API
// server that starts refuses what it has not read the permission for yet.
var away [][2]time.Time

func restarted(t *testing.T, program string, meanwhile func(*loads)) {
	t.Helper()
	ctx := context.Background()
	began := time.Now()
	defer func() { away = append(away, [2]time.Time{began, time.Now()}) }()
	disrupted(t, func(l *loads) {
		down := true
		if err := shared.KillProcess(ctx, program); err != nil {
			t.Fatal(err)
		}
		start := func() {
			if down {
				down = false
				if err := shared.StartProcess(ctx, program); err != nil {
					t.Error(err)
				}
			}
		}
		defer start() // the tests after this one need it
		l.goesOn(30)
		meanwhile(l)
		start()
		l.goesOn(20)
		eventually(t, "the nodes are ready", func() error {
			var list struct {
				Items []struct {
					Status struct{ Conditions []condition }
				}
			}
			if err := api.get("/api/v1/nodes", &list); err != nil {
				return err
			}
			for _, n := range list.Items {
				for _, c := range n.Status.Conditions {
					if c.Type == "Ready" && c.Status != "True" {
						return fmt.Errorf("%+v", c)
					}
				}
			}
			return nil
		})
	})
}
