package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

var (
	ruleCounts = []int{10, 100, 1_000, 10_000}
	benchLine  = regexp.MustCompile(`(?m)^Benchmark(Authorize|Enforce)/(\S+?)/rules=(\d+)(?:/\S+)?\s+\d+\s+([\d.]+) ns/op.*?(\d+) allocs/op`)
)

// authorizeRow is one shape of policy: nanoseconds of a decision by number of rules.
type authorizeRow struct {
	name   string
	ns     map[int]float64
	allocs int
}

// benchAuthorize runs the engine's own benchmarks and casbin's in one run. Of the
// requests of a shape the slowest counts.
func benchAuthorize(ctx context.Context, opt options) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "Authorize|Enforce", "-benchmem", "-benchtime", "300ms", "./authz/...")
	cmd.Dir = "../.."
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	var rows []*authorizeRow
	byName := map[string]*authorizeRow{}
	for _, m := range benchLine.FindAllStringSubmatch(string(out), -1) {
		name := strings.TrimPrefix(m[2], "by=")
		if m[1] == "Enforce" && name == "engine" {
			name = "casbin's own case"
		}
		row := byName[name]
		if row == nil {
			row = &authorizeRow{name: name, ns: map[int]float64{}}
			rows, byName[name] = append(rows, row), row
		}
		rules, _ := strconv.Atoi(m[3])
		ns, _ := strconv.ParseFloat(m[4], 64)
		allocs, _ := strconv.Atoi(m[5])
		row.ns[rules], row.allocs = max(row.ns[rules], ns), max(row.allocs, allocs)
	}
	casbin := byName["casbin"]
	if casbin == nil || len(rows) < 2 {
		return errors.New("no benchmarks of the engine and of casbin were found")
	}
	return printAuthorize(opt, rows, casbin)
}

func printAuthorize(opt options, rows []*authorizeRow, casbin *authorizeRow) error {
	opt.printf("  ns by number of rules, and in brackets how many times as long casbin takes for as many\n")
	opt.printf("  %-18s", "shape")
	for _, n := range ruleCounts {
		opt.printf(" %18d", n)
	}
	opt.printf(" %7s %14s\n", "allocs", "10,000/1,000")
	worst, growth, allocs := 0.0, 0.0, 0
	for _, row := range rows {
		opt.printf("  %-18s", row.name)
		for _, n := range ruleCounts {
			if row.ns[n] == 0 {
				return fmt.Errorf("%s was not measured with %d rules", row.name, n)
			}
			cell := fmt.Sprintf("%.0f", row.ns[n])
			if row != casbin {
				cell += fmt.Sprintf(" (%.0f×)", casbin.ns[n]/row.ns[n])
			}
			opt.printf(" %18s", cell)
		}
		flat := row.ns[10_000] / row.ns[1_000]
		opt.printf(" %7d %13.2f×\n", row.allocs, flat)
		if row != casbin {
			worst, allocs, growth = max(worst, row.ns[1_000], row.ns[10_000]), max(allocs, row.allocs), max(growth, flat)
		}
	}
	opt.reach("Authorize at 1,000 and 10,000 rules, slowest shape", worst/1000, 1, " µs")
	opt.reach("10,000 rules against 1,000 (flat; a fifth is noise), worst", growth, 1.2, "×")
	opt.reach("allocations", float64(allocs), 0, "")
	return nil
}
