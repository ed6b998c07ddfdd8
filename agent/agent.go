// Package agent is the node's agent: it keeps the identities of the node's
// workloads and serves each of them, on a socket of its own, what is that
// workload's: certificate and key, trust bundles, policy.
//
// It refuses to start when a socket is in use or cannot be made, and serves
// nobody whom the socket does not admit. Once it runs, no failure of the server
// takes away what is still valid. It assumes that whoever writes the token files
// decides who a workload is.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"castellan.dev/agent/attest"
	"castellan.dev/agent/caclient"
	"castellan.dev/agent/csi"
	"castellan.dev/agent/svid"
	"castellan.dev/agent/upstream"
	"castellan.dev/identity"
	"castellan.dev/internal/config"
	"castellan.dev/internal/run"
)

// Config sets up an Agent.
type Config struct {
	// Agent must have been validated.
	Agent config.Agent
	Log   *slog.Logger
	// Registerer takes castellan_agent_*; nil keeps them to themselves.
	Registerer prometheus.Registerer
	Now        func() time.Time
}

// Agent serves the workloads of one node.
type Agent struct {
	cfg       Config
	client    *caclient.Client
	rotator   *svid.Rotator
	own       *svid.Source
	follower  *upstream.Follower
	metrics   *metrics
	room      *room
	workloads []*static
	mounts    *mounts     // nil off Kubernetes
	driver    *csi.Driver // nil off Kubernetes
	deadlines deadlines
}

// static is a workload of the configuration, with its socket.
type static struct {
	*workloadServer
	cfg config.AgentWorkload
}

// New returns an Agent that opens nothing before Run.
func New(cfg Config) (*Agent, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	a := &Agent{cfg: cfg, metrics: newMetrics(cfg.Registerer), deadlines: defaultDeadlines()}
	a.room = newRoom(a.metrics.refused)
	for _, make := range []func() error{a.makeIdentities, a.makeWorkloads, a.makeDriver} {
		if err := make(); err != nil {
			return nil, fmt.Errorf("agent: %w", err)
		}
	}
	return a, nil
}

// makeIdentities makes what asks the server: for certificates, and for policy.
func (a *Agent) makeIdentities() error {
	cfg := a.cfg
	td, err := identity.ParseTrustDomain(cfg.Agent.TrustDomain)
	if err != nil {
		return err
	}
	target, token := cfg.Agent.Server, caclient.CredentialFile(cfg.Agent.TokenFile)
	a.client, err = caclient.New(caclient.Config{
		Address: target.Address, Fallback: target.Fallback, Name: target.Name, BundleFile: target.BundleFile,
		AgentToken: token, Cluster: cfg.Agent.Cluster,
		TrustDomain: td, Log: cfg.Log, Now: cfg.Now,
	})
	if err != nil {
		return err
	}
	a.rotator, err = svid.NewRotator(svid.Config{
		Issuer: a.client, TrustDomain: td, Metrics: svid.NewMetrics(cfg.Registerer), Log: cfg.Log, Now: cfg.Now,
	})
	if err != nil {
		return err
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(a.rotator.ExpiryCollector())
	}
	// The agent's own identity is whoever its token names.
	a.own = a.rotator.Add(svid.Identity{Token: token})
	a.follower, err = upstream.New(upstream.Config{
		Client: a.client, Own: a.own, Renew: func() { a.rotator.Renew(a.own) }, Reached: a.rotator.Retry,
		Trust: a.rotator, TrustDomain: td, Node: cfg.Agent.Node, Registerer: cfg.Registerer, Log: cfg.Log,
	})
	return err
}

// makeWorkloads makes those of the configuration.
func (a *Agent) makeWorkloads() error {
	for _, w := range a.cfg.Agent.Workloads {
		account, err := identity.NewAccount(w.Namespace, w.ServiceAccount)
		if err != nil {
			return err
		}
		a.workloads = append(a.workloads, &static{
			cfg: w, workloadServer: a.newWorkload(svid.Identity{Account: account, Token: caclient.CredentialFile(w.TokenFile)}),
		})
	}
	return nil
}

// makeDriver makes the kubelet's side, on Kubernetes.
func (a *Agent) makeDriver() error {
	cfg := a.cfg.Agent.CSI
	if cfg == nil {
		return nil
	}
	a.mounts = newMounts(a)
	var err error
	a.driver, err = csi.New(csi.Config{
		KubeletDir: cfg.KubeletDir, StateDir: cfg.StateDir, Node: a.cfg.Agent.Node, Audience: cfg.Audience,
		Host: a.mounts, Peers: operators(), Log: a.cfg.Log, Registerer: a.cfg.Registerer,
	})
	return err
}

// Run opens every socket and serves until ctx ends. A socket that cannot be
// opened ends it at once, with those that were opened removed again.
func (a *Agent) Run(ctx context.Context) error {
	defer func() { _ = a.client.Close() }() // calls are over
	var listeners []*attest.Listener
	defer func() {
		for _, l := range listeners {
			_ = l.Close() // closed already where the socket has served
		}
	}()
	parts := []run.Part{a.rotator.Run, a.follower.Run}
	for _, w := range a.workloads {
		l, err := attest.Listen(attest.UnixConfig{
			Path: w.cfg.Socket, UIDs: w.cfg.UIDs, Refused: a.metrics.refused, Log: a.cfg.Log,
		})
		if err != nil {
			return fmt.Errorf("agent: workload %q: %w", w.account, err)
		}
		listeners = append(listeners, l)
		s, err := a.open(w.workloadServer, l)
		if err != nil {
			return fmt.Errorf("agent: workload %q: %w", w.account, err)
		}
		parts = append(parts, func(ctx context.Context) error {
			defer w.close()
			return run.All(ctx, w.follow, s.run)
		})
		a.cfg.Log.Info("socket open", "account", w.account.String(), "socket", w.cfg.Socket)
	}
	if a.driver != nil {
		parts = append(parts, a.driver.Run)
	}
	if a.cfg.Agent.AdminSocket != "" {
		parts = append(parts, a.serveAdmin)
	}
	return run.All(ctx, parts...)
}

// Checks returns the readiness checks by name. The agent is ready when it has its
// own certificate, has heard the server, and, on Kubernetes, is known to the
// kubelet; off Kubernetes when besides every workload has what it can have: a
// certificate, or the server's refusal. What is valid keeps it ready when the
// server goes away.
func (a *Agent) Checks() map[string]func() error {
	checks := map[string]func() error{
		"identity": func() error {
			own, _ := a.own.Current()
			return settled(own, false)
		},
		"discovery": func() error {
			if !a.follower.Synced() {
				return errors.New("nothing received from the server yet")
			}
			return nil
		},
	}
	if a.driver != nil {
		checks["kubelet"] = a.driver.Registered
	} else {
		checks["workloads"] = a.settled
	}
	return checks
}

// Notices returns what is shown beside the checks. On Kubernetes a workload without
// a certificate is one: an agent that is not ready taints its node, and one pod must
// not do that to the others.
func (a *Agent) Notices() map[string]func() error {
	if a.driver == nil {
		return nil
	}
	return map[string]func() error{"workloads": a.settled}
}

// settled returns the first workload that lacks what it could have.
func (a *Agent) settled() error {
	var first error
	a.each(func(w *workloadServer, _, _ string) {
		state, _ := w.source.Current()
		if err := settled(state, true); err != nil && first == nil {
			first = fmt.Errorf("%s: %w", w.account, err)
		}
	})
	return first
}

// each visits every workload there is now, with the pod's name and UID where they
// are known.
func (a *Agent) each(visit func(w *workloadServer, podName, podUID string)) {
	for _, w := range a.workloads {
		state, _ := w.source.Current()
		visit(w.workloadServer, "", state.PodUID)
	}
	if a.mounts != nil {
		a.mounts.each(func(p *pod) { visit(p.workloadServer, p.name, p.uid) })
	}
}

// settled reports what is missing. Its texts are constant but for the kind of
// failure: the cause is in the log.
func settled(s *svid.Snapshot, refusedIsFine bool) error {
	switch {
	case s.Status == svid.Valid, s.Status == svid.Refused && refusedIsFine:
		return nil
	case s.Problem != nil:
		return fmt.Errorf("certificate %s, last attempt: %s", s.Status, caclient.KindOf(s.Problem))
	default:
		return fmt.Errorf("certificate %s", s.Status)
	}
}
