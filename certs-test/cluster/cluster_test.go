package cluster_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"castellan.dev/certs-test/cluster"
)

// patience is how long a condition may take before a test gives up: far beyond what
// anything promises.
const patience = 60 * time.Second

// shared is the cluster of all tests but those of starting and stopping, with the
// probe's image loaded.
var shared *cluster.Cluster

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "start-and-wait" {
		startAndWait()
	}
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
		fmt.Fprintln(os.Stderr, "not root: tests of the cluster are skipped")
		return tests(), nil
	}
	ctx := context.Background()
	shared, err = cluster.Start(ctx, cluster.Config{Name: "testbed", Log: os.Stderr})
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, shared.Stop(ctx)) }()
	if err := loadProbe(ctx); err != nil {
		return 1, err
	}
	return tests(), nil
}

func loadProbe(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "probe")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	image, err := packProbe(dir)
	if err != nil {
		return err
	}
	return shared.LoadImage(ctx, image)
}

// probeImage is the name of the image that packProbe makes.
const probeImage = "docker.io/local/probe:1"

// packProbe makes the probe's image in a folder.
func packProbe(dir string) (image string, err error) {
	binary, image := filepath.Join(dir, "probe"), filepath.Join(dir, "probe.tar")
	build := exec.Command("go", "build", "-o", binary, "./internal/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w: %s", err, out)
	}
	f, err := os.Create(image)
	if err != nil {
		return "", err
	}
	err = cluster.WriteImage(f, cluster.Image{
		Name:       probeImage,
		Files:      map[string]string{"/bin/probe": binary},
		Entrypoint: []string{"/bin/probe"},
	})
	return image, errors.Join(err, f.Close())
}

func needCluster(t *testing.T) {
	t.Helper()
	if shared == nil {
		t.Skip("a cluster needs root")
	}
}

// kubectl runs kubectl against the shared cluster.
func kubectl(stdin string, args ...string) (string, error) {
	cmd := exec.Command(shared.Kubectl(), append([]string{"--kubeconfig", shared.Kubeconfig(), "--request-timeout=20s"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w: %s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

func must(t *testing.T, out string, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// namespace makes a namespace for a test.
func namespace(t *testing.T, name string) {
	t.Helper()
	_, err := kubectl("", "create", "namespace", name)
	must(t, "", err)
	t.Cleanup(func() {
		if _, err := kubectl("", "delete", "namespace", name, "--wait=false"); err != nil {
			t.Error(err)
		}
	})
}

func apply(t *testing.T, ns string, objects ...any) {
	t.Helper()
	list, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "apply", func() error {
		_, err := kubectl(string(list), "apply", "-n", ns, "-f", "-")
		return err
	})
}

type object = map[string]any

// pod is a pod that runs the probe, on a node if one is named.
func pod(name, node string, args ...string) object {
	spec := object{
		"terminationGracePeriodSeconds": 0,
		"containers": []object{{
			"name": "probe", "image": probeImage, "imagePullPolicy": "Never", "args": args,
		}},
	}
	if node != "" {
		spec["nodeSelector"] = object{"kubernetes.io/hostname": node}
	}
	return object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": name, "labels": object{"app": "probe"}},
		"spec":     spec,
	}
}

func service(name string, spec object) object {
	spec["selector"] = object{"app": "probe"}
	return object{"apiVersion": "v1", "kind": "Service", "metadata": object{"name": name}, "spec": spec}
}

func waitPods(t *testing.T, ns string, pods ...string) {
	t.Helper()
	for _, p := range pods {
		eventually(t, p+" is ready", func() error {
			out, err := kubectl("", "get", "-n", ns, "pod", p, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
			if err == nil && out != "True" {
				err = fmt.Errorf("Ready is %q", out)
			}
			return err
		})
	}
}

// probe runs the probe in a pod and returns what it printed.
func probe(ns, pod string, args ...string) (string, error) {
	return kubectl("", append([]string{"exec", "-n", ns, pod, "--", "/bin/probe"}, args...)...)
}

// eventually polls until check is content.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestNodesAreReady(t *testing.T) {
	needCluster(t)
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				Addresses  []struct{ Type, Address string }
				Conditions []struct{ Type, Status string }
				NodeInfo   struct{ KubeletVersion string }
			}
		}
	}
	out, err := kubectl("", "get", "nodes", "-o", "json")
	if err := json.Unmarshal([]byte(must(t, out, err)), &list); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, n := range list.Items {
		names = append(names, n.Metadata.Name)
		for _, c := range n.Status.Conditions {
			if c.Type == "Ready" && c.Status != "True" {
				t.Errorf("%s is not ready", n.Metadata.Name)
			}
		}
		node, err := shared.Node(n.Metadata.Name)
		if err != nil {
			t.Fatal(err)
		}
		var addresses []string
		for _, a := range n.Status.Addresses {
			if a.Type == "InternalIP" {
				addresses = append(addresses, a.Address)
			}
		}
		if want := []string{node.IP, node.V6}; !slices.Equal(addresses, want) {
			t.Errorf("%s has addresses %q, want %q", n.Metadata.Name, addresses, want)
		}
		// The client was built from the same module.
		if want := filepath.Base(filepath.Dir(shared.Kubectl())); "kube-"+n.Status.NodeInfo.KubeletVersion != want {
			t.Errorf("kubelet is %s, want that of %s", n.Status.NodeInfo.KubeletVersion, want)
		}
	}
	if !slices.Equal(names, shared.Nodes()) {
		t.Errorf("nodes %q, want %q", names, shared.Nodes())
	}
}

func TestSecondStartIsRefused(t *testing.T) {
	needCluster(t)
	_, err := cluster.Start(context.Background(), cluster.Config{Name: "testbed"})
	if err == nil || !strings.Contains(err.Error(), `"testbed" runs already`) {
		t.Fatalf("got %v, want a refusal", err)
	}
}
