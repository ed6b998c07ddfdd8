package kubernetes_test

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const serverUser = "system:serviceaccount:castellan-system:castellan-server"

// Promise: the agents' account may do what any account may and nothing more.
func TestAgentsMayNothing(t *testing.T) {
	t.Parallel()
	needCluster(t)
	const ns = "castellan-system"
	if err := account(ns, "bound-to-nothing"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.remove("/api/v1/namespaces/" + ns + "/serviceaccounts/bound-to-nothing") })
	rules := func(account, namespace string) []string {
		token := podToken(t, ns, account, "", "", "https://kubernetes.default.svc.cluster.local")
		var answer struct {
			Status struct{ ResourceRules, NonResourceRules []json.RawMessage }
		}
		err := api.as(token).post("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", object{
			"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": object{"namespace": namespace}}, &answer)
		if err != nil {
			t.Fatal(err)
		}
		var all []string // the API server gives them in any order
		for _, r := range slices.Concat(answer.Status.ResourceRules, answer.Status.NonResourceRules) {
			all = append(all, string(r))
		}
		slices.Sort(all)
		return all
	}
	for _, namespace := range []string{ns, "default", "kube-system"} {
		if got, want := rules("castellan-agent", namespace), rules("bound-to-nothing", namespace); !slices.Equal(got, want) || len(got) == 0 {
			t.Errorf("in %s the agent may %q\nan unbound account %q", namespace, got, want)
		}
	}
}

// permission is a verb on a resource, or on a URL.
type permission struct{ verb, group, resource, name string }

func (p permission) String() string {
	return strings.TrimSpace(fmt.Sprintf("%s %s.%s %s", p.verb, p.resource, p.group, p.name))
}

// granted are the server's permissions, one by one.
func granted(t *testing.T) []permission {
	t.Helper()
	type role struct {
		Rules []struct {
			APIGroups, Resources, ResourceNames, Verbs, NonResourceURLs []string
		}
	}
	var all []permission
	for _, url := range []string{
		"/apis/rbac.authorization.k8s.io/v1/clusterroles/castellan-server",
		"/apis/rbac.authorization.k8s.io/v1/namespaces/castellan-system/roles/castellan-server",
	} {
		var r role
		if err := api.get(url, &r); err != nil {
			t.Fatal(err)
		}
		for _, rule := range r.Rules {
			names := rule.ResourceNames
			if len(names) == 0 {
				names = []string{""}
			}
			for _, verb := range rule.Verbs {
				for _, u := range rule.NonResourceURLs {
					all = append(all, permission{verb: verb, resource: u})
				}
				for _, g := range rule.APIGroups {
					for _, res := range rule.Resources {
						for _, n := range names {
							all = append(all, permission{verb, g, res, n})
						}
					}
				}
			}
		}
	}
	return all
}

// auditEvent is one request of a pod to the API server.
type auditEvent struct {
	Stage            string
	Verb, RequestURI string
	// RequestReceivedTimestamp is by the clock of this machine.
	RequestReceivedTimestamp time.Time
	User                     struct{ Username string }
	ObjectRef                struct{ APIGroup, Resource, Subresource, Name, Namespace string }
	ResponseStatus           struct {
		Code    int
		Message string
	}
	Annotations map[string]string
}

// forbidden is for want of a permission. The API server answers 403 also where admission
// refuses, as it does whatever is created in a namespace that is being deleted.
func (e *auditEvent) forbidden() bool {
	return e.ResponseStatus.Code == 403 && e.Annotations["authorization.k8s.io/decision"] == "forbid"
}

func (e *auditEvent) permission() permission {
	if e.ObjectRef.Resource == "" {
		return permission{verb: e.Verb, resource: e.RequestURI}
	}
	resource := e.ObjectRef.Resource
	if e.ObjectRef.Subresource != "" {
		resource += "/" + e.ObjectRef.Subresource
	}
	return permission{e.Verb, e.ObjectRef.APIGroup, resource, e.ObjectRef.Name}
}

// audit reads the cluster's audit log, the earlier files of it included.
func audit(t testing.TB, visit func(*auditEvent)) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(shared.Logs(), "audit*.log"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no audit log: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(bytes.NewReader(data))
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var e auditEvent
			if json.Unmarshal(lines.Bytes(), &e) == nil { // the last line may be half written
				visit(&e)
			}
		}
		if err := lines.Err(); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
}

// Promise: what others alter or delete of what the server publishes is put right: the
// roots, and the trust of the API server in the webhooks.
func TestDisruptBundleIsPutRight(t *testing.T) {
	needCluster(t)
	const bundle = "/api/v1/namespaces/castellan-system/configmaps/castellan-bundle"
	const hook = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/castellan-validator"
	want, err := roots()
	if err != nil {
		t.Fatal(err)
	}
	right := func(what string) {
		t.Helper()
		eventually(t, "the roots are put right after they were "+what, func() error {
			now, err := roots()
			if err == nil && !now.Equal(want) {
				err = errors.New("other roots")
			}
			return err
		})
	}
	if err := api.remove(bundle); err != nil {
		t.Fatal(err)
	}
	right("deleted")
	if err := api.merge(bundle, object{"data": object{"bundle.pem": "nonsense"}}); err != nil {
		t.Fatal(err)
	}
	right("altered")
	if err := api.do("PATCH", hook, "application/json-patch+json", []object{{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the webhook is trusted again", func() error {
		var v struct {
			Webhooks []struct {
				FailurePolicy string
				ClientConfig  struct{ CABundle []byte }
			}
		}
		if err := api.get(hook, &v); err != nil {
			return err
		}
		if w := v.Webhooks[0]; len(w.ClientConfig.CABundle) == 0 || w.FailurePolicy != "Fail" {
			return fmt.Errorf("%+v", w)
		}
		return nil
	})
}

// saysTwice makes the server say the same Event of one object again, which counts what
// is there already: that is what it may patch Events for.
func saysTwice(t *testing.T) {
	t.Helper()
	const ns = "says-twice"
	namespace(t, ns)
	for _, path := range []string{"/one", "/two"} {
		apply(t, fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobodys, namespace: %s}
spec: {selector: {matchLabels: {app: nobody}}, rules: [{to: [{operation: {paths: [%q]}}]}]}
`, ns, path))
		programmed(t, ns, "nobodys")
	}
	eventually(t, "an Event is counted again", func() error {
		var list struct{ Items []struct{ Count int } }
		if err := api.get("/api/v1/namespaces/"+ns+"/events", &list); err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.Count > 1 {
				return nil
			}
		}
		return fmt.Errorf("%+v", list.Items)
	})
}

// withoutAccount makes the server ask for an account: one that its watch does not show
// it looks for itself.
func withoutAccount(t *testing.T) {
	t.Helper()
	const ns = "without-account"
	namespace(t, ns)
	a := one(t, ns, pod{Name: "orphan", Node: "node-1"})
	r := request{token: a.token(t), agentToken: agentOf(t, "node-1").token(t)}
	conn := dialServer(t, nil)
	issues(t, conn, r)
	if err := api.remove("/api/v1/namespaces/" + ns + "/serviceaccounts/orphan"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a pod without an account is refused", func() error {
		_, err := issue(t, conn, r)
		switch status.Code(err) {
		case codes.Unauthenticated, codes.PermissionDenied:
			return nil
		}
		return fmt.Errorf("got %w", err)
	})
}

// Promise: the server works with exactly the permissions of the table: nothing that it
// asks is refused, and nothing that it may is never asked. It comes last, when all has
// been done that the server does.
func TestDisruptZPermissions(t *testing.T) {
	needCluster(t)
	saysTwice(t)
	withoutAccount(t)
	used := map[permission]bool{}
	forbidden := map[permission]string{}
	audit(t, func(e *auditEvent) {
		switch e.User.Username {
		case serverUser:
			p := e.permission()
			if e.forbidden() && !slices.ContainsFunc(away, func(a [2]time.Time) bool {
				return e.RequestReceivedTimestamp.After(a[0]) && e.RequestReceivedTimestamp.Before(a[1])
			}) {
				forbidden[p] = e.RequestReceivedTimestamp.String() + ": " + e.ResponseStatus.Message
			}
			used[p] = true
			p.name = ""
			used[p] = true
		case "system:serviceaccount:castellan-system:castellan-agent":
			// TestAgentsMayNothing asks that, with the agents' account.
			if p := e.permission(); p.resource != "selfsubjectrulesreviews" {
				t.Errorf("an agent asked the API server: %s", p)
			}
		}
	})
	for p, why := range forbidden {
		t.Errorf("forbidden: %s: %s", p, why)
	}
	var unused []permission
	for _, p := range granted(t) {
		// Where an API server does not stream lists, to watch is to list first.
		streamed := p
		streamed.verb = "watch"
		if !used[p] && !(p.verb == "list" && used[streamed]) {
			unused = append(unused, p)
		}
	}
	slices.SortFunc(unused, func(a, b permission) int { return cmp.Compare(a.String(), b.String()) })
	for _, p := range unused {
		t.Errorf("granted, and never used: %s", p)
	}
	if t.Failed() {
		t.Logf("used: %v", slices.SortedFunc(maps.Keys(used), func(a, b permission) int { return cmp.Compare(a.String(), b.String()) }))
	}
}
