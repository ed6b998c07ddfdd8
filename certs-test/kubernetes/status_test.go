package kubernetes_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// policyStatus is what the server wrote into a policy.
type policyStatus struct {
	Metadata struct {
		Generation int64
		UID        string
	}
	Status struct {
		ObservedGeneration int64
		Conditions         []condition
	}
}

type condition struct {
	Type, Status, Reason, Message string
	ObservedGeneration            int64
	LastTransitionTime            time.Time
}

func (p policyStatus) condition(name string) condition {
	for _, c := range p.Status.Conditions {
		if c.Type == name {
			return c
		}
	}
	return condition{}
}

func policyPath(ns, name string) string {
	return "/apis/security.istio.io/v1/namespaces/" + ns + "/authorizationpolicies/" + name
}

// programmed waits until a policy's present generation is in force at everybody it selects.
func programmed(t testing.TB, ns, name string) (p policyStatus) {
	t.Helper()
	eventually(t, ns+"/"+name+" is programmed", func() error {
		p = policyStatus{}
		if err := api.get(policyPath(ns, name), &p); err != nil {
			return err
		}
		for _, kind := range []string{"Accepted", "Programmed"} {
			if c := p.condition(kind); c.Status != "True" || c.ObservedGeneration != p.Metadata.Generation {
				return fmt.Errorf("generation %d: %+v", p.Metadata.Generation, c)
			}
		}
		return nil
	})
	return p
}

// Promise: every policy says what became of it: accepted, and in force at how many,
// for the generation it was; and Events tell of the transitions.
func TestPoliciesHaveAStatus(t *testing.T) {
	t.Parallel()
	needCluster(t)
	const ns = "status"
	namespace(t, ns, injected)
	const text = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: api, namespace: status}
spec:
  selector: {matchLabels: {app: api}}
  rules: [{from: [{source: {namespaces: [%s]}}]}]
`
	apply(t, fmt.Sprintf(text, "callers"))
	p := programmed(t, ns, "api")
	if c := p.condition("Programmed"); c.Message == "" || c.Reason == "" {
		t.Errorf("nothing to read: %+v", c)
	}
	service(t, ns, "api")
	apps := deploy(t, ns,
		pod{Name: "api-1", App: "api", Account: "api", Node: "node-1"},
		pod{Name: "api-2", App: "api", Account: "api", Node: "node-2"},
	)
	counts := func(what string) {
		t.Helper()
		eventually(t, what, func() error {
			if c := programmed(t, ns, "api").condition("Programmed"); !strings.Contains(c.Message, "2 of 2 ") {
				return fmt.Errorf("%+v", c)
			}
			return nil
		})
	}
	counts("two proxies are counted")
	before := programmed(t, ns, "api").Metadata.Generation
	apply(t, fmt.Sprintf(text, "elsewhere"))
	applied := time.Now()
	eventually(t, "the next generation is in force", func() error {
		if now := programmed(t, ns, "api").Metadata.Generation; now != before+1 {
			return fmt.Errorf("generation %d", now)
		}
		return nil
	})
	counts("two proxies are counted again")
	for _, a := range apps {
		site(t).web.answers(t, 403, a.url(control.HTTP, "/"))
	}
	if took := time.Since(applied); took > 10*time.Second {
		t.Errorf("in force on both nodes and acknowledged only after %s", took)
	}
	r, err := kubectl("", "get", "authorizationpolicies", "-n", ns)
	if err != nil || !strings.Contains(r.out, "api") || !strings.Contains(r.out, "True") {
		t.Errorf("kubectl get: %v %s", err, r)
	}
	eventually(t, "Events", func() error {
		var list struct {
			Items []struct{ Reason, Message string }
		}
		if err := api.get("/api/v1/namespaces/"+ns+"/events?fieldSelector=involvedObject.kind%3DAuthorizationPolicy", &list); err != nil {
			return err
		}
		seen := map[string]bool{}
		for _, e := range list.Items {
			seen[e.Reason] = true
		}
		if !seen["Accepted"] || !seen["Programmed"] {
			return fmt.Errorf("%+v", list.Items)
		}
		return nil
	})
}
