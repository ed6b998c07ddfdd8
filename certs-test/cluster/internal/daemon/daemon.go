// Package daemon is the process that a test cluster lives in.
//
// It runs in namespaces of its own for processes, mounts and the network. All the
// cluster's programs and containers are its descendants in that PID namespace, so
// that when the first process of it ends, however it ends, the kernel ends them all
// and everything they had mounted or connected.
package daemon

import (
	"context"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/certs-test/cluster/internal/layout"
)

// patience is how long anything may take to come up: far more than it does.
const patience = 90 * time.Second

type daemon struct {
	opts  layout.Options
	parts *parts
	api   *api
	nodes []*node
}

// Descriptors that the launcher hands over.
const (
	listenerFD = 3 + iota // a listener outside the namespaces
	lifelineFD            // says "stay" when the cluster is to outlive the launcher, or ends
	reportFD              // takes one layout.Ready
)

// Run starts the cluster in dir and keeps it until the process is killed, or until
// the launcher ends without having said that the cluster is to stay.
func Run(dir string) error {
	if err := unix.CloseRange(listenerFD, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return err
	}
	data, err := os.ReadFile(dir + "/options.json")
	if err != nil {
		return err
	}
	d := &daemon{}
	if err := json.Unmarshal(data, &d.opts); err != nil {
		return err
	}
	outside, err := net.FileListener(os.NewFile(listenerFD, "listener"))
	if err != nil {
		return err
	}
	lost := make(chan error, 1)
	go lifeline(os.NewFile(lifelineFD, "lifeline"), lost)
	report := os.NewFile(reportFD, "report")

	go func() {
		ready := layout.Ready{}
		if err := d.start(outside); err != nil {
			ready.Error = err.Error()
		} else {
			ready.Holders = map[string]int{}
			for _, n := range d.nodes {
				ready.Holders[n.Name] = n.pid
			}
		}
		_ = json.NewEncoder(report).Encode(ready)
		report.Close()
		if ready.Error != "" {
			lost <- errors.New(ready.Error)
		}
	}()
	return <-lost
}

// lifeline reports the loss of a launcher that did not detach.
func lifeline(pipe *os.File, lost chan<- error) {
	if n, _ := pipe.Read(make([]byte, 1)); n == 0 {
		lost <- errors.New("the launcher ended")
	}
}

func (d *daemon) etc(elem ...string) string {
	return d.opts.Path(append([]string{"etc"}, elem...)...)
}

func (d *daemon) start(outside net.Listener) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for i, name := range d.opts.Nodes {
		n, err := newNode(d.opts, layout.NodeAt(i, name))
		if err != nil {
			return err
		}
		d.nodes = append(d.nodes, n)
		if err := makeCgroup(d.opts.Cgroup() + "/" + name); err != nil {
			return err
		}
	}
	if err := connect(d.nodes); err != nil {
		return err
	}
	if err := d.files(); err != nil {
		return err
	}
	if err := os.MkdirAll(d.opts.Path("logs"), 0o755); err != nil {
		return err
	}
	d.parts = newParts(d.opts.Path("logs"))
	go forward(outside, hostPort(layout.Control4, layout.APIPort))
	if err := d.serve(); err != nil {
		return err
	}
	if err := d.programs(ctx); err != nil {
		return err
	}
	go d.reclaimVolumes(context.Background())
	return nil
}

// programs starts everything: the API server and the nodes' container runtimes
// first, then what works with them.
func (d *daemon) programs(ctx context.Context) error {
	first := []func() error{func() error {
		return errors.Join(d.parts.add(ctx, d.etcd()), d.parts.add(ctx, d.apiServer()))
	}}
	for _, n := range d.nodes {
		first = append(first, func() error { return d.runtime(ctx, n) })
	}
	if err := together(first...); err != nil {
		return err
	}
	then := []func() error{func() error { return d.createVolumes(ctx) }}
	add := func(p part) { then = append(then, func() error { return d.parts.add(ctx, p) }) }
	for _, n := range d.nodes {
		add(d.kubelet(n))
		add(d.proxy(n))
	}
	add(d.controllerManager())
	add(d.scheduler())
	add(d.dns())
	if err := together(then...); err != nil {
		return err
	}
	return poll(ctx, d.usable)
}

// together does all at the same time.
func together(do ...func() error) error {
	errs := make([]error, len(do))
	var all sync.WaitGroup
	for i, f := range do {
		all.Go(func() { errs[i] = f() })
	}
	all.Wait()
	return errors.Join(errs...)
}

// files writes keys, certificates and configurations.
func (d *daemon) files() error {
	if err := os.MkdirAll(d.etc(), 0o755); err != nil {
		return err
	}
	ca, err := newAuthority(d.etc())
	if err != nil {
		return err
	}
	err = errors.Join(
		writeSigner(d.etc()),
		ca.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"},
			"127.0.0.1", "localhost", layout.Control4, layout.Control6, layout.Kube4,
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"),
		ca.issue("kubelet-client", pkix.Name{CommonName: "kube-apiserver", Organization: []string{"system:masters"}}),
	)
	accounts := []account{newAccount("admin", "system:masters")}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		accounts = append(accounts, newAccount("system:"+name, ""))
		err = errors.Join(err, kubeconfig(d.etc(name+".conf"), server, d.etc("ca.crt"), accounts[len(accounts)-1].token))
	}
	for _, n := range d.nodes {
		node := newAccount("system:node:"+n.Name, "system:nodes")
		accounts = append(accounts, node)
		err = errors.Join(err,
			kubeconfig(d.etc(n.Name+".conf"), server, d.etc("ca.crt"), node.token),
			ca.issue(n.Name, pkix.Name{CommonName: n.Name}, n.Name, n.IP4, n.IP6))
	}
	err = errors.Join(err,
		writeTokens(d.etc("tokens.csv"), accounts),
		os.WriteFile(d.etc("audit.yaml"), []byte(auditPolicy), 0o644),
		kubeconfig(d.etc("admin.conf"), server, d.etc("ca.crt"), accounts[0].token),
		kubeconfig(d.opts.Path("kubeconfig"), "https://"+hostPort("127.0.0.1", d.opts.LoopbackPort), d.etc("ca.crt"), accounts[0].token),
		os.WriteFile(d.etc("Corefile"), fmt.Appendf(nil, corefile, layout.Control4, layout.Control6, d.etc("admin.conf")), 0o644),
	)
	if err != nil {
		return err
	}
	d.api, err = newAPI(d.etc("ca.crt"), accounts[0].token)
	return err
}

// usable says nil once all nodes are Ready and a pod may be created.
func (d *daemon) usable(ctx context.Context) error {
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct{ Taints []struct{ Key string } }
			Status   struct {
				Conditions []struct{ Type, Status string }
			}
		}
	}
	if err := d.api.get(ctx, "/api/v1/nodes", &list); err != nil {
		return err
	}
	if len(list.Items) != len(d.nodes) {
		return fmt.Errorf("%d of %d nodes are registered", len(list.Items), len(d.nodes))
	}
	for _, n := range list.Items {
		ready := len(n.Spec.Taints) == 0
		for _, c := range n.Status.Conditions {
			ready = ready && (c.Type != "Ready" || c.Status == "True")
		}
		if !ready {
			return fmt.Errorf("%s is not ready", n.Metadata.Name)
		}
	}
	return errors.Join(
		d.api.get(ctx, "/api/v1/namespaces/default/serviceaccounts/default", nil),
		d.api.get(ctx, "/api/v1/namespaces/default/configmaps/kube-root-ca.crt", nil),
	)
}
