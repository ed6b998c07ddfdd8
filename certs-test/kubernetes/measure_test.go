package kubernetes_test

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// The measurements are benchmarks of one round each (make bench-cluster): they say what
// was reached and never fail on time. The times are tested elsewhere, with ten times as
// long as is promised: that of the first SVID from the program's start, not from the
// pod's. The server's memory is measured and no more.

// row is one line of results.md.
type row struct{ what, method, promised, measured string }

var rows []row

// report adds a line to results.md, where that is wanted.
func report(b *testing.B, what, method, promised, format string, args ...any) {
	b.Helper()
	r := row{what, method, promised, fmt.Sprintf(format, args...)}
	rows = append(rows, r)
	b.Logf("%s: %s (promised %s)", r.what, r.measured, r.promised)
}

// writeResults writes the file named by CASTELLAN_RESULTS, if there are any.
func writeResults() error {
	file := os.Getenv("CASTELLAN_RESULTS")
	if file == "" || len(rows) == 0 {
		return nil
	}
	var t strings.Builder
	fmt.Fprintf(&t, "# One run of the measurements on Kubernetes\n\n%s, %s/%s, %d CPUs for the whole cluster of two nodes and what loads it, %s. By `make bench-cluster`.\n\n",
		time.Now().UTC().Format(time.DateOnly), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version())
	t.WriteString("| What | Promised | Measured | How |\n|---|---|---|---|\n")
	for _, r := range rows {
		fmt.Fprintf(&t, "| %s | %s | %s | %s |\n", r.what, r.promised, r.measured, r.method)
	}
	return os.WriteFile(file, []byte(t.String()), 0o644)
}

// spread are the median and the longest of some times.
func spread(all []time.Duration) (median, most time.Duration) {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2], sorted[len(sorted)-1]
}

func ms(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
