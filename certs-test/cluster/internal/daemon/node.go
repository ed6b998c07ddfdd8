package daemon

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"castellan.dev/certs-test/cluster/internal/layout"
)

// node is a node's namespaces: a network of its own, and a view of the file system
// in which /run, /var/lib and /var/log are its own, so that all programs and pods
// have their usual paths on every node.
type node struct {
	layout.Node
	pid int // of the holder
}

// newNode starts the holder of a node's namespaces.
func newNode(opts layout.Options, addresses layout.Node) (*node, error) {
	for _, dir := range []string{"lib", "log"} {
		if err := os.MkdirAll(opts.Path(addresses.Name, dir), 0o755); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command("/proc/self/exe", "hold", opts.Path(addresses.Name))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("namespaces of %s: %w", addresses.Name, err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		return nil, fmt.Errorf("namespaces of %s: holder did not come up", addresses.Name)
	}
	return &node{Node: addresses, pid: cmd.Process.Pid}, nil
}

// inside is the command line that runs args in the node's namespaces. It is nsenter
// and not `ip netns exec`, which would make one more mount namespace each time, and
// then containerd would not see what the kubelet mounts.
func (n *node) inside(args ...string) []string {
	pid := strconv.Itoa(n.pid)
	return append([]string{"nsenter", "--net=/proc/" + pid + "/ns/net", "--mount=/proc/" + pid + "/ns/mnt", "--"}, args...)
}

// path is a path of the node's view, seen from outside.
func (n *node) path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(n.pid), "root", path)
}

// Hold sets up the namespaces that it was started in as a node's, with the node's
// own folders from dir, says so on standard output, and then only waits.
func Hold(dir string) error {
	if err := holdMounts(dir); err != nil {
		return err
	}
	for path, value := range map[string]string{
		"net/ipv4/ip_forward":                 "1",
		"net/ipv6/conf/all/forwarding":        "1",
		"net/bridge/bridge-nf-call-iptables":  "1", // else an answer between two pods of a node skips the translation back
		"net/bridge/bridge-nf-call-ip6tables": "1",
	} {
		if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	fmt.Println("ready")
	for {
		if err := unix.Pause(); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func holdMounts(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts private: %w", err)
	}
	for source, target := range map[string]string{"lib": "/var/lib", "log": "/var/log"} {
		if err := unix.Mount(filepath.Join(dir, source), target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	// CSI volumes reach their pods by propagation.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("mounts shared: %w", err)
	}
	return nil
}

// makeCgroup makes a cgroup in every hierarchy that the kernel has.
func makeCgroup(path string) error {
	const root = "/sys/fs/cgroup"
	hierarchies := []string{root}
	if _, err := os.Stat(root + "/cgroup.controllers"); err != nil {
		entries, err := os.ReadDir(root)
		if err != nil {
			return err
		}
		hierarchies = nil
		for _, e := range entries {
			if e.IsDir() {
				hierarchies = append(hierarchies, filepath.Join(root, e.Name()))
			}
		}
	}
	for _, h := range hierarchies {
		at := h
		for elem := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
			parent := at
			at = filepath.Join(at, elem)
			if err := os.Mkdir(at, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			inherit(parent, at)
		}
	}
	return nil
}

// inherit gives a new cgroup what it does not get from its parent by itself: the
// processors it may use (version 1), its controllers (version 2). Either is missing
// where it does not apply.
func inherit(parent, child string) {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		if value, err := os.ReadFile(filepath.Join(parent, file)); err == nil {
			_ = os.WriteFile(filepath.Join(child, file), value, 0)
		}
	}
	if controllers, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers")); err == nil {
		for c := range strings.FieldsSeq(string(controllers)) {
			_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+c), 0)
		}
	}
}
