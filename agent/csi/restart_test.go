package csi_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	registerv1 "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"castellan.dev/agent/csi"
)

func leaveStaleSocket(t *testing.T, target string) {
	t.Helper()
	dir, err := os.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/socket", dir.Fd()), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
}

// TestRestart: the next agent serves at once what the one before did, in the same
// directories, with nothing but the records.
func TestRestart(t *testing.T) {
	n := newNode(t)
	p, q := pod("1"), pod("2")
	n.publish(p)
	n.publish(q)
	want := n.host.of(p).volume
	inode, err := os.Stat(n.kubelet.Target(p))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	for _, file := range n.state() {
		info, err := os.Stat(file)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", file, info.Mode(), err)
		}
	}
	if info, err := os.Stat(n.cfg.StateDir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("state directory: %v %v", info.Mode(), err)
	}
	leaveStaleSocket(t, n.kubelet.Target(p)) // as if it had been killed
	n.start()
	// Registered means restored: no publication has come.
	for _, one := range []string{"1", "2"} {
		if err := n.listening(pod(one)); err != nil {
			t.Errorf("pod %s: %v", one, err)
		}
	}
	got := n.host.of(p).volume
	if got.Account != want.Account || got.PodUID != want.PodUID || got.PodName != want.PodName || got.Token != want.Token || !got.Expires.Equal(want.Expires) {
		t.Errorf("restored %+v, want %+v", got, want)
	}
	now, err := os.Stat(n.kubelet.Target(p))
	if err != nil || !os.SameFile(inode, now) {
		t.Error("the directory that the pod has mounted was replaced")
	}
	if err := n.kubelet.Unpublish(t.Context(), p); err != nil {
		t.Error(err)
	}
	n.restart()
	if open, _ := n.host.count(); open != 1 {
		t.Errorf("%d volumes after the end of one", open)
	}
}

// TestStaleRecords: what is no record, or of a pod that is gone, is dropped.
func TestStaleRecords(t *testing.T) {
	n := newNode(t)
	for _, name := range []string{"gone", "other", "garbled", "readable", "renamed", "good"} {
		n.publish(pod(name))
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	record := func(name string) string { return filepath.Join(n.cfg.StateDir, pod(name).VolumeID()+".json") }
	text := func(name string) string {
		data, err := os.ReadFile(record(name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	write := func(path, text string, mode os.FileMode) {
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(n.kubelet.Dir, "pods", "uid-gone")); err != nil {
		t.Fatal(err)
	}
	write(record("other"), strings.Replace(text("other"), `"podName":"orders-0"`, `"podName":"orders-1"`, 1), 0o600)
	write(record("garbled"), text("garbled")[:100], 0o600)
	write(record("readable"), text("readable"), 0o644)
	write(filepath.Join(n.cfg.StateDir, "csi-renamed.json"), text("renamed"), 0o600)
	if err := os.Remove(record("renamed")); err != nil {
		t.Fatal(err)
	}
	write(filepath.Join(n.cfg.StateDir, ".tmp-123"), "half", 0o600)
	n.start()
	if open, _ := n.host.count(); open != 1 || n.host.of(pod("good")) == nil {
		t.Errorf("%d volumes served", open)
	}
	if got := n.state(); len(got) != 1 {
		t.Errorf("records %v", got)
	}
	if err := gone(filepath.Join(n.cfg.StateDir, ".tmp-123")); err != nil {
		t.Error(err)
	}
	if strings.Contains(n.logs.String(), "eyJ") {
		t.Error("a token was logged")
	}
}

// TestTwoAgents: the second waits for the end of the first, and serves nothing until then.
func TestTwoAgents(t *testing.T) {
	n := newNode(t)
	p := pod("1")
	n.publish(p)
	first := n.stop
	cfg := n.cfg
	cfg.LockWait = 50 * time.Millisecond
	cfg.Host = n.host
	second, err := csi.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another agent of this node still runs after 50ms") {
		t.Errorf("%v", err)
	}
	if err := n.listening(p); err != nil {
		t.Errorf("the first was disturbed: %v", err)
	}
	go func() {
		for !strings.Contains(n.logs.String(), "waiting for its end") {
			time.Sleep(time.Millisecond)
		}
		_ = first()
	}()
	n.start() // waits
	if err := n.listening(p); err != nil {
		t.Error(err)
	}
}

// TestEndWhileWaiting: SIGTERM to the one that waits.
func TestEndWhileWaiting(t *testing.T) {
	n := newNode(t)
	cfg := n.cfg
	cfg.Host = n.host
	second, err := csi.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := second.Run(ctx); err != nil {
		t.Error(err)
	}
}

func TestStateDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := csi.New(csi.Config{KubeletDir: "/var/lib/kubelet", StateDir: dir, Node: "n", Audience: "a", Host: &host{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "must be its owner's alone") {
		t.Errorf("a directory that others can read: %v", err)
	}
}

// TestSocketsDeleted: whoever empties the kubelet's directories does not end us.
func TestSocketsDeleted(t *testing.T) {
	n := newNode(t)
	p := pod("1")
	n.publish(p)
	for _, socket := range []string{"plugins_registry/csi.castellan.dev-reg.sock", "plugins/csi.castellan.dev/csi.sock"} {
		path := filepath.Join(n.kubelet.Dir, socket)
		info, err := os.Lstat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", socket, info, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			_, err := os.Lstat(path)
			return err
		})
	}
	n.register() // as the kubelet does when it sees the file
	n.publish(p)
	if open, opened := n.host.count(); open != 1 || opened != 1 {
		t.Errorf("%d open, %d opened: pods must not notice", open, opened)
	}
}

// TestSocketsEndWithTheAgent: a kubelet finds no driver where there is none.
func TestSocketsEndWithTheAgent(t *testing.T) {
	n := newNode(t)
	n.publish(pod("1"))
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	for _, socket := range []string{
		filepath.Join(n.kubelet.Dir, "plugins_registry/csi.castellan.dev-reg.sock"), filepath.Join(n.kubelet.Dir, "plugins/csi.castellan.dev/csi.sock"),
		filepath.Join(n.kubelet.Target(pod("1")), "socket"),
	} {
		if err := gone(socket); err != nil {
			t.Error(err)
		}
	}
}

// TestSweep: a pod whose directory somebody removed loses its identity.
func TestSweep(t *testing.T) {
	n := newNode(t)
	p, q := pod("1"), pod("2")
	n.publish(p)
	n.publish(q)
	if err := os.RemoveAll(filepath.Join(n.kubelet.Dir, "pods", p.UID)); err != nil {
		t.Fatal(err)
	}
	n.driver.SweepOnce()
	if n.host.of(p) != nil || n.host.of(q) == nil || len(n.state()) != 1 {
		t.Errorf("records %v", n.state())
	}
}

// TestPeers: others than root get not a byte.
func TestPeers(t *testing.T) {
	n := newNode(t)
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	cfg := n.cfg
	cfg.Peers, cfg.Host = []uint32{uint32(os.Geteuid()) + 12345}, n.host
	d, err := csi.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	defer func() { cancel(); <-done }()
	socket := filepath.Join(n.kubelet.Dir, "plugins_registry/csi.castellan.dev-reg.sock")
	eventually(t, func() error {
		_, err := os.Lstat(socket)
		return err
	})
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := registerv1.NewRegistrationClient(conn).GetInfo(t.Context(), &registerv1.InfoRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
	if !strings.Contains(n.logs.String(), "reason=uid") {
		t.Error("not refused by uid")
	}
}

// TestRegistrationRefused is what the readiness goes by.
func TestRegistrationRefused(t *testing.T) {
	n := newNode(t)
	conn, err := grpc.NewClient("unix:"+filepath.Join(n.kubelet.Dir, "plugins_registry/csi.castellan.dev-reg.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := registerv1.NewRegistrationClient(conn).NotifyRegistrationStatus(t.Context(), &registerv1.RegistrationStatus{Error: "no"}); err != nil {
		t.Fatal(err)
	}
	if err := n.driver.Registered(); err == nil || err.Error() != "the kubelet refused the driver" {
		t.Error(err)
	}
	n.register()
	if err := n.driver.Registered(); err != nil {
		t.Error(err)
	}
}

func TestNewRefuses(t *testing.T) {
	good := csi.Config{KubeletDir: "/var/lib/kubelet", StateDir: "/run/castellan/agent", Node: "n", Audience: "castellan.dev", Host: &host{}}
	for name, change := range map[string]func(*csi.Config){
		"a relative directory":   func(c *csi.Config) { c.KubeletDir = "kubelet" },
		"a path with dots":       func(c *csi.Config) { c.KubeletDir = "/var/lib/../kubelet" },
		"a relative state":       func(c *csi.Config) { c.StateDir = "state" },
		"no node":                func(c *csi.Config) { c.Node = "" },
		"no audience":            func(c *csi.Config) { c.Audience = "" },
		"nobody who serves pods": func(c *csi.Config) { c.Host = nil },
	} {
		cfg := good
		change(&cfg)
		if d, err := csi.New(cfg); err == nil || d != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if d, err := csi.New(good); err != nil || d.Registered() == nil {
		t.Errorf("%v %v", d, err)
	}
}
