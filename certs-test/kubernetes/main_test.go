// Package kubernetes tests Castellan on a real Kubernetes cluster of two nodes:
// installed by its own command, with real kubelets, real pods, and policies by kubectl.
//
// The tests have a cluster of their own, which ends with them. With
// CASTELLAN_CLUSTER=NAME they use one that runs (make cluster-up NAME=...) and what is
// installed in it, and leave both as they are: a single test then takes seconds. With
// CASTELLAN_INSTALL=always they install what is in the tree first, with never they
// install nothing.
package kubernetes_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"castellan.dev/certs-test/cluster"
)

// patience is how long a condition may take before a test gives up: far beyond what
// anything promises.
const patience = 2 * time.Minute

// The cluster of all tests, the folder of the binaries under test, and our client of
// the API server. Without root there is no cluster, and every test skips.
var (
	shared *cluster.Cluster
	bin    string
	api    *apiClient
)

func TestMain(m *testing.M) {
	code, err := withCluster(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func withCluster(tests func() int) (code int, err error) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			return 1, errors.New("a cluster needs root")
		}
		fmt.Fprintln(os.Stderr, "not root: all tests on Kubernetes are skipped")
		return tests(), nil
	}
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "castellan-k8s")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	bin = dir
	stop, err := openCluster(ctx)
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	if api, err = newAPIClient(shared.Kubeconfig()); err != nil {
		return 1, err
	}
	if err := prepare(ctx); err != nil {
		dump(os.Stderr)
		return 1, err
	}
	if code = phases(tests); code != 0 {
		dump(os.Stderr)
	}
	return code, writeResults()
}

// phases runs what may run beside each other, and then the tests that disturb the
// whole installation (TestDisrupt...), one by one. Go would run those first.
func phases(tests func() int) (code int) {
	flag.Parse()
	pattern, skip := flag.Lookup("test.run").Value, flag.Lookup("test.skip").Value
	if pattern.String() != "" || skip.String() != "" {
		return tests() // somebody chose; benchmarks, too, are chosen
	}
	// Tests wait, most of the time.
	_ = flag.Set("test.parallel", "12")
	_ = skip.Set("^TestDisrupt")
	code = tests()
	_ = skip.Set("")
	_ = pattern.Set("^TestDisrupt")
	return max(code, tests())
}

// openCluster starts the tests' own cluster, or finds the one that is asked for.
func openCluster(ctx context.Context) (stop func() error, err error) {
	if name := os.Getenv("CASTELLAN_CLUSTER"); name != "" {
		shared, err = cluster.Attach(name)
		return func() error { return nil }, err
	}
	shared, err = cluster.Start(ctx, cluster.Config{Name: "e2e", Log: os.Stderr})
	if err != nil {
		return nil, err
	}
	return func() error { return shared.Stop(ctx) }, nil
}

// prepare builds the command, and installs Castellan by it unless it is installed.
func prepare(ctx context.Context) error {
	step := steps()
	if err := build(ctx, bin, "castellan"); err != nil {
		return err
	}
	step("castellan is built")
	if err := loadApps(ctx); err != nil {
		return err
	}
	step("the application's image is loaded")
	switch os.Getenv("CASTELLAN_INSTALL") {
	case "always":
		if err := forgetCallers(); err != nil {
			return err
		}
	case "never":
		return nil
	default:
		if was := installed(); was != "" {
			tag = was
			return nil
		}
	}
	if err := loadImages(ctx, tag); err != nil {
		return err
	}
	step("Castellan's images are loaded")
	out, err := castellan(ctx, append([]string{"install"}, settings()...)...)
	step("castellan install ended")
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// tag of the images. In a cluster that stays, pods of the one before must notice.
var tag = func() string {
	if os.Getenv("CASTELLAN_CLUSTER") == "" {
		return "dev"
	}
	return fmt.Sprintf("dev-%d", time.Now().Unix())
}()

// settings of the installation that the tests share.
func settings() []string {
	return []string{"--timeout", "3m", "--set", "image.pullPolicy=Never", "--set", "image.tag=" + tag}
}

// steps says how long each step took.
func steps() func(string) {
	last := time.Now()
	return func(what string) {
		fmt.Fprintf(os.Stderr, "%s: %.1fs\n", what, time.Since(last).Seconds())
		last = time.Now()
	}
}

// installed is the tag of the images that are installed, if any are.
func installed() string {
	var d struct {
		Spec struct {
			Template struct {
				Spec struct{ Containers []struct{ Image string } }
			}
		}
	}
	if err := api.get("/apis/apps/v1/namespaces/castellan-system/daemonsets/castellan-agent", &d); err != nil || len(d.Spec.Template.Spec.Containers) == 0 {
		return ""
	}
	_, was, _ := strings.Cut(d.Spec.Template.Spec.Containers[0].Image, ":")
	return was
}

func needCluster(t testing.TB) {
	t.Helper()
	if shared == nil {
		t.Skip("a cluster needs root")
	}
}

// eventually polls until check is content.
func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	within(t, patience, what, check)
}

func within(t testing.TB, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// path of a binary under test.
func path(name string) string { return filepath.Join(bin, name) }
