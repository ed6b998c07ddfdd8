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

// programmed waits until an AuthorizationPolicy's present generation is in force at
// everybody it selects.
func programmed(t testing.TB, ns, name string) policyStatus {
	t.Helper()
	return enforced(t, "authorizationpolicies", ns, name)
}

// enforced is programmed for all kinds of policy, by their resources. The message must
// say the words, if there are any.
func enforced(t testing.TB, resource, ns, name string, words ...string) (p policyStatus) {
	t.Helper()
	eventually(t, resource+" "+ns+"/"+name+" is programmed", func() (err error) {
		if p, err = readPolicy(resource, ns, name); err != nil {
			return err
		}
		if p.Status.ObservedGeneration != p.Metadata.Generation {
			return fmt.Errorf("generation %d is observed, not %d", p.Status.ObservedGeneration, p.Metadata.Generation)
		}
		for _, kind := range []string{"Accepted", "Programmed"} {
			if c := p.condition(kind); c.Status != "True" || c.ObservedGeneration != p.Metadata.Generation {
				return fmt.Errorf("generation %d: %+v", p.Metadata.Generation, c)
			}
		}
		if c := p.condition("Programmed"); len(words) > 0 && !saysAny(c.Message, words...) {
			return fmt.Errorf("%+v", c)
		}
		return nil
	})
	return p
}

func readPolicy(resource, ns, name string) (policyStatus, error) {
	var p policyStatus
	err := api.get("/apis/security.istio.io/v1/namespaces/"+ns+"/"+resource+"/"+name, &p)
	return p, err
}

// inTime wants one of a few tries within the limit, which is ten times what is promised:
// a machine that is slow for a moment breaks no promise, a program that is slow breaks it
// each time.
func inTime(t *testing.T, what string, limit time.Duration, try func() time.Duration) {
	t.Helper()
	var took []time.Duration
	for range 5 {
		took = append(took, try())
		if took[len(took)-1] <= limit {
			return
		}
	}
	t.Errorf("%s took %s, never less than %s", what, took, limit)
}

// told waits for Events about an object, by their reasons, and returns their messages.
func told(t *testing.T, ns, kind, name string, reasons ...string) map[string]string {
	t.Helper()
	said := map[string]string{}
	eventually(t, fmt.Sprintf("Events %q about %s %s/%s", reasons, kind, ns, name), func() error {
		var list struct {
			Items []struct{ Reason, Message string }
		}
		if err := api.get("/api/v1/namespaces/"+ns+"/events?fieldSelector=involvedObject.kind%3D"+kind+",involvedObject.name%3D"+name, &list); err != nil {
			return err
		}
		clear(said)
		for _, e := range list.Items {
			said[e.Reason] = e.Message
		}
		for _, r := range reasons {
			if said[r] == "" {
				return fmt.Errorf("%+v", list.Items)
			}
		}
		return nil
	})
	return said
}

// Promise: every policy says what became of it: accepted, and in force at how many,
// for the generation it was; and Events tell of the transitions.
func TestPoliciesHaveAStatus(t *testing.T) {
	t.Parallel()
	from := site(t)
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
	if c := enforced(t, "authorizationpolicies", ns, "api", "it selects no workload of the mesh").condition("Programmed"); c.Reason != "NoWorkloads" {
		t.Errorf("%+v", c)
	}
	service(t, ns, "api")
	apps := deploy(t, ns,
		pod{Name: "api-1", App: "api", Account: "api", Node: "node-1", Labels: map[string]string{"users": "yes"}},
		pod{Name: "api-2", App: "api", Account: "api", Node: "node-2"},
	)
	const both, first = "2 of 2 proxies have acknowledged", "1 of 1 proxies have acknowledged"
	before := enforced(t, "authorizationpolicies", ns, "api", both).Metadata.Generation
	inTime(t, "a policy, from being written to being acknowledged on both nodes,", 10*time.Second, func() time.Duration {
		before++
		apply(t, fmt.Sprintf(text, fmt.Sprintf("elsewhere-%d", before)))
		written := time.Now()
		if now := enforced(t, "authorizationpolicies", ns, "api", both).Metadata.Generation; now != before {
			t.Fatalf("generation %d, want %d", now, before)
		}
		return time.Since(written)
	})
	for _, a := range apps {
		from.web.answers(t, 403, a.url(control.HTTP, "/"))
	}
	r, err := kubectl("", "get", "authorizationpolicies", "-n", ns)
	if err != nil || !strings.Contains(r.out, "api") || !strings.Contains(r.out, "True") {
		t.Errorf("kubectl get: %v %s", err, r)
	}
	apply(t, strict(ns))
	apply(t, fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: users, namespace: status}
spec:
  selector: {matchLabels: {users: "yes"}}
  jwtRules: [{issuer: "https://issuer.example.org", audiences: [shop], jwks: '%s'}]
`, newTokens(t).JWKS))
	enforced(t, "peerauthentications", ns, "strict", both)
	enforced(t, "requestauthentications", ns, "users", first)
	for kind, name := range map[string]string{"AuthorizationPolicy": "api", "PeerAuthentication": "strict", "RequestAuthentication": "users"} {
		told(t, ns, kind, name, "Accepted", "Programmed")
	}
}

// Promise: a policy that was stored while nobody validated it, and that nobody can
// represent, says so; its last good version stays in force, and without one whoever it
// could select denies everything.
func TestRefusedPoliciesSaySo(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns = "unjudged"
	namespace(t, ns, injected)
	service(t, ns, "kept")
	service(t, ns, "never")
	apps := deploy(t, ns, pod{Name: "kept", Node: "node-1"}, pod{Name: "never", Node: "node-2"})
	kept, never := apps["kept"], apps["never"]
	text := func(name, rules string) string {
		return fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: %[1]s, namespace: unjudged}
spec: {selector: {matchLabels: {app: %[1]s}}, rules: %[2]s}
`, name, rules)
	}
	const good, bad = `[{from: [{source: {principals: ["cluster.local/ns/callers/sa/web"]}}]}]`, `[{when: [{key: "request.body", values: [x]}]}]`
	apply(t, text("kept", good))
	programmed(t, ns, "kept")
	from.other.answers(t, 403, kept.url(control.HTTP, "/"))
	from.other.reaches(t, never.url(control.HTTP, "/"))
	notValidated(t, ns)
	for name, outcome := range map[string]string{
		"kept":  "its last good version stays in force",
		"never": "every workload it could select denies everything",
	} {
		eventually(t, "nobody validates "+name, func() error {
			_, err := kubectl(text(name, bad), "apply", "-f", "-")
			return err
		})
		eventually(t, name+" is refused", func() error {
			p, err := readPolicy("authorizationpolicies", ns, name)
			if err != nil {
				return err
			}
			accepted, programmed := p.condition("Accepted"), p.condition("Programmed")
			if accepted.Status != "False" || accepted.Reason != "Invalid" || programmed.Status != "False" || programmed.Reason != "NotAccepted" ||
				!strings.Contains(accepted.Message, "request.body") || !strings.Contains(accepted.Message, outcome) {
				return fmt.Errorf("%+v", p.Status)
			}
			for _, g := range []int64{p.Status.ObservedGeneration, accepted.ObservedGeneration, programmed.ObservedGeneration} {
				if g != p.Metadata.Generation {
					return fmt.Errorf("generation %d: %+v", p.Metadata.Generation, p.Status)
				}
			}
			return nil
		})
		if said := told(t, ns, "AuthorizationPolicy", name, "Refused"); !strings.Contains(said["Refused"], "request.body") {
			t.Errorf("Events about %s: %q", name, said)
		}
	}
	from.web.answers(t, 403, never.url(control.HTTP, "/"))
	from.web.reaches(t, kept.url(control.HTTP, "/"))
	from.other.answers(t, 403, kept.url(control.HTTP, "/"))
	// Mended, it is a policy as any other.
	apply(t, text("never", good))
	programmed(t, ns, "never")
	from.web.reaches(t, never.url(control.HTTP, "/"))
	from.other.answers(t, 403, never.url(control.HTTP, "/"))
}

// notValidated takes a namespace out of what is validated, until the test ends: policies
// are written there as on a cluster that had them before it had Castellan.
func notValidated(t *testing.T, ns string) {
	t.Helper()
	set := func(selector object) error {
		return api.do("PATCH", "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/castellan-validator", "application/strategic-merge-patch+json",
			object{"webhooks": []object{{"name": "validation.castellan.dev", "namespaceSelector": selector}}}, nil)
	}
	if err := set(object{"matchExpressions": []object{{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": []string{ns}}}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := set(object{"$patch": "replace"}); err != nil {
			t.Error(err)
		}
	})
}
