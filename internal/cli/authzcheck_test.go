package cli_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"

	castellanv1 "castellan.dev/api/castellan/v1"
)

type checked struct {
	Pod, Node, SPIFFEID, Enforced string
	InMesh                        bool
	Ports                         []struct {
		Number         uint16
		Protocol, MTLS string
		HTTPOnly       bool
	}
	Policies []struct{ Kind, Name, Action, Selects, State string }
	Tokens   []struct {
		Issuer, Keys string
		From         []string
	}
	Warnings []string
}

func TestAuthzCheck(t *testing.T) {
	policies := ordersForGET + modeOf("castellan-system", "default", "{mtls: {mode: STRICT}}") +
		modeOf("shop", "orders", "{selector: {matchLabels: {app: orders}}, mtls: {mode: STRICT}, portLevelMtls: {9000: {mode: DISABLE}}}") + `---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: users, namespace: shop}
spec: {jwtRules: [{issuer: "https://users.example", jwksUri: "https://users.example/keys", audiences: [shop]}]}
` + policyOf("others", "{selector: {matchLabels: {app: web}}}")
	synced := &castellanv1.PoliciesResponse{Workloads: []*castellanv1.WorkloadStatus{following("shop", "orders-1", "v1", "v1")}}
	for _, p := range [][2]string{{"AuthorizationPolicy", "shop/orders"}, {"PeerAuthentication", "castellan-system/default"}, {"PeerAuthentication", "shop/orders"}, {"RequestAuthentication", "shop/users"}} {
		ns, name, _ := strings.Cut(p[1], "/")
		synced.Policies = append(synced.Policies, &castellanv1.PolicyStatus{Kind: p[0], Namespace: ns, Name: name, Accepted: true})
	}
	c := shopCluster(t, policies)
	t.Run("to those who may only read policy", func(t *testing.T) {
		c.run("authz", "check", "orders-1").want(t, 0, "PROXY     unknown", "AuthorizationPolicy shop/orders", "valid\n", "whether it is enforced could not be asked")
	})
	server := c.server(synced)
	t.Run("all is well", func(t *testing.T) {
		for _, name := range []string{"orders-1", "pod/orders-1"} {
			c.run("authz", "check", name, "-n", "shop").want(t, 0,
				"WORKLOAD  shop/orders-1", "IDENTITY  "+ordersID, "NODE      node-1", "PROXY     policy version v1 acknowledged",
				"8080    http            STRICT", "9000    tcp             DISABLE", "9100    by first bytes  STRICT      refused, as rules are about HTTP",
				"AuthorizationPolicy shop/orders              ALLOW   workload   1      in force",
				"PeerAuthentication castellan-system/default  STRICT  mesh       0      in force",
				"https://users.example  shop       https://users.example/keys  header authorization Bearer; parameter access_token")
		}
		var got checked
		c.run("authz", "check", "orders-1", "-o", "json").want(t, 0).decode(t, &got)
		if got.Pod != "orders-1" || got.Node != "node-1" || got.SPIFFEID != ordersID || got.Enforced != "yes" || !got.InMesh || len(got.Ports) != 4 || got.Ports[3].Number != 0 || len(got.Policies) != 4 || len(got.Tokens) != 1 {
			t.Errorf("%+v", got)
		}
		if slices.ContainsFunc(got.Policies, func(p struct{ Kind, Name, Action, Selects, State string }) bool { return p.Name == "others" }) {
			t.Errorf("%+v", got.Policies)
		}
	})
	t.Run("not acknowledged", func(t *testing.T) {
		server.set(&castellanv1.PoliciesResponse{Policies: synced.Policies, Workloads: []*castellanv1.WorkloadStatus{following("shop", "orders-1", "v2", "v1")}})
		c.run("authz", "check", "orders-1").want(t, 2, "PROXY     STALE: offered v2, has v1", "not acknowledged", "WARNINGS", "pod orders-1 does not enforce it as it is now")
	})
	t.Run("refused", func(t *testing.T) {
		c := shopCluster(t, `---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: broken, namespace: shop}
spec: {action: PERMIT}
`)
		broken := &castellanv1.PolicyStatus{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "broken"}
		server := c.server(&castellanv1.PoliciesResponse{Policies: []*castellanv1.PolicyStatus{broken}, Workloads: synced.Workloads})
		c.run("authz", "check", "orders-1").want(t, 2, "REFUSED, denies all", `spec.action: "PERMIT"`, "everything is denied: AuthorizationPolicy shop/broken was refused and has no last good version")
		good := &castellanv1.PolicyStatus{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "broken", LastGoodInForce: true}
		server.set(&castellanv1.PoliciesResponse{Policies: []*castellanv1.PolicyStatus{good}, Workloads: synced.Workloads})
		c.run("authz", "check", "orders-1").want(t, 2, "REFUSED, last good in force")
	})
	t.Run("no policy", func(t *testing.T) {
		c := shopCluster(t, "")
		c.server(synced)
		c.run("authz", "check", "orders-1").want(t, 0, "No policy selects it: no ALLOW policy means that everything is allowed.")
	})
	t.Run("outside the mesh", func(t *testing.T) {
		c.set("/api/v1/namespaces/shop/pods/legacy-1", c.pods[2])
		c.run("authz", "check", "legacy-1").want(t, 2, "PROXY     none: outside the mesh", "nothing here is enforced")
	})
	t.Run("warnings", func(t *testing.T) {
		c := shopCluster(t, policyOf("db", `{selector: {matchLabels: {app: orders}}, rules: [{to: [{operation: {ports: ["9000"], methods: [GET]}}]}]}`))
		c.server(synced)
		c.run("authz", "check", "orders-1").want(t, 0, "WARNINGS", "AuthorizationPolicy shop/db: warning: ")
	})
	c.run("authz", "check", "nosuch").want(t, 3, "not found in namespace shop")
	c.run("authz", "check", "a/b/c").want(t, 3, `"a/b/c" names no pod`)
	c.run("authz", "check").want(t, 3, "0 arguments given; give one, a pod")
}

// Off Kubernetes a workload is its account.
func TestAuthzCheckUp(t *testing.T) {
	upFile, file := meshDir(t, ordersForGET)
	file.Server.Admin = filepath.Join(filepath.Dir(upFile), "admin.sock")
	writeUp(t, upFile, file)
	w := following("shop", "", "v1", "v1")
	w.PodUid = "o"
	status := &policyStatus{answer: &castellanv1.PoliciesResponse{
		Policies: []*castellanv1.PolicyStatus{{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "orders", Accepted: true}}, Workloads: []*castellanv1.WorkloadStatus{w},
	}}
	s := grpc.NewServer()
	castellanv1.RegisterDiscoveryAdminServer(s, status)
	(&liveMesh{t: t}).serve(listen(t, "unix", file.Server.Admin), s.Serve, s.Stop)
	castellanRun(t, "authz", "check", "shop/orders", "--up", upFile).want(t, 0, "WORKLOAD  shop/orders", "in force", "policy version v1 acknowledged")
	castellanRun(t, "authz", "check", "orders", "--up", upFile).want(t, 3, "want NAMESPACE/ACCOUNT")
}
