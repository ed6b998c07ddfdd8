package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca"
	"castellan.dev/ca/attest"
	"castellan.dev/ca/ledger"
	"castellan.dev/ca/server"
	"castellan.dev/discovery"
	"castellan.dev/identity"
	"castellan.dev/internal/config"
	"castellan.dev/internal/run"
	"castellan.dev/internal/telemetry"
	"castellan.dev/internal/workloads"
)

// program is everything the server consists of, in the order it is made.
type program struct {
	cfg         *config.Server
	log         *slog.Logger
	registry    *prometheus.Registry
	trustDomain spiffeid.TrustDomain
	agents      []identity.Account

	listeners listeners
	ledger    *ledger.SQLite
	authority *ca.Authority
	workloads *workloads.Watcher
	issuers   []attest.Issuer
	discovery *discovery.Server
	source    *discovery.Directory
	issuing   *server.Server

	// parts are run together; the first that ends ends all.
	parts []run.Part
}

// serve makes every part, then runs them until ctx ends.
func serve(ctx context.Context, cfg *config.Server, stderr io.Writer) (err error) {
	p := &program{cfg: cfg, log: telemetry.NewLogger(stderr, cfg.Log), registry: telemetry.NewRegistry()}
	defer func() { err = errors.Join(err, p.close()) }()
	for _, step := range []func(context.Context) error{
		p.prepare, p.openAuthority, p.openAttestation, p.openDiscovery, p.openAdmin, p.openGRPC,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	p.log.Info("server started", "trustDomain", p.trustDomain.Name(),
		"grpc", p.listeners.grpc.Addr().String(), "http", p.listeners.http.Addr().String(), "adminSocket", cfg.AdminSocket)
	err = run.All(ctx, append(p.parts, tuneCollector)...)
	p.log.Info("server stopped")
	return err
}

// prepare reads names and opens the listeners.
func (p *program) prepare(context.Context) (err error) {
	if p.trustDomain, err = identity.ParseTrustDomain(p.cfg.Mesh.TrustDomain); err != nil {
		return err
	}
	if p.agents, err = accounts(p.cfg.Attestation.AgentAccounts); err != nil {
		return err
	}
	if err := os.MkdirAll(p.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("dataDir: %w", err)
	}
	p.listeners, err = listen(p.cfg)
	return err
}

func accounts(names []string) ([]identity.Account, error) {
	var list []identity.Account
	for _, n := range names {
		a, err := identity.ParseAccount(n)
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, nil
}

func (p *program) openAuthority(ctx context.Context) (err error) {
	if p.ledger, err = ledger.Open(ctx, ledger.Config{Path: filepath.Join(p.cfg.DataDir, "ledger.db"), Log: p.log}); err != nil {
		return err
	}
	c := p.cfg.CA
	names, ips := p.cfg.ServingHosts()
	p.authority, err = ca.Open(ctx, ca.Config{
		TrustDomain:              p.trustDomain,
		DataDir:                  p.cfg.DataDir,
		ChainDir:                 c.ChainDir,
		AllowUnconstrainedIssuer: c.AllowUnconstrainedIssuer,
		PermittedURI:             c.PermittedURI,
		LeafTTL:                  time.Duration(c.LeafTTL),
		MaxLeafTTL:               time.Duration(c.MaxLeafTTL),
		IntermediateTTL:          time.Duration(c.IntermediateTTL),
		RootTTL:                  time.Duration(c.RootTTL),
		Backdate:                 time.Duration(c.Backdate),
		JWTTTL:                   time.Duration(c.JWTTTL),
		JWTIssuer:                c.JWTIssuer,
		ServingNames:             names,
		ServingIPs:               ips,
		Ledger:                   p.ledger,
		Log:                      p.log,
		Registerer:               p.registry,
	})
	if err != nil {
		return err
	}
	p.parts = append(p.parts, p.authority.Run)
	if p.cfg.BundleFile == "" {
		return nil
	}
	if err := ca.WriteBundleFile(p.cfg.BundleFile, p.authority.Bundle()); err != nil {
		return fmt.Errorf("bundleFile: %w", err)
	}
	p.parts = append(p.parts, p.publishBundle)
	return nil
}

// publishBundle rewrites the bundle file when the bundle changes. That it fails
// later on does not stop the server: the old roots stay trusted by those who read it.
func (p *program) publishBundle(ctx context.Context) error {
	for {
		changed := p.authority.Changed()
		retry := time.Duration(1<<63 - 1)
		if err := ca.WriteBundleFile(p.cfg.BundleFile, p.authority.Bundle()); err != nil {
			p.log.Error("bundle file could not be written", "path", p.cfg.BundleFile, "error", err)
			retry = time.Minute
		}
		timer := time.NewTimer(retry)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (p *program) openAttestation(context.Context) (err error) {
	a := p.cfg.Attestation
	if a.WorkloadsFile == "" {
		return errors.New("attestation.workloadsFile: required; without it no pod is known, so nobody could be attested")
	}
	if p.workloads, err = workloads.NewWatcher(a.WorkloadsFile, p.log); err != nil {
		return fmt.Errorf("attestation.workloadsFile: %w", err)
	}
	p.parts = append(p.parts, p.workloads.Run)
	issuers, runs, err := attest.OpenIssuers(a.Issuers, p.log, nil)
	if err != nil {
		return err
	}
	p.issuers = issuers
	for _, r := range runs {
		p.parts = append(p.parts, r)
	}
	direct, err := accounts(a.DirectCallers)
	if err != nil {
		return err
	}
	nodes, err := accounts(a.TrustedNodeAccounts)
	if err != nil {
		return err
	}
	attestor, err := attest.New(attest.Config{
		TrustDomain:         p.trustDomain,
		Issuers:             issuers,
		Pods:                attest.NewFilePods(p.workloads.Current),
		AgentAccounts:       p.agents,
		DirectCallers:       direct,
		TrustedNodeAccounts: nodes,
		ReservedNamespaces:  []string{p.cfg.Mesh.RootNamespace},
		Log:                 p.log,
	})
	if err != nil {
		return err
	}
	r := p.cfg.RateLimit
	p.issuing, err = server.New(server.Config{
		Attestor:  attestor,
		Issuer:    p.authority.Issuer(),
		JWTIssuer: p.authority.JWTIssuer(),
		Limits: server.Limits{
			PodBurst: r.PodBurst, PodPerSecond: r.PodPerSecond,
			TotalBurst: r.TotalBurst, TotalPerSecond: r.TotalPerSecond,
		},
		Log:        p.log,
		Registerer: p.registry,
	})
	return err
}

// close releases what outlives the parts, in the order opposite to opening.
func (p *program) close() error {
	p.listeners.close()
	var errs []error
	if p.authority != nil {
		errs = append(errs, p.authority.Close())
	}
	if p.ledger != nil {
		errs = append(errs, p.ledger.Close())
	}
	return errors.Join(errs...)
}
