// Command bench measures Castellan against its floors and its peers, on this
// machine and in one run, and prints every figure as a ratio. It asserts nothing
// of speed: a promise that is not reached is printed as such. What a row says of
// itself (that the rules are in force, that a session was not resumed) is asserted.
//
// The program under test runs on CPU 0; loader and backend on CPU 1. The primary
// figure is the CPU time (user and system) that one operation costs. Everything
// stays on loopback, bounded in count and time.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

type options struct {
	bin     string
	repeat  int
	seconds time.Duration
	// full runs the cells of second importance at full length, with every peer.
	full  bool
	envoy string
	out   io.Writer
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
	// The program is its own floor, backend and plain Go peer, as child processes.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "floor":
			exit(runFloor(os.Args[2:]))
		case "backend":
			exit(runBackend(os.Args[2:]))
		case "reverseproxy":
			exit(runReverseProxy(os.Args[2:]))
		}
	}
	exit(run())
}

func run() (err error) {
	opt := options{out: os.Stdout, envoy: filepath.Join(toolsDir(), "envoy-1.40.0")}
	bin := flag.String("bin", "../../build", "directory of the binaries")
	only := flag.String("only", "", "suites to run, separated by commas (default all)")
	results := flag.String("results", "", "file to write the output to as well, as Markdown (default none)")
	flag.IntVar(&opt.repeat, "repeat", 7, "repeats of each cell, interleaved")
	flag.DurationVar(&opt.seconds, "time", 2*time.Second, "length of one cell")
	flag.BoolVar(&opt.full, "full", false, "cells of second importance at full length too, against every peer")
	flag.Parse()
	if opt.repeat < 1 || opt.seconds <= 0 {
		return fmt.Errorf("-repeat and -time must be positive")
	}
	if opt.bin, err = filepath.Abs(*bin); err != nil {
		return err
	}
	if *results != "" {
		f, err := os.Create(*results)
		if err != nil {
			return err
		}
		defer f.Close()
		fmt.Fprintf(f, "# One run of the benchmark\n\n%s, %s/%s, %d CPUs, %s; %s; `-repeat %d -time %v`. Method and meaning: docs/performance.md.\n",
			time.Now().UTC().Format(time.DateOnly), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version(), peerVersions(opt), opt.repeat, opt.seconds)
		opt.out = io.MultiWriter(os.Stdout, f)
	}
	if err := raiseFiles(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for _, s := range suites {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), s.name) {
			continue
		}
		opt.printf("\n## %s\n\n```text\n", s.name)
		began := time.Now()
		if err := s.run(ctx, opt); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		opt.printf("```\n")
		fmt.Printf("(%s took %v)\n", s.name, time.Since(began).Round(time.Second))
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

// raiseFiles lets this process hold the connections of the memory cells.
func raiseFiles() error {
	limit, err := fileLimit()
	if err != nil {
		return err
	}
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: limit, Max: limit})
}

// fileLimit is how many descriptors a process may have at most.
func fileLimit() (uint64, error) {
	var r syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r)
	return r.Max, err
}

// second is the options of a cell of second importance.
func (o options) second() options {
	if !o.full {
		o.repeat, o.seconds = min(o.repeat, 3), min(o.seconds, time.Second)
	}
	return o
}

func (o options) printf(format string, args ...any) { fmt.Fprintf(o.out, format, args...) }

// reach prints a figure beside its promise.
func (o options) reach(what string, got, want float64, unit string) {
	verdict := "reached"
	switch {
	case got > want && want == 0:
		verdict = "NOT reached"
	case got > want:
		verdict = fmt.Sprintf("NOT reached, over by %.0f%%", 100*(got/want-1))
	}
	o.printf("  %-58s %8.2f%s  promised ≤ %.2f%s: %s\n", what, got, unit, want, unit, verdict)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s) == 0 {
		return 0
	}
	return s[len(s)/2]
}

// quantiles names the median and the 99th percentile.
func quantiles(v []time.Duration) string {
	s := slices.Sorted(slices.Values(v))
	if len(s) == 0 {
		return "nothing measured"
	}
	at := func(q float64) time.Duration { return s[int(q*float64(len(s)-1))].Round(time.Microsecond) }
	return fmt.Sprintf("p50 %v  p99 %v", at(0.5), at(0.99))
}
