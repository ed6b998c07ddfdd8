package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

const authorizeRepeats = 3

var (
	ruleCounts = []int{10, 100, 1_000, 10_000}
	benchLine  = regexp.MustCompile(`(?m)^(Benchmark(Authorize|Enforce)/(\S+?)/rules=(\d+)\S*)\s+\d+\s+([\d.]+) ns/op.*?(\d+) allocs/op`)
)

// authorizeRow is one shape of policy: nanoseconds of a decision by number of
// rules, the median of the repeats and of its requests the slowest.
type authorizeRow struct {
	name   string
	ns     map[int]float64
	allocs int
}

// benchAuthorize runs the engine's own benchmarks and casbin's in one run.
func benchAuthorize(ctx context.Context, opt options) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "Authorize|Enforce", "-benchmem", "-benchtime", "60ms", "-count", strconv.Itoa(authorizeRepeats), "./authz/...")
	cmd.Dir = "../.."
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	var rows []*authorizeRow
	byName, repeats := map[string]*authorizeRow{}, map[string][]float64{}
	for _, m := range benchLine.FindAllStringSubmatch(string(out), -1) {
		full, name := m[1], strings.TrimPrefix(m[3], "by=")
		if m[2] == "Enforce" && name == "engine" {
			name = "casbin's own case"
		}
		row := byName[name]
		if row == nil {
			row = &authorizeRow{name: name, ns: map[int]float64{}}
			rows, byName[name] = append(rows, row), row
		}
		rules, _ := strconv.Atoi(m[4])
		ns, _ := strconv.ParseFloat(m[5], 64)
		allocs, _ := strconv.Atoi(m[6])
		row.allocs = max(row.allocs, allocs)
		if repeats[full] = append(repeats[full], ns); len(repeats[full]) == authorizeRepeats {
			row.ns[rules] = max(row.ns[rules], median(repeats[full]))
		}
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
	worst, allocs := 0.0, 0
	var growth []float64
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
			worst, allocs = max(worst, row.ns[1_000], row.ns[10_000]), max(allocs, row.allocs)
			growth = append(growth, flat)
		}
	}
	opt.reach("Authorize at 1,000 and 10,000 rules, slowest shape", worst/1000, 1, " µs")
	opt.printf("  10,000 rules against 1,000: median %.2f×, worst shape %.2f×  promised: flat\n", median(growth), slices.Max(growth))
	opt.reach("allocations", float64(allocs), 0, "")
	return nil
}
