package archtest_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// metric is what the source, or the page, says of one.
type metric struct {
	kind   string // "" where the source does not show it
	labels []string
}

// constructors of prometheus and the kind they make.
var constructors = map[string]string{
	"NewCounter": "counter", "NewCounterVec": "counter", "NewCounterFunc": "counter",
	"NewGauge": "gauge", "NewGaugeVec": "gauge", "NewGaugeFunc": "gauge",
	"NewHistogram": "histogram", "NewHistogramVec": "histogram", "NewDesc": "",
}

// stringsIn lists the string literals below a node.
func stringsIn(n ast.Node) []string {
	var out []string
	ast.Inspect(n, func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil {
				out = append(out, s)
			}
		}
		return true
	})
	return out
}

var metricName = regexp.MustCompile(`^castellan_[a-z0-9_]+$`)

// declaredMetrics finds every metric that is named in the product's source.
func declaredMetrics(t *testing.T) map[string]metric {
	t.Helper()
	found := map[string]metric{}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == "certs-test" || strings.HasPrefix(d.Name(), ".") && d.Name() != "../..") && path != "../.." {
			return filepath.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		for _, s := range stringsIn(file) {
			if _, known := found[s]; metricName.MatchString(s) && !known {
				found[s] = metric{}
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			fun, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			kind, ok := constructors[fun.Sel.Name]
			if !ok || len(call.Args) == 0 {
				return true
			}
			name, m := "", metric{kind: kind}
			for _, s := range stringsIn(call.Args[0]) {
				if metricName.MatchString(s) {
					name = s
				}
			}
			for _, arg := range call.Args[1:] {
				if list, ok := arg.(*ast.CompositeLit); ok {
					m.labels = stringsIn(list)
				}
			}
			if name != "" {
				found[name] = m
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestMetricsPage: docs/metrics.md lists every metric there is, with its type and
// labels, and none that is not.
func TestMetricsPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `(castellan_[a-z0-9_]+)` \\| (counter|gauge|histogram) \\| ([^|]*)\\| (\\S.*) \\|$")
	listed := map[string]metric{}
	for _, m := range row.FindAllStringSubmatch(string(page), -1) {
		if _, twice := listed[m[1]]; twice {
			t.Errorf("%s is listed twice", m[1])
		}
		var labels []string
		for label := range strings.SplitSeq(strings.TrimSpace(m[3]), ", ") {
			if label != "" {
				labels = append(labels, strings.Trim(label, "`"))
			}
		}
		listed[m[1]] = metric{kind: m[2], labels: labels}
	}
	declared := declaredMetrics(t)
	if len(declared) < 30 {
		t.Fatalf("only %d metrics found in the source: does this test still see them?", len(declared))
	}
	for name, want := range declared {
		got, ok := listed[name]
		switch {
		case !ok:
			t.Errorf("docs/metrics.md does not list %s", name)
		case want.kind != "" && (got.kind != want.kind || !slices.Equal(got.labels, want.labels)):
			t.Errorf("docs/metrics.md: %s is a %s by %v, not a %s by %v", name, want.kind, want.labels, got.kind, got.labels)
		}
	}
	for name := range listed {
		if _, ok := declared[name]; !ok {
			t.Errorf("docs/metrics.md lists %s, which is not there", name)
		}
	}
	// Whatever else the page speaks of is one of them, too.
	for _, name := range regexp.MustCompile(`castellan_[a-z0-9_]+`).FindAllString(string(page), -1) {
		if _, ok := declared[name]; !ok {
			t.Errorf("docs/metrics.md speaks of %s, which is not there", name)
		}
	}
}
