package install_test

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
)

// permissions are "where|resource name|verb", of the chart's roles.
func permissions(t *testing.T, text string) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	add := func(where string, rules []rbacv1.PolicyRule) {
		for _, rule := range rules {
			var things []string
			for _, resource := range rule.Resources {
				for _, group := range rule.APIGroups {
					thing := resource
					if group != "" {
						thing += "." + group
					}
					if len(rule.ResourceNames) == 0 {
						things = append(things, thing)
					}
					for _, name := range rule.ResourceNames {
						things = append(things, thing+" "+name)
					}
				}
			}
			for _, thing := range append(things, rule.NonResourceURLs...) {
				for _, verb := range rule.Verbs {
					key := where + "|" + thing + "|" + verb
					if out[key] {
						t.Errorf("%s is granted twice", key)
					}
					out[key] = true
				}
			}
		}
	}
	for _, o := range render(t, text).Objects {
		switch o.GetKind() {
		case "ClusterRole":
			add("everywhere", as[rbacv1.ClusterRole](t, o).Rules)
		case "Role":
			add("in its namespace", as[rbacv1.Role](t, o).Rules)
		}
	}
	return out
}

// documented are the same, of the table in docs/kubernetes.md.
func documented(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	table := false
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "| Resource | Where | Verbs | Why |") {
			table = true
			continue
		}
		if !table || strings.HasPrefix(line, "|---") {
			continue
		}
		if line == "" {
			break
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		if len(cells) != 4 || len(strings.TrimSpace(cells[3])) < 5 {
			t.Errorf("%q: want resource, where, verbs and a reason", line)
			continue
		}
		for verb := range strings.SplitSeq(cells[2], ",") {
			out[strings.TrimSpace(cells[1])+"|"+strings.TrimSpace(cells[0])+"|"+strings.TrimSpace(verb)] = true
		}
	}
	if len(out) == 0 {
		t.Fatal("docs/kubernetes.md has no table of permissions")
	}
	return out
}

// The documented permissions are those that the chart grants with every option on.
func TestPermissionsDocumented(t *testing.T) {
	granted := permissions(t, "attestation: {verification: tokenReview}")
	written := documented(t)
	for _, key := range slices.Sorted(maps.Keys(granted)) {
		if !written[key] {
			t.Errorf("granted and not documented: %s", key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(written)) {
		if !granted[key] {
			t.Errorf("documented and not granted: %s", key)
		}
	}
}

// What an option needs is granted with that option only.
func TestPermissionsByOption(t *testing.T) {
	for text, absent := range map[string]string{
		"":                           "everywhere|tokenreviews.authentication.k8s.io|create",
		"agent: {taintNodes: false}": "everywhere|nodes|patch",
	} {
		if permissions(t, text)[absent] {
			t.Errorf("%q grants %s", text, absent)
		}
	}
	// No kind as a whole, and never Secrets at large.
	for key := range permissions(t, variants["rich"]) {
		if strings.Contains(key, "*") || strings.HasPrefix(key, "everywhere|secrets") || strings.Contains(key, "|secrets|") {
			t.Errorf("too much: %s", key)
		}
	}
}
