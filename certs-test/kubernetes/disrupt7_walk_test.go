package kubernetes_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"castellan.dev/certs-test/cluster"
)

// instruction is a command of a page and what the page says that it prints; nothing
// said is anything.
type instruction struct{ command, output string }

// console reads the console blocks of a page: "$ " begins a command, what follows is
// its output.
func console(t *testing.T, page string) (found []instruction) {
	t.Helper()
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case line == "```console":
			inside = true
		case line == "```":
			inside = false
		case !inside:
		case strings.HasPrefix(line, "$ "):
			found = append(found, instruction{command: line[2:]})
		case len(found) == 0:
			t.Fatalf("%s: %q stands before any command", page, line)
		default:
			found[len(found)-1].output += line + "\n"
		}
	}
	return found
}

// TestDisruptWalk: docs/kubernetes.md takes a new user from an empty cluster to two
// labelled namespaces with enforced policy; each line is tried, as it stands there.
func TestDisruptWalk(t *testing.T) {
	needCluster(t)
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	lines := console(t, filepath.Join(root, "docs", "kubernetes.md"))
	if len(lines) < 15 {
		t.Fatalf("the page has %d commands only: does this test still see them?", len(lines))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	empty, err := cluster.Start(ctx, cluster.Config{Name: "walk", Log: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := empty.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	tools := t.TempDir()
	if err := os.Symlink(empty.Kubectl(), filepath.Join(tools, "kubectl")); err != nil {
		t.Fatal(err)
	}
	for _, line := range lines {
		run := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", line.command)
		run.Dir = root
		run.Env = append(os.Environ(), "KUBECONFIG="+empty.Kubeconfig(), "PATH="+tools+":"+os.Getenv("PATH"), "PLATFORMS="+runtime.GOARCH)
		var stderr strings.Builder
		run.Stderr = &stderr
		out, err := run.Output()
		t.Logf("$ %s\n%s%s", line.command, out, stderr.String())
		if err != nil {
			t.Fatalf("%s: %v", line.command, err)
		}
		if line.output != "" && string(out) != line.output {
			t.Fatalf("%s\nprinted %q, the page says %q", line.command, out, line.output)
		}
		if strings.HasPrefix(line.command, "make ") {
			bringImages(ctx, t, root, empty)
		}
	}
}

// bringImages is what the page leaves to the user: how images come to his nodes.
func bringImages(ctx context.Context, t *testing.T, root string, to *cluster.Cluster) {
	t.Helper()
	for _, name := range []string{"castellan-server", "castellan-agent", "castellan-proxy", "hello"} {
		if err := to.LoadImage(ctx, filepath.Join(root, "build", "images", name+".tar")); err != nil {
			t.Fatal(fmt.Errorf("%s: %w", name, err))
		}
	}
}
