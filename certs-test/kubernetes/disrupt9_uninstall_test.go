package kubernetes_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// ours lists what is Castellan's in the cluster, by kind and name.
func ours(t *testing.T) (found []string) {
	t.Helper()
	for _, kind := range []string{
		"api/v1/namespaces/castellan-system/configmaps", "api/v1/namespaces/castellan-system/secrets",
		"api/v1/namespaces/castellan-system/services", "api/v1/namespaces/castellan-system/pods",
		"api/v1/namespaces/castellan-system/persistentvolumeclaims",
		"apis/apps/v1/deployments", "apis/apps/v1/daemonsets", "apis/policy/v1/poddisruptionbudgets",
		"apis/coordination.k8s.io/v1/namespaces/castellan-system/leases", "apis/networking.k8s.io/v1/networkpolicies",
		"apis/rbac.authorization.k8s.io/v1/clusterroles", "apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
		"apis/rbac.authorization.k8s.io/v1/roles", "apis/rbac.authorization.k8s.io/v1/rolebindings",
		"apis/storage.k8s.io/v1/csidrivers", "apis/scheduling.k8s.io/v1/priorityclasses",
		"apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
		"apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
		"apis/apiextensions.k8s.io/v1/customresourcedefinitions",
		"api/v1/namespaces",
	} {
		var list struct {
			Items []struct{ Metadata struct{ Name string } }
		}
		if err := api.get("/"+kind, &list); err != nil {
			t.Fatal(err)
		}
		for _, o := range list.Items {
			name := o.Metadata.Name
			if strings.Contains(name, "castellan") || strings.Contains(name, "security.istio.io") {
				found = append(found, kind[strings.LastIndex(kind, "/")+1:]+"/"+name)
			}
		}
	}
	slices.Sort(found)
	return found
}

// left waits until that is all there is of Castellan: what is deleted may take a moment.
func left(t *testing.T, want []string) {
	t.Helper()
	within(t, 2*patience, "what is left", func() error {
		if got := ours(t); !slices.Equal(got, want) {
			return fmt.Errorf("it is %q\nwant: %q", got, want)
		}
		return nil
	})
}

// checked waits until castellan check finds nothing amiss: proxies that have lost their
// agent may be looking for the next one.
func checked(t *testing.T) {
	t.Helper()
	eventually(t, "castellan check", func() error {
		_, err := castellan(context.Background(), "check")
		return err
	})
}

func untainted(t *testing.T) {
	t.Helper()
	for _, node := range shared.Nodes() {
		if tainted, err := hasTaint(node); tainted || err != nil {
			t.Errorf("%s is tainted: %t, %v", node, tainted, err)
		}
	}
}

// kept is what an uninstallation leaves: what holds state, and users' policies.
var kept = []string{
	"customresourcedefinitions/authorizationpolicies.security.istio.io",
	"customresourcedefinitions/peerauthentications.security.istio.io",
	"customresourcedefinitions/requestauthentications.security.istio.io",
	"namespaces/castellan-system",
	"persistentvolumeclaims/castellan-ledger",
	"secrets/castellan-ca",
}

// Promise: uninstalling leaves nothing but state and policies, disturbs nobody's
// traffic, and installing again goes on with the same roots; with --purge nothing at
// all is left; helm does the same with the chart; and CRDs that Istio installed are used
// as they are.
func TestDisruptUninstall(t *testing.T) {
	needCluster(t)
	ctx := context.Background()
	before, err := roots()
	if err != nil {
		t.Fatal(err)
	}
	disrupted(t, func(*loads) {
		if _, err := castellan(ctx, "uninstall"); err != nil {
			t.Fatal(err)
		}
		left(t, kept)
		untainted(t)
		// Pods start, without a proxy, in namespaces that are labelled.
		namespace(t, "uninstalled", injected)
		one(t, "uninstalled", pod{Name: "app"})
		install(t, settings())
	})
	after, err := roots()
	if err != nil || !before.Equal(after) {
		t.Errorf("the roots are others: %v", err)
	}
	works(t, "reinstalled")

	// Pods of the mesh first: the kubelet cannot end one whose driver is gone.
	removeSite(t)
	if _, err := castellan(ctx, "uninstall", "--purge"); err != nil {
		t.Fatal(err)
	}
	left(t, nil)
	untainted(t)
	byHelm(t)

	istioCRDs(t)
	install(t, settings())
	for _, name := range []string{"authorizationpolicies", "peerauthentications", "requestauthentications"} {
		var crd struct {
			Metadata struct{ Labels, Annotations map[string]string }
		}
		if err := api.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"+name+".security.istio.io", &crd); err != nil {
			t.Fatal(err)
		}
		if crd.Metadata.Labels["app"] != "istio-pilot" || crd.Metadata.Labels["app.kubernetes.io/managed-by"] != "Helm" {
			t.Errorf("%s is no longer Istio's: %v", name, crd.Metadata.Labels)
		}
	}
	if now, err := roots(); err != nil || before.Equal(now) {
		t.Errorf("the roots of before, though all was purged: %v", err)
	}
	site(t)
	works(t, "on-istio-crds")
	checked(t)
}

// byHelm installs, upgrades and uninstalls with helm itself, as those do who keep all
// their charts with it, and leaves nothing.
func byHelm(t *testing.T) {
	t.Helper()
	out, err := exec.Command(filepath.Join("..", "tools", "parts"), "helm").Output()
	if err != nil {
		t.Fatal(err)
	}
	helm := func(args ...string) {
		t.Helper()
		all := slices.Concat(args, []string{"-n", "castellan-system", "--wait"})
		if _, err := run(context.Background(), "", filepath.Join(strings.TrimSpace(string(out)), "helm"), all...); err != nil {
			t.Fatal(err)
		}
	}
	chart := []string{"castellan", filepath.Join("..", "..", "deploy", "chart")}
	helm(slices.Concat([]string{"install"}, chart, settings(), []string{"--create-namespace"})...)
	checked(t)
	before, err := roots()
	if err != nil {
		t.Fatal(err)
	}
	site(t)
	works(t, "by-helm")
	helm(slices.Concat([]string{"upgrade"}, chart, settings(), []string{"--set", "ca.leafTTL=20m"})...)
	works(t, "by-helm-upgraded")
	if after, err := roots(); err != nil || !before.Equal(after) {
		t.Errorf("the roots are others after an upgrade: %v", err)
	}
	removeSite(t)
	helm("uninstall", "castellan")
	left(t, kept)
	untainted(t)
	purge := []string{"delete", "--wait=false", "namespace/castellan-system"}
	for _, name := range kept {
		if crd, ok := strings.CutPrefix(name, "customresourcedefinitions/"); ok {
			purge = append(purge, "crd/"+crd)
		}
	}
	if _, err := kubectl("", purge...); err != nil {
		t.Fatal(err)
	}
	left(t, nil)
}

// removeSite removes the pods that tests share, and waits until they are gone.
func removeSite(t *testing.T) {
	t.Helper()
	for _, ns := range []string{"callers", "outside", "steady"} {
		if err := api.remove("/api/v1/namespaces/" + ns); err != nil && !isStatus(err, 404) {
			t.Fatal(err)
		}
	}
	eventually(t, "the shared pods are gone", func() error {
		for _, ns := range []string{"callers", "outside", "steady"} {
			if err := api.get("/api/v1/namespaces/"+ns, nil); !isStatus(err, 404) {
				return fmt.Errorf("%s is still there: %w", ns, err)
			}
		}
		return nil
	})
	forgotten()
}

// istioCRDs installs Istio's own CRDs as its base chart does: managed by Helm.
func istioCRDs(t *testing.T) {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api").Output()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	applied := 0
	for text := range strings.SplitSeq(string(data), "\n---\n") {
		// The rest of them are of routes and of more that Castellan does not know.
		if !regexp.MustCompile(`(?m)^  name: (authorizationpolicies|peerauthentications|requestauthentications)\.security\.istio\.io$`).MatchString(text) {
			continue
		}
		applied++
		if _, err := kubectl(text, "apply", "--server-side", "--field-manager=helm", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	if applied != 3 {
		t.Fatalf("%d CRDs", applied)
	}
	for _, args := range [][]string{
		{"label", "--overwrite", "app=istio-pilot", "chart=istio", "heritage=Tiller", "release=istio", "app.kubernetes.io/managed-by=Helm"},
		{"annotate", "--overwrite", "helm.sh/resource-policy=keep", "meta.helm.sh/release-name=istio-base", "meta.helm.sh/release-namespace=istio-system"},
	} {
		for _, name := range []string{"authorizationpolicies", "peerauthentications", "requestauthentications"} {
			all := slices.Concat(args[:1], []string{"crd", name + ".security.istio.io"}, args[1:])
			if _, err := kubectl("", all...); err != nil {
				t.Fatal(err)
			}
		}
	}
}
