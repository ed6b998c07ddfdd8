package discovery_test

import (
	"strings"
	"testing"
)

// TestRules holds what the policy rules (docs/conformance.md) ask of discovery.
func TestRules(t *testing.T) {
	t.Run("authz-01 namespace, labels and root namespace select", testSelection)
	t.Run("authz-02 targetRefs are not for sidecars", testTargetRefs)
	t.Run("authz-21 refused: the last good version, else deny", testRefused)
	t.Run("authz-21 refused: who denies", testWhoARefusedDocumentDenies)
	t.Run("authz-28 key sets are fetched, or their tokens refused", testKeySets)
	t.Run("authz-33 expected identities", testServiceIdentity)
}

func testSelection(t *testing.T) {
	unselective := func(text string) string {
		return strings.Replace(text, "  selector: {matchLabels: {app: x}}\n", "", 1)
	}
	in := func(text, namespace string) string {
		return strings.Replace(text, "namespace: shop", "namespace: "+namespace, 1)
	}
	s := start(t, map[string]string{
		"a.yaml": allow("by-label", "orders", "x"),
		"b.yaml": unselective(allow("all-of-shop", "x", "x")),
		"c.yaml": in(unselective(allow("mesh", "x", "x")), "castellan-system"),
		"d.yaml": in(allow("mesh-by-label", "payments", "x"), "castellan-system"),
		"e.yaml": in(allow("of-nobody", "orders", "x"), "guest"),
		"f.yaml": strings.Replace(allow("two-labels", "orders", "x"), "app: orders", "app: orders, tier: none", 1),
	})
	one, two := s.follow(s.agent("one")), s.follow(s.agent("two"))
	s.told(one, "pod-orders", "mesh=x all-of-shop=x by-label=x")
	s.told(two, "pod-payments", "mesh=x mesh-by-label=x all-of-shop=x")
	s.told(two, "pod-intruder", "mesh=x")
}

func testTargetRefs(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": strings.Replace(allow("gateway", "orders", "x"), "selector: {matchLabels: {app: orders}}",
		"targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: edge}]", 1), "b.yaml": allow("sidecar", "orders", "x")})
	one := s.follow(s.agent("one"))
	s.told(one, "pod-orders", "sidecar=x")
	s.become("a.yaml shop/gateway accepted 0", "b.yaml shop/sidecar accepted 1")
}
