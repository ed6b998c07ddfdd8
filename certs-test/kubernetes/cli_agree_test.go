package kubernetes_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
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

func askCanI(t *testing.T, args ...string) (a canI) {
	t.Helper()
	r, err := castellan(t.Context(), append([]string{"authz", "can-i", "-o", "json"}, args...)...)
	if uerr := json.Unmarshal([]byte(r.out), &a); uerr != nil {
		t.Fatalf("castellan authz can-i %v: %v\n%s", args, errors.Join(err, uerr), r)
	}
	return a
}

// happens makes a call, and says whether the other application got it.
func happens(t *testing.T, from *app, c control.Call) bool {
	t.Helper()
	c.Fresh = true
	r, err := from.call(c)
	if err != nil {
		t.Fatal(err)
	}
	return r.Error == "" && r.Status < 400 && (c.Kind == "http" || r.Body != "")
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
			call := control.Call{Kind: "http", URL: "http://" + address + c.path, Timeout: 7000}
			if c.tcp {
				args, call = append(args, "--tcp"), control.Call{Kind: "tcp", URL: address, Body: "x\n", Timeout: 7000}
			} else {
				args = append(args, "--path", c.path)
			}
			said := askCanI(t, args...)
			if happened := happens(t, caller, call); happened != said.Allowed {
				t.Errorf("%s: can-i says %v (%s), what happens is %v", name, said.Allowed, said.Reason, happened)
			}
			if said.Enforced != "yes" || len(said.Pods) != 1 {
				t.Errorf("%s: enforced %q at %v: %v", name, said.Enforced, said.Pods, said.Warnings)
			}
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
	eventually(t, "who may read may ask what policy says", func() error {
		_, err := castellan(t.Context(), as("rights-dev", canI...)...)
		return err
	})
	if a := askCanI(t, as("rights-dev", canI[2:]...)...); !a.Allowed || a.Enforced != "unknown" {
		t.Errorf("%+v", a)
	}
	says(t, 0, []string{"PROXY     unknown", "could not be asked"}, as("rights-dev", "authz", "check", "api", "-n", ns)...)
	says(t, failed, []string{"this needs the verb list on pods in namespace castellan-system"}, as("rights-dev", "cert", "inspect", "pod/api", "-n", ns)...)
	// Those who may also run programs in Castellan's pods.
	apply(t, role("castellan-system", "rights-op", "rights-dev", `[{apiGroups: [""], resources: [pods], verbs: [list]}]`))
	eventually(t, "the verb on pods/exec is what is missing", func() error {
		r, err := castellan(t.Context(), as("rights-dev", "proxy", "status")...)
		if err == nil || !strings.Contains(r.err, "this needs the verb create on pods/exec in namespace castellan-system") {
			return fmt.Errorf("%w: %s", err, r)
		}
		return nil
	})
	apply(t, role("castellan-system", "rights-exec", "rights-dev", `[{apiGroups: [""], resources: [pods/exec], verbs: [create]}]`))
	eventually(t, "who may create pods/exec has the tunnel", func() error {
		_, err := castellan(t.Context(), as("rights-dev", "proxy", "status", "api", "-n", ns)...)
		return err
	})
	if a := askCanI(t, as("rights-dev", canI[2:]...)...); !a.Allowed || a.Enforced != "yes" {
		t.Errorf("%+v", a)
	}
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
