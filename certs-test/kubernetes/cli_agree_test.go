package kubernetes_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"testing"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// canI is what castellan authz can-i answers in JSON.
type canI struct {
	Allowed  bool
	Reason   string
	Enforced string
	Warnings []string
	Pods     []string
}

func askCanI(ctx context.Context, args ...string) (a canI, err error) {
	r, err := castellan(ctx, append([]string{"authz", "can-i", "-o", "json"}, args...)...)
	if uerr := json.Unmarshal([]byte(r.out), &a); uerr != nil {
		return a, fmt.Errorf("%w: %w\n%s", err, uerr, r)
	}
	return a, nil // that it says no is no failure
}

// happens makes a call, and says whether the other application got it; an error is
// neither that nor a refusal.
func happens(from *app, c control.Call) (bool, error) {
	c.Fresh = true
	r, err := from.call(c)
	switch {
	case err != nil:
		return false, err
	case r.Error == "" && r.Status < 400 && (c.Kind == "http" || r.Body != ""):
		return true, nil
	case r.Status == 403 || r.Status == 0 && !timedOut(r) && saysAny(r.Error, severed...):
		return false, nil
	}
	return false, fmt.Errorf("neither an answer nor a refusal: %+v", r)
}

// Promise: what can-i says is what the proxies do, at declared and undeclared ports,
// for HTTP and for bytes.
func TestCanIAgrees(t *testing.T) {
	t.Parallel()
	from := site(t)
	const ns = "agree"
	namespace(t, ns, injected)
	service(t, ns, "api")
	service(t, ns, "bytes")
	deploy(t, ns, pod{Name: "api", Node: "node-2"}, pod{Name: "bytes", Node: "node-1"})
	apply(t, `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: api, namespace: agree}
spec:
  selector: {matchLabels: {app: api}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/callers/sa/web"]}}]
    to: [{operation: {methods: [GET], paths: ["/open*"]}}]
  - to: [{operation: {ports: ["9000"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bytes, namespace: agree}
spec:
  selector: {matchLabels: {app: bytes}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/callers/sa/web"]}}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: agree}
spec: {mtls: {mode: STRICT}}
`)
	programmed(t, ns, "api")
	programmed(t, ns, "bytes")
	enforced(t, "peerauthentications", ns, "default")
	for _, caller := range []*app{from.web, from.other, from.plain} {
		who := "callers/" + caller.Account
		if caller == from.plain {
			who = "none"
		}
		for _, c := range []struct {
			to   string
			port int
			tcp  bool
			path string
		}{
			{"api", 80, false, "/open"}, {"api", 80, false, "/closed"}, {"api", 80, false, "/closed/..//open"},
			{"api", control.TCP, true, ""}, {"api", control.Any, false, "/open"}, {"api", control.Any, false, "/closed"},
			// Bytes where rules are about HTTP and the port says nothing.
			{"api", control.Any, true, ""},
			{"bytes", 80, false, "/"}, {"bytes", control.TCP, true, ""}, {"bytes", control.Any, false, "/"},
		} {
			name := fmt.Sprintf("%s to %s:%d tcp=%v %s", who, c.to, c.port, c.tcp, c.path)
			args := []string{"--from", who, "--to", c.to, "-n", ns, "--port", strconv.Itoa(c.port)}
			address := c.to + "." + ns + ":" + strconv.Itoa(c.port)
			call := control.Call{Kind: "http", URL: "http://" + address + c.path, Timeout: 20_000}
			if c.tcp {
				args, call = append(args, "--tcp"), control.Call{Kind: "tcp", URL: address, Body: "x\n", Timeout: 20_000}
			} else {
				args = append(args, "--path", c.path)
			}
			eventually(t, name, func() error {
				said, err := askCanI(t.Context(), args...)
				if err != nil {
					return err
				}
				if said.Enforced != "yes" || len(said.Pods) != 1 {
					return fmt.Errorf("enforced %q at %v: %v", said.Enforced, said.Pods, said.Warnings)
				}
				// The caller's proxy may not know the service yet.
				happened, err := happens(caller, call)
				if err == nil && happened != said.Allowed {
					err = fmt.Errorf("can-i says %v (%s), what happens is %v", said.Allowed, said.Reason, happened)
				}
				return err
			})
		}
	}
}

// Promise: the commands need the permissions that docs/commands.md says, and no more;
// what is missing is named.
func TestCommandsWithFewRights(t *testing.T) {
	t.Parallel()
	site(t)
	const ns = "rights"
	namespace(t, ns, injected)
	service(t, ns, "api")
	one(t, ns, pod{Name: "api", Node: "node-1"})
	as := func(user string, args ...string) []string { return append(args, "--as", user) }
	canI := []string{"authz", "can-i", "--from", "callers/web", "--to", "api", "-n", ns}
	says(t, failed, []string{"this needs the verb get on configmaps in namespace castellan-system"}, as("rights-dev", canI...)...)
	says(t, failed, []string{"this needs the verb list on pods in namespace castellan-system"}, as("rights-dev", "proxy", "status")...)
	says(t, failed, []string{"this needs the verb get on pods in namespace rights"}, as("rights-dev", "cert", "inspect", "pod/api", "-n", ns)...)
	apply(t, role("rights", "dev", "rights-dev", `[
  {apiGroups: [""], resources: [pods, services], verbs: [get, list]},
  {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list]},
  {apiGroups: [security.istio.io], resources: [authorizationpolicies, peerauthentications, requestauthentications], verbs: [list]}]`)+
		role("castellan-system", "rights-dev", "rights-dev", `[
  {apiGroups: [""], resources: [configmaps], resourceNames: [castellan-server, castellan-bundle], verbs: [get]},
  {apiGroups: [security.istio.io], resources: [authorizationpolicies, peerauthentications, requestauthentications], verbs: [list]}]`))
	allowed := func(enforced string) {
		t.Helper()
		eventually(t, "can-i, with what is enforced: "+enforced, func() error {
			a, err := askCanI(t.Context(), as("rights-dev", canI[2:]...)...)
			if err == nil && (!a.Allowed || a.Enforced != enforced) {
				err = fmt.Errorf("%+v", a)
			}
			return err
		})
	}
	allowed("unknown")
	says(t, 0, []string{"PROXY     unknown", "could not be asked"}, as("rights-dev", "authz", "check", "api", "-n", ns)...)
	says(t, failed, []string{"this needs the verb list on pods in namespace castellan-system"}, as("rights-dev", "cert", "inspect", "pod/api", "-n", ns)...)
	// Those who may also run programs in Castellan's pods.
	apply(t, role("castellan-system", "rights-op", "rights-dev", `[{apiGroups: [""], resources: [pods], verbs: [list]}]`))
	says(t, failed, []string{"this needs the verb create on pods/exec in namespace castellan-system"}, as("rights-dev", "proxy", "status")...)
	apply(t, role("castellan-system", "rights-exec", "rights-dev", `[{apiGroups: [""], resources: [pods/exec], verbs: [create]}]`))
	says(t, 0, nil, as("rights-dev", "proxy", "status", "api", "-n", ns)...)
	allowed("yes")
	says(t, 0, []string{"verified    with the roots of ConfigMap castellan-system/castellan-bundle"}, as("rights-dev", "cert", "inspect", "pod/api", "-n", ns)...)
	says(t, 0, []string{"ROLE", "svid-issuer"}, as("rights-dev", "ca", "status")...)
	says(t, 0, []string{"/ns/rights/sa/api"}, as("rights-dev", "ca", "issued", "--id", "spiffe://cluster.local/ns/rights/sa/api")...)
}

// role lets a user do what rules say in a namespace.
func role(ns, name, user, rules string) string {
	return fmt.Sprintf(`---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: %[2]s, namespace: %[1]s}
rules: %[4]s
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: %[2]s, namespace: %[1]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: %[2]s}
subjects: [{kind: User, name: %[3]s, apiGroup: rbac.authorization.k8s.io}]
`, ns, name, user, rules)
}
