// Command bench measures Castellan against its floors and its peers, on this
// machine and in one run, and prints every figure as a ratio. It asserts nothing:
// a promise that is not reached is printed as such.
//
// The program under test runs on CPU 0; loader and backend on CPU 1. The primary
// figure is the CPU time (user and system, from /proc) that one operation costs.
// Everything stays on loopback, bounded in count and time.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

type options struct {
	bin     string
	repeat  int
	seconds time.Duration
	envoy   string
}

var suites = []struct {
	name string
	run  func(context.Context, options) error
}{
	{"issue", benchIssue},
	{"authorize", benchAuthorize},
	{"request", benchRequest},
	{"connect", benchConnect},
	{"memory", benchMemory},
	{"rotation", benchRotation},
	{"policy", benchPolicy},
}

func main() {
	// The program is its own floor and its own plain Go peer, as child processes.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "floor":
			exit(runFloor(os.Args[2:]))
		case "reverseproxy":
			exit(runReverseProxy(os.Args[2:]))
		}
	}
	var opt options
	var only string
	flag.StringVar(&opt.bin, "bin", "../../build", "directory of the binaries")
	flag.IntVar(&opt.repeat, "repeat", 7, "repeats of each cell, interleaved")
	flag.DurationVar(&opt.seconds, "time", 2*time.Second, "length of one cell")
	flag.StringVar(&only, "only", "", "suites to run, separated by commas (default all)")
	flag.Parse()
	opt.envoy = filepath.Join(toolsDir(), "envoy-1.40.0")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	exit(runSuites(ctx, opt, only))
}

func runSuites(ctx context.Context, opt options, only string) error {
	for _, s := range suites {
		if only != "" && !slices.Contains(strings.Split(only, ","), s.name) {
			continue
		}
		fmt.Printf("\n== %s\n", s.name)
		if err := s.run(ctx, opt); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func toolsDir() string {
	if dir := os.Getenv("CASTELLAN_TOOLS"); dir != "" {
		return dir
	}
	cache, _ := os.UserCacheDir()
	return filepath.Join(cache, "castellan", "tools")
}

// reach prints a figure beside its promise.
func reach(what string, got, want float64, unit string) {
	verdict := "reached"
	if got > want {
		verdict = fmt.Sprintf("NOT reached, over by %.0f%%", 100*(got/want-1))
	}
	fmt.Printf("  %-58s %8.2f%s  promised ≤ %.2f%s: %s\n", what, got, unit, want, unit, verdict)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s) == 0 {
		return 0
	}
	return s[len(s)/2]
}
