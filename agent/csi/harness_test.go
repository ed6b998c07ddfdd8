package csi_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/attest"
	"castellan.dev/agent/caclient"
	"castellan.dev/agent/csi"
	"castellan.dev/agent/csi/csitest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host keeps what is served, on real sockets that say nothing.
type host struct {
	mu     sync.Mutex
	open   map[string]*endpoint // by volume ID
	opened []csi.Volume
	fail   error
}

type endpoint struct {
	*attest.Listener
	host   *host
	volume csi.Volume
	tokens []caclient.Credential
	dead   bool
}

func (h *host) Open(v csi.Volume, dir *os.File) (csi.Endpoint, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fail != nil {
		return nil, h.fail
	}
	l, err := attest.ListenMount(attest.MountConfig{Dir: dir, Name: v.ID})
	if err != nil {
		return nil, err
	}
	e := &endpoint{Listener: l, host: h, volume: v}
	if h.open[v.ID] != nil {
		return nil, errors.New("opened twice")
	}
	h.open[v.ID] = e
	h.opened = append(h.opened, v)
	return e, nil
}

func (e *endpoint) Renew(c caclient.Credential) {
	e.host.mu.Lock()
	defer e.host.mu.Unlock()
	e.tokens = append(e.tokens, c)
}

func (e *endpoint) Alive() bool {
	e.host.mu.Lock()
	defer e.host.mu.Unlock()
	return !e.dead && !e.Lost()
}

func (e *endpoint) Close() {
	e.host.mu.Lock()
	defer e.host.mu.Unlock()
	e.Listener.Close()
	delete(e.host.open, e.volume.ID)
}

// of returns what is served of a pod, nil if nothing is.
func (h *host) of(p csitest.Pod) *endpoint {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.open[p.VolumeID()]
}

func (h *host) count() (open, opened int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.open), len(h.opened)
}

// logs keeps what was logged.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// node is one node with its kubelet, and a driver at a time.
type node struct {
	t       *testing.T
	kubelet *csitest.Kubelet
	cfg     csi.Config
	host    *host
	logs    *logs
	driver  *csi.Driver
	stop    func() error
}

func newNode(t *testing.T, change ...func(*csi.Config)) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "k") // short: the kubelet connects by the path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	kubelet := filepath.Join(dir, "kubelet")
	if err := os.MkdirAll(filepath.Join(kubelet, "plugins_registry"), 0o750); err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, kubelet: &csitest.Kubelet{Dir: kubelet}, logs: &logs{}}
	n.cfg = csi.Config{
		KubeletDir: kubelet, StateDir: filepath.Join(dir, "run", "agent"), Node: "local", Audience: "castellan.dev",
		Peers: []uint32{uint32(os.Geteuid())},
		Log:   slog.New(slog.NewTextHandler(n.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, c := range change {
		c(&n.cfg)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.logs.String())
		}
	})
	n.start()
	return n
}

// start starts a driver, with nothing in its memory, and registers it.
func (n *node) start() {
	n.t.Helper()
	n.host = &host{open: map[string]*endpoint{}}
	cfg := n.cfg
	cfg.Host, cfg.Registerer = n.host, prometheus.NewRegistry()
	var err error
	if n.driver, err = csi.New(cfg); err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	driver := n.driver
	go func() { done <- driver.Run(ctx) }()
	n.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	stop := n.stop
	n.t.Cleanup(func() {
		if err := stop(); err != nil {
			n.t.Errorf("driver: %v", err)
		}
	})
	n.register()
}

func (n *node) register() {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 20*time.Second)
	defer cancel()
	if err := n.kubelet.Register(ctx); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) restart() {
	n.t.Helper()
	if err := n.stop(); err != nil {
		n.t.Fatal(err)
	}
	n.start()
}

const account = "shop/orders"

func pod(name string) csitest.Pod {
	return csitest.Pod{Namespace: "shop", ServiceAccount: "orders", Name: "orders-0", UID: "uid-" + name}
}

func token(p csitest.Pod) string { return agenttest.Token(p.Namespace+"/"+p.ServiceAccount, p.UID) }

func (n *node) publish(p csitest.Pod) {
	n.t.Helper()
	if err := n.kubelet.Publish(n.t.Context(), p, token(p)); err != nil {
		n.t.Fatal(err)
	}
}

// state lists the records that are kept.
func (n *node) state() []string {
	n.t.Helper()
	found, err := filepath.Glob(filepath.Join(n.cfg.StateDir, "*.json"))
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

// listening reports whether the pod's socket takes connections.
func (n *node) listening(p csitest.Pod) error {
	c, err := n.kubelet.Dial(n.t.Context(), p)
	if err != nil {
		return err
	}
	return c.Close()
}

func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func gone(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is still there", path)
	}
	return nil
}
