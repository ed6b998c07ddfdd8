// Package cluster brings up a real Kubernetes cluster on this machine for tests: etcd,
// a control plane, CoreDNS, and nodes with containerd, a kubelet and kube-proxy each,
// in network namespaces without a route out.
//
// All of it lives in one PID namespace and ends with its first process. A cluster that
// a test started ends with the test's process, whatever becomes of that; one that was
// told to stay ends with Stop. Several clusters may run at a time, by name.
//
// It assumes root, and Linux with overlayfs, bridges and nftables.
package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/certs-test/cluster/internal/layout"
)

// DefaultName is the cluster of `make cluster-up`.
const DefaultName = "castellan"

// root holds the folders of all clusters. It may not be below /run, /var/lib or
// /var/log, of which each node has its own; and it is short, for the paths of sockets.
const root = "/var/cache/castellan/cluster"

// Config says what to start.
type Config struct {
	// Name tells clusters on this machine apart; DefaultName if empty.
	Name string
	// Nodes are the names of the nodes; node-1 and node-2 if empty.
	Nodes []string
	// Log takes what is said while starting; nothing if nil.
	Log io.Writer
	// FeatureGates are those of the API server, the controller manager and the
	// kubelets; RuntimeConfig is the API server's.
	FeatureGates  map[string]bool
	RuntimeConfig map[string]string
}

var nameForm = regexp.MustCompile(`^[a-z][a-z0-9-]{0,20}$`)

func (c *Config) fill() error {
	if c.Name == "" {
		c.Name = DefaultName
	}
	if len(c.Nodes) == 0 {
		c.Nodes = []string{"node-1", "node-2"}
	}
	if c.Log == nil {
		c.Log = io.Discard
	}
	if !nameForm.MatchString(c.Name) {
		return fmt.Errorf("cluster: name %q: want a short lower-case label", c.Name)
	}
	seen := map[string]bool{"lo": true, "br0": true} // nodes name interfaces beside these
	for _, name := range c.Nodes {
		if !nameForm.MatchString(name) || len(name) >= unix.IFNAMSIZ || seen[name] {
			return fmt.Errorf("cluster: node %q: want different lower-case labels of at most %d letters", name, unix.IFNAMSIZ-1)
		}
		seen[name] = true
	}
	return nil
}

// Cluster is a running cluster.
type Cluster struct {
	state    state
	lifeline *os.File // closing it ends the cluster, unless it was detached
}

// Start builds what is missing, starts a cluster and returns when its nodes are
// Ready. The cluster ends with this process unless Detach is called.
func Start(ctx context.Context, config Config) (*Cluster, error) {
	if err := config.fill(); err != nil {
		return nil, err
	}
	began := time.Now()
	if os.Getuid() != 0 {
		return nil, errors.New("cluster: namespaces and containers need root")
	}
	unlock, err := lock(config.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := Attach(config.Name); err == nil {
		return nil, fmt.Errorf("cluster: %q runs already; stop it first (make cluster-down)", config.Name)
	}
	if err := clean(config.Name); err != nil {
		return nil, fmt.Errorf("cluster: what an earlier %q left: %w", config.Name, err)
	}
	opts, err := prepare(ctx, config)
	if err != nil {
		return nil, err
	}
	c, err := launch(ctx, opts)
	if err == nil {
		fmt.Fprintf(config.Log, "cluster %q: the nodes %s are Ready after %.1fs\n", config.Name, strings.Join(config.Nodes, ", "), time.Since(began).Seconds())
	}
	return c, err
}

// prepare makes the cluster's folder with all that the daemon needs.
func prepare(ctx context.Context, config Config) (layout.Options, error) {
	opts := layout.Options{
		Name:          config.Name,
		Dir:           dir(config.Name),
		Nodes:         config.Nodes,
		FeatureGates:  config.FeatureGates,
		RuntimeConfig: config.RuntimeConfig,
	}
	for _, path := range []string{opts.Path("logs"), opts.Path("bin")} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return opts, err
		}
	}
	// Where these are modules, nobody else may have loaded them; where they are built
	// in, there is nothing to load.
	_ = exec.CommandContext(ctx, "modprobe", "-a", "br_netfilter", "overlay").Run()
	source, err := output(ctx, "", config.Log, "go", "list", "-m", "-f", "{{.Dir}}", "castellan.dev/certs-test/cluster")
	if err != nil {
		return opts, err
	}
	parts, err := output(ctx, "", config.Log, filepath.Join(source, "..", "tools", "parts"), "kube", "etcd", "coredns")
	if err != nil {
		return opts, err
	}
	dirs := strings.Fields(parts)
	if len(dirs) != 3 {
		return opts, fmt.Errorf("cluster: certs-test/tools/parts said %q", parts)
	}
	opts.Kube, opts.Etcd, opts.CoreDNS = dirs[0], dirs[1], dirs[2]
	if _, err := output(ctx, source, config.Log, "go", "build", "-o", opts.Path("bin")+"/", "./cmd/cluster", "./cmd/pause"); err != nil {
		return opts, err
	}
	return opts, packPause(opts)
}

func packPause(opts layout.Options) error {
	f, err := os.Create(opts.Path("pause.tar"))
	if err != nil {
		return err
	}
	return errors.Join(WriteImage(f, Image{
		Name:       layout.PauseImage,
		Files:      map[string]string{"/pause": opts.Path("bin", "pause")},
		Entrypoint: []string{"/pause"},
	}), f.Close())
}

// output runs a program, static Go if it builds, and returns what it printed.
func output(ctx context.Context, dir string, log io.Writer, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = log
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("cluster: %s: %w", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// launch starts the daemon and waits for its report.
func launch(ctx context.Context, opts layout.Options) (*Cluster, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	opts.LoopbackPort = listener.Addr().(*net.TCPAddr).Port
	options, err := json.Marshal(opts)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(opts.Path("options.json"), options, 0o600); err != nil {
		return nil, err
	}
	first, err := spawn(opts, listener.(*net.TCPListener))
	if err != nil {
		return nil, err
	}
	c := &Cluster{lifeline: first.lifeline, state: state{Options: opts, process: first.process}}
	if c.state.Holders, err = first.wait(ctx); err == nil {
		err = c.state.write()
	}
	if err != nil {
		first.lifeline.Close()
		err = errors.Join(err, c.state.kill(context.WithoutCancel(ctx)), cleanCgroups(opts.Name))
		return nil, fmt.Errorf("cluster: %w (logs are in %s until the next start)", err, opts.Path("logs"))
	}
	return c, nil
}

// spawned is the first process of a cluster that is starting.
type spawned struct {
	process
	lifeline, report *os.File
}

// wait returns what the daemon reports.
func (s *spawned) wait(ctx context.Context) (holders map[string]int, err error) {
	defer s.report.Close()
	defer context.AfterFunc(ctx, func() { s.report.Close() })()
	var ready layout.Ready
	err = json.NewDecoder(s.report).Decode(&ready)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("the daemon gave up: %w", err)
	case ready.Error != "":
		return nil, errors.New(ready.Error)
	}
	return ready.Holders, nil
}

// spawn starts the first process of a cluster in new namespaces. The daemon inherits
// the listener, the reading end of the lifeline and the writing end of the report,
// and nothing else: a reader of our standard output must not wait for it.
func spawn(opts layout.Options, listener *net.TCPListener) (*spawned, error) {
	outside, err := listener.File()
	if err != nil {
		return nil, err
	}
	defer outside.Close()
	daemonLife, lifeline, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer daemonLife.Close()
	report, daemonReport, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer daemonReport.Close()
	log, err := os.Create(opts.Path("logs", "daemon.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// Descriptors that our own parent left open would pass to the daemon.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, err
	}
	cmd := exec.Command(opts.Path("bin", "cluster"), "init", opts.Dir)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{outside, daemonLife, daemonReport}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		Setsid:     true,
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cluster: new namespaces: %w", err)
	}
	first, err := identify(cmd.Process.Pid) // before anybody waits for it: the number is its own
	go func() { _ = cmd.Wait() }()
	return &spawned{process: first, lifeline: lifeline, report: report}, err
}

// Attach finds the running cluster of that name.
func Attach(name string) (*Cluster, error) {
	s, err := readState(name)
	if err != nil {
		return nil, fmt.Errorf("cluster: %q is not running: %w", name, err)
	}
	return &Cluster{state: s}, nil
}

// Detach lets the cluster outlive this process.
func (c *Cluster) Detach() error {
	if c.lifeline == nil {
		return nil
	}
	_, err := c.lifeline.Write([]byte("s"))
	return err
}

// Stop ends the cluster and removes all that there was of it.
func (c *Cluster) Stop(ctx context.Context) error {
	unlock, err := lock(c.state.Options.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.state.kill(ctx); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	if c.lifeline != nil {
		c.lifeline.Close()
	}
	return clean(c.state.Options.Name)
}

// Down ends the cluster of that name, if it runs, and removes what there is of it.
func Down(ctx context.Context, name string) error {
	if c, err := Attach(name); err == nil {
		return c.Stop(ctx)
	}
	unlock, err := lock(name)
	if err != nil {
		return err
	}
	defer unlock()
	return clean(name)
}

// Kubeconfig is the path of an administrator's configuration that works outside the
// cluster's namespaces.
func (c *Cluster) Kubeconfig() string { return c.state.Options.Path("kubeconfig") }

// Kubectl is the path of a kubectl of the cluster's version.
func (c *Cluster) Kubectl() string { return filepath.Join(c.state.Options.Kube, "kubectl") }

// Logs is the folder with a log of each program, and audit.log: a line of JSON for
// each request that a pod made to the API server.
func (c *Cluster) Logs() string { return c.state.Options.Path("logs") }

// Server is the API server's address outside the cluster's namespaces.
func (c *Cluster) Server() string {
	return "https://127.0.0.1:" + strconv.Itoa(c.state.Options.LoopbackPort)
}
