package cluster_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"castellan.dev/certs-test/cluster"
)

func TestProgramsRestart(t *testing.T) {
	needCluster(t)
	ctx := context.Background()
	const ns = "restarts"
	pair(t, ns)
	second, err := shared.Node("node-2")
	if err != nil {
		t.Fatal(err)
	}
	out, err := kubectl("", "get", "-n", ns, "pod", "one", "-o", "jsonpath={.status.podIP}")
	url := "http://" + must(t, out, err) + ":8080"
	// The pod answers a program that needs neither kubelet nor API server.
	answers := func() error {
		out, err := second.Command(ctx, "curl", "-sS", "--max-time", "20", url).CombinedOutput()
		if err != nil || string(out) != "one" {
			return fmt.Errorf("%q, %w", out, err)
		}
		return nil
	}
	// kubectl would try for ten seconds.
	ready := func(want bool, what string) {
		t.Helper()
		eventually(t, what, func() error {
			out, err := second.Command(ctx, "curl", "-sSk", "--fail", "--max-time", "5", "https://10.240.0.1:6443/readyz").CombinedOutput()
			if is := err == nil; is != want {
				return fmt.Errorf("says %s, %w", out, err)
			}
			return nil
		})
	}
	for _, name := range []string{cluster.Kubelet("node-1"), cluster.Containerd("node-1"), cluster.KubeProxy("node-1"), cluster.APIServer, cluster.ControllerManager, cluster.Scheduler, cluster.DNS, cluster.Etcd} {
		if err := shared.KillProcess(ctx, name); err != nil {
			t.Fatal(err)
		}
		if err := shared.KillProcess(ctx, name); err == nil {
			t.Errorf("%s was killed twice", name)
		}
		if err := answers(); err != nil {
			t.Errorf("without %s: %v", name, err)
		}
		ready(name != cluster.APIServer && name != cluster.Etcd, "the API server without "+name)
		if err := shared.StartProcess(ctx, name); err != nil {
			t.Fatal(err)
		}
		if err := shared.StartProcess(ctx, name); err == nil {
			t.Errorf("%s was started twice", name)
		}
		// It has its own connections to mend, and refuses what is written until then.
		ready(true, "the API server with "+name)
	}
	// All of it works again: a new pod is scheduled, runs and is found by name.
	apply(t, ns, pod("three", "node-1", "serve"))
	waitPods(t, ns, "three")
	eventually(t, "the new pod serves", func() error {
		out, err := probe(ns, "two", "get", "http://echo")
		if err == nil && out != "three" {
			err = fmt.Errorf("%q answered", out)
		}
		return err
	})
	// What ends by itself comes back by itself.
	before := membersOf(t, "testbed", "/kube-scheduler\x00")
	kill(t, before...)
	eventually(t, "the scheduler is back", func() error {
		now := membersOf(t, "testbed", "/kube-scheduler\x00")
		if len(now) != 1 || now[0] == before[0] {
			return fmt.Errorf("%v after %v", now, before)
		}
		return nil
	})
	if err := shared.KillProcess(ctx, "nothing"); err == nil {
		t.Error("a program that does not exist was killed")
	}
}

// startAndWait is the test's own binary as somebody who starts a cluster and then
// never gets to stop it.
func startAndWait() {
	_, err := cluster.Start(context.Background(), cluster.Config{
		Name: "crashes", Log: os.Stderr,
		FeatureGates:  map[string]bool{"PodCertificateRequest": true},
		RuntimeConfig: map[string]string{"certificates.k8s.io/v1beta1": "true"},
	})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("started")
	select {}
}

// TestCrashes follows one name through a life of accidents, and its end.
func TestCrashes(t *testing.T) {
	needCluster(t)
	ctx := context.Background()
	t.Cleanup(func() {
		if err := cluster.Down(ctx, "crashes"); err != nil {
			t.Error(err)
		}
	})

	starter := exec.Command("/proc/self/exe", "start-and-wait")
	stdout, err := starter.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := starter.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 100)
	n, _ := stdout.Read(line)
	if got := string(line[:n]); got != "started\n" {
		t.Fatalf("the starter says %q", got)
	}
	started, err := cluster.Attach("crashes")
	if err != nil {
		t.Fatal(err)
	}
	apis, err := exec.Command(started.Kubectl(), "--kubeconfig", started.Kubeconfig(), "get", "--raw", "/apis/certificates.k8s.io/v1beta1").CombinedOutput()
	if err != nil || !strings.Contains(string(apis), "podcertificaterequests") {
		t.Errorf("with the feature and its API switched on: %s, %v", apis, err)
	}
	pids := membersOf(t, "crashes", "")
	if err := starter.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = starter.Wait()
	gone(t, "crashes", pids)

	// What it left does not keep the next one from starting, which outlives its starter.
	up(t, "crashes")
	pids = membersOf(t, "crashes", "")

	// The process that all depends on dies, and some others.
	kill(t, append(membersOf(t, "crashes", "\x00daemon\x00"), membersOf(t, "crashes", "/kubelet\x00")...)...)
	gone(t, "crashes", pids)
	up(t, "crashes")
	pids = membersOf(t, "crashes", "")

	if err := cluster.Down(ctx, "crashes"); err != nil {
		t.Fatal(err)
	}
	gone(t, "crashes", pids)
	nothingLeft(t, "crashes")
	if err := cluster.Down(ctx, "crashes"); err != nil {
		t.Errorf("stopping what is not there: %v", err)
	}
}

// nothingLeft fails the test if there is anything of a cluster that was stopped.
func nothingLeft(t *testing.T, name string) {
	t.Helper()
	if _, err := cluster.Attach(name); err == nil {
		t.Errorf("%q counts as running", name)
	}
	for _, pattern := range []string{"/var/cache/castellan/cluster/" + name + "*", "/sys/fs/cgroup/castellan-" + name, "/sys/fs/cgroup/*/castellan-" + name} {
		if left, err := filepath.Glob(pattern); len(left) > 0 || err != nil {
			t.Errorf("left behind: %q, %v", left, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte("cluster/"+name)) {
		t.Errorf("mounts left behind, %v:\n%s", err, mounts)
	}
}

// up starts a cluster as users do. That it returns says that no daemon holds the pipe.
func up(t *testing.T, name string) *cluster.Cluster {
	t.Helper()
	out := runMake(t, "cluster-up", "NAME="+name)
	c, err := cluster.Attach(name)
	if err != nil {
		t.Fatal(err)
	}
	if want := "KUBECONFIG=" + c.Kubeconfig() + "\nKUBECTL=" + c.Kubectl() + "\n"; out != want {
		t.Errorf("make cluster-up printed %q, want %q", out, want)
	}
	nodes, err := exec.Command(c.Kubectl(), "--kubeconfig", c.Kubeconfig(), "get", "nodes", "-o", "name").Output()
	if err != nil || string(nodes) != "node/node-1\nnode/node-2\n" {
		t.Errorf("its nodes: %q, %v", nodes, err)
	}
	return c
}

// membersOf are the processes of a cluster's PID namespace whose command line, in
// which each argument ends with a zero byte, contains part.
func membersOf(t *testing.T, name, part string) []int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var namespace string
	commands := map[string]string{}
	for _, p := range all {
		line, err := os.ReadFile(filepath.Join(p, "cmdline"))
		if err != nil {
			continue // ended meanwhile
		}
		commands[p] = string(line)
		if strings.Contains(string(line), "\x00init\x00/var/cache/castellan/cluster/"+name+"\x00") {
			namespace, err = os.Readlink(filepath.Join(p, "ns/pid_for_children"))
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	var pids []int
	for p, command := range commands {
		if of, err := os.Readlink(filepath.Join(p, "ns/pid")); err != nil || of != namespace || !strings.Contains(command, part) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if part == "" && len(pids) < 10 {
		t.Fatalf("%q has only the processes %v", name, pids)
	}
	return pids
}

func kill(t *testing.T, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
}

// gone waits until all these processes are.
func gone(t *testing.T, name string, pids []int) {
	t.Helper()
	eventually(t, "the processes of "+name+" end", func() error {
		for _, pid := range pids {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err == nil && !bytes.Contains(stat, []byte(") Z ")) {
				return fmt.Errorf("%s is there", stat)
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
		return nil
	})
	if _, err := cluster.Attach(name); err == nil {
		t.Errorf("%q counts as running", name)
	}
}
