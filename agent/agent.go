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
	workloads []*workloadServer
	deadlines deadlines
}

// workloadServer is one workload with its socket.
type workloadServer struct {
	cfg      config.AgentWorkload
	account  identity.Account
	source   *svid.Source
	view     *upstream.View
	reporter *upstream.Reporter
	socket   *socket
}

// New returns an Agent that opens nothing before Run.
func New(cfg Config) (*Agent, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	td, err := identity.ParseTrustDomain(cfg.Agent.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a := &Agent{cfg: cfg, metrics: newMetrics(cfg.Registerer), deadlines: defaultDeadlines()}
	target := cfg.Agent.Server
	a.client, err = caclient.New(caclient.Config{
		Address: target.Address, Name: target.Name, BundleFile: target.BundleFile,
		AgentToken: caclient.CredentialFile(cfg.Agent.TokenFile), Cluster: cfg.Agent.Cluster,
		TrustDomain: td, Log: cfg.Log, Now: cfg.Now,
	})
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a.rotator, err = svid.NewRotator(svid.Config{
		Issuer: a.client, TrustDomain: td, Metrics: svid.NewMetrics(cfg.Registerer), Log: cfg.Log, Now: cfg.Now,
	})
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(a.rotator.ExpiryCollector())
	}
	// The agent's own identity is whoever its token names.
	a.own = a.rotator.Add(svid.Identity{Token: caclient.CredentialFile(cfg.Agent.TokenFile)})
	a.follower, err = upstream.New(upstream.Config{
		Client: a.client, Own: a.own, Renew: func() { a.rotator.Renew(a.own) }, Reached: a.rotator.Retry,
		Trust: a.rotator, TrustDomain: td, Node: cfg.Agent.Node, Registerer: cfg.Registerer, Log: cfg.Log,
	})
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	for _, w := range cfg.Agent.Workloads {
		account, err := identity.NewAccount(w.Namespace, w.ServiceAccount)
		if err != nil {
			return nil, fmt.Errorf("agent: %w", err)
		}
		a.workloads = append(a.workloads, &workloadServer{
			cfg: w, account: account,
			source: a.rotator.Add(svid.Identity{Account: account, Token: caclient.CredentialFile(w.TokenFile)}),
		})
	}
	return a, nil
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
		if err := a.prepare(w, l); err != nil {
			return fmt.Errorf("agent: workload %q: %w", w.account, err)
		}
		parts = append(parts, w.run)
		a.cfg.Log.Info("socket open", "account", w.account.String(), "socket", w.cfg.Socket)
	}
	return run.All(ctx, parts...)
}

func (a *Agent) prepare(w *workloadServer, l *attest.Listener) error {
	w.view = a.follower.View()
	w.reporter = a.follower.Reports.Workload(w.source)
	var err error
	w.socket, err = newSocket(socketConfig{
		listener: l, source: w.source, jwts: a.rotator.JWTs(w.source, a.client),
		view: w.view, reporter: w.reporter, metrics: a.metrics,
		log: a.cfg.Log.With("account", w.account.String()), now: a.cfg.Now,
		deadlines: a.deadlines,
	})
	return err
}

// run serves one workload until ctx ends.
func (w *workloadServer) run(ctx context.Context) error {
	defer w.view.Close()
	defer w.reporter.Close()
	return run.All(ctx, w.follow, w.socket.run)
}

// follow carries changes of the workload's state to what is not a stream.
func (w *workloadServer) follow(ctx context.Context) error {
	for {
		state, changed := w.source.Current()
		w.view.SetPod(state.PodUID)
		w.reporter.Touch()
		w.socket.show(state.Status == svid.Valid)
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// Checks returns the readiness checks by name. The agent is ready when it has
// its own certificate, has heard the server, and every workload has what it can
// have: a certificate, or the server's refusal. What is valid keeps it ready
// when the server goes away.
func (a *Agent) Checks() map[string]func() error {
	return map[string]func() error{
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
		"workloads": func() error {
			for _, w := range a.workloads {
				state, _ := w.source.Current()
				if err := settled(state, true); err != nil {
					return fmt.Errorf("%s: %w", w.account, err)
				}
			}
			return nil
		},
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
