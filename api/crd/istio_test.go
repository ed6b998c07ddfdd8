package crd_test

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// deliberate are the ways in which our definitions are not Istio's, by the end of a
// place in them, each with its reason.
var deliberate = map[string]string{
	".additionalPrinterColumns": "ours show the two conditions as well",
	".spec.oneOf":               "with a provider or without one: refuses nothing",
	// Every object has these; the generator says so.
	".openAPIV3Schema.properties.apiVersion": "a string",
	".openAPIV3Schema.properties.kind":       "a string",
	".openAPIV3Schema.properties.metadata":   "an object",
	// Several write conditions, each its own, which needs a key, and keys are required.
	".conditions.x-kubernetes-list-type":     "a map by type",
	".conditions.x-kubernetes-list-map-keys": "a map by type",
	".conditions.items.required":             "the map's key",
}

// TestIstiosOwn: what Istio's definitions take and refuse, ours do, so that either may
// be in a cluster.
func TestIstiosOwn(t *testing.T) {
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api")
	dir, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	want, used, found := definitions(t, string(theirs)), map[string]bool{}, 0
	for _, text := range read(t, generated) {
		for kind, ours := range definitions(t, text) {
			found++
			for _, place := range differences(want[kind], ours, kind) {
				known := false
				for end := range deliberate {
					if strings.HasSuffix(place[0], end) {
						used[end], known = true, true
					}
				}
				if !known {
					t.Errorf("%s: Istio has %s, we have %s", place[0], place[1], place[2])
				}
			}
		}
	}
	if found != 3 {
		t.Errorf("%d definitions", found)
	}
	for end := range deliberate {
		if !used[end] {
			t.Errorf("%s is no difference any more", end)
		}
	}
}

// definitions are the specs by kind.
func definitions(t *testing.T, text string) map[string]any {
	t.Helper()
	out := map[string]any{}
	for _, part := range regexp.MustCompile(`(?m)^---$`).Split(text, -1) {
		var def struct {
			Spec map[string]any `json:"spec"`
		}
		if err := yaml.Unmarshal([]byte(part), &def); err != nil {
			t.Fatal(err)
		}
		if names, ok := def.Spec["names"].(map[string]any); ok {
			out[fmt.Sprint(names["kind"])] = def.Spec
		}
	}
	return out
}

// differences lists place, theirs and ours wherever two values differ in more than
// words for people and in how they are written down.
func differences(theirs, ours any, at string) [][3]string {
	var out [][3]string
	switch a := theirs.(type) {
	case map[string]any:
		b, ok := ours.(map[string]any)
		if !ok {
			break
		}
		names := slices.Collect(maps.Keys(a))
		names = slices.AppendSeq(names, maps.Keys(b))
		slices.Sort(names)
		for _, name := range slices.Compact(names) {
			_, text := a[name].(string)
			_, ourText := b[name].(string)
			if name == "description" && (text || ourText) {
				continue
			}
			out = append(out, differences(a[name], b[name], at+"."+name)...)
		}
		return out
	case []any:
		b, ok := ours.([]any)
		if !ok || len(a) != len(b) {
			break
		}
		if strings.HasSuffix(at, ".required") {
			a, b = sorted(a), sorted(b)
		}
		for i := range a {
			out = append(out, differences(a[i], b[i], fmt.Sprintf("%s[%d]", at, i))...)
		}
		return out
	}
	if a, b := written(theirs), written(ours); a != b {
		out = append(out, [3]string{at, a, b})
	}
	return out
}

func sorted(list []any) []any {
	return slices.SortedFunc(slices.Values(list), func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
}

// written is a value without what means nothing in a rule: its kind of quotes and space.
func written(value any) string {
	return strings.Join(strings.Fields(strings.ReplaceAll(fmt.Sprint(value), `"`, "'")), " ")
}
