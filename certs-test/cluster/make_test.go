package cluster_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"castellan.dev/certs-test/cluster"
)

// runMake runs a target of the tree as if somebody typed it, and returns what it
// printed.
func runMake(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "make", append([]string{"--no-print-directory", "-C", "../.."}, args...)...)
	// What the make that runs this test was told is not for this one.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "MAKEFLAGS" || name == "MFLAGS" || name == "MAKELEVEL" || name == "MAKEOVERRIDES"
	})
	cmd.Stderr, cmd.WaitDelay = os.Stderr, 10*time.Second
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("make %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestMake does what the README says for those who have no cluster: one comes up in
// time, takes an image, gets Castellan from this tree, and goes without a trace.
func TestMake(t *testing.T) {
	needCluster(t)
	const name, promised = "made", 30 * time.Second
	ctx := context.Background()
	t.Cleanup(func() {
		if err := cluster.Down(ctx, name); err != nil {
			t.Error(err)
		}
	})
	began := time.Now()
	c := up(t, name) // what it is built of is there: the shared cluster runs
	if took := time.Since(began); took > 10*promised {
		t.Errorf("two Ready nodes took %s, promised are %s", took, promised)
	}
	image, err := packProbe(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	runMake(t, "cluster-load", "NAME="+name, "TAR="+image)
	for _, node := range c.Nodes() {
		n, err := c.Node(node)
		if err != nil {
			t.Fatal(err)
		}
		out, err := n.Command(ctx, "ctr", "--namespace", "k8s.io", "images", "list", "-q").CombinedOutput()
		if err != nil || !slices.Contains(strings.Fields(string(out)), probeImage) {
			t.Errorf("%s has the images %s, %v", node, out, err)
		}
	}
	// It ends with a check of its own.
	runMake(t, "cluster-castellan", "NAME="+name)
	check := exec.Command(filepath.Join("..", "..", "build", "castellan"), "check", "--kubeconfig", c.Kubeconfig())
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("castellan check: %v\n%s", err, out)
	}
	pids := membersOf(t, name, "")
	runMake(t, "cluster-down", "NAME="+name)
	gone(t, name, pids)
	nothingLeft(t, name)
}
