package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"castellan.dev/certs-test/cluster/internal/layout"
)

// Node is one node of a cluster.
type Node struct {
	Name   string
	IP, V6 string // its addresses on the bridge
	// NetNS is a path of the node's network namespace. Root is the node's view of the
	// file system: Root + "/var/lib/kubelet" is the kubelet's folder.
	NetNS, Root string
	mountNS     string
	pidNS       string
}

// Node finds a node by name.
func (c *Cluster) Node(name string) (*Node, error) {
	i := slices.Index(c.state.Options.Nodes, name)
	if i < 0 {
		return nil, fmt.Errorf("cluster: there is no node %q", name)
	}
	addresses := layout.NodeAt(i, name)
	first := filepath.Join("/proc", strconv.Itoa(c.state.PID))
	// The holder's number is that of the cluster's PID namespace, whose /proc is the
	// one mounted where the cluster's first process looks.
	holder := filepath.Join(first, "root/proc", strconv.Itoa(c.state.Holders[name]))
	return &Node{
		Name: name, IP: addresses.IP4, V6: addresses.IP6,
		NetNS:   filepath.Join(holder, "ns/net"),
		Root:    filepath.Join(holder, "root"),
		mountNS: filepath.Join(holder, "ns/mnt"),
		pidNS:   filepath.Join(first, "ns/pid"),
	}, nil
}

// Nodes are the names of the nodes.
func (c *Cluster) Nodes() []string { return slices.Clone(c.state.Options.Nodes) }

// Command is a program that will run on the node: in its network, with its files, and
// among the cluster's processes, so that it ends with the cluster at the latest. Its
// path is one of the node's view, in which only /run, /var/lib and /var/log differ.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := []string{"--net=" + n.NetNS, "--mount=" + n.mountNS, "--pid=" + n.pidNS, "--", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	// nsenter only waits for the program: both are in a group, which is ended.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// LoadImage imports an image's tarball into every node.
func (c *Cluster) LoadImage(ctx context.Context, tar string) error {
	names := c.Nodes()
	errs := make([]error, len(names))
	var all sync.WaitGroup
	for i, name := range names {
		all.Go(func() { errs[i] = c.loadInto(ctx, name, tar) })
	}
	all.Wait()
	return errors.Join(errs...)
}

func (c *Cluster) loadInto(ctx context.Context, name, tar string) error {
	n, err := c.Node(name)
	if err != nil {
		return err
	}
	f, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := n.Command(ctx, "ctr", "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cluster: load %s into %s: %w: %s", tar, name, err, out)
	}
	return nil
}

// The programs of the control plane, for KillProcess and StartProcess.
const (
	Etcd              = "etcd"
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
	DNS               = "coredns"
)

// Kubelet is the name of a node's kubelet, Containerd and KubeProxy those of its
// others.
func Kubelet(node string) string { return node + "-kubelet" }

// Containerd is a node's container runtime.
func Containerd(node string) string { return node + "-containerd" }

// KubeProxy is what programs a node's service addresses.
func KubeProxy(node string) string { return node + "-kube-proxy" }

// KillProcess ends one of the cluster's programs with SIGKILL; it stays down until
// StartProcess. (One that ends otherwise is started again by itself.)
func (c *Cluster) KillProcess(ctx context.Context, name string) error {
	return c.control(ctx, "kill", name)
}

// StartProcess starts a program that was killed and returns when it answers.
func (c *Cluster) StartProcess(ctx context.Context, name string) error {
	return c.control(ctx, "start", name)
}

func (c *Cluster) control(ctx context.Context, verb, name string) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.state.Options.Path("control.sock"))
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://cluster/"+verb+"/"+name, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return fmt.Errorf("cluster: %s %s: %w", verb, name, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var text bytes.Buffer
		_, _ = text.ReadFrom(resp.Body)
		return fmt.Errorf("cluster: %s %s: %s", verb, name, bytes.TrimSpace(text.Bytes()))
	}
	return nil
}
