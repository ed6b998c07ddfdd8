package authz_test

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

var (
	conformanceRow  = regexp.MustCompile(`^\| (\d+) \|`)
	conformanceFile = regexp.MustCompile("`([a-z][a-zA-Z0-9_/]*(?:_test\\.go|\\.yaml))`")
)

// TestConformancePage holds docs/conformance.md to the tree: every rule has its
// row, in order, and the tests a row names are there and name the rule.
func TestConformancePage(t *testing.T) {
	text, err := os.ReadFile("../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	family, rows := "", map[string]int{}
	for line := range strings.SplitSeq(string(text), "\n") {
		switch {
		case strings.HasPrefix(line, "## Policy"):
			family = "authz"
		case strings.HasPrefix(line, "## SPIFFE"):
			family = "spiffe"
		}
		m := conformanceRow.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		rows[family]++
		if want := fmt.Sprint(rows[family]); m[1] != want {
			t.Errorf("%s: rule %s stands where %s should", family, m[1], want)
		}
		checkConformanceRow(t, fmt.Sprintf("%s-%02s", family, m[1]), line)
	}
	if rows["authz"] != 35 || rows["spiffe"] != 54 {
		t.Errorf("%d and %d rules, want 35 and 54", rows["authz"], rows["spiffe"])
	}
}

func checkConformanceRow(t *testing.T, rule, line string) {
	t.Helper()
	files := conformanceFile.FindAllStringSubmatch(line, -1)
	if len(files) == 0 && strings.Contains(line, "| yes |") {
		t.Errorf("%s is served, but no test is named", rule)
	}
	for _, f := range files {
		text, err := os.ReadFile("../" + f[1])
		if err != nil {
			t.Errorf("%s: %v", rule, err)
		} else if !strings.Contains(string(text), rule) {
			t.Errorf("%s: %s does not name it", rule, f[1])
		}
	}
}
