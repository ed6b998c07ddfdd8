package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
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
	"castellan.dev/internal/harden"
	"castellan.dev/internal/run"
	"castellan.dev/internal/telemetry"
	"castellan.dev/internal/workloads"
	"castellan.dev/webhook"
)

// program is everything the server consists of, in the order it is made.
type program struct {
	cfg         *config.Server
	log         *slog.Logger
	registry    *prometheus.Registry
	trustDomain spiffeid.TrustDomain
	agents      []identity.Account

	listeners listeners
	admin     *telemetry.Admin
	starting  stage
	cluster   *kubernetes // nil off Kubernetes
	ledger    *ledger.SQLite
	authority *ca.Authority
	workloads *workloads.Watcher
	issuers   []attest.Issuer
	discovery *discovery.Server
	source    *discovery.Directory
	issuing   *server.Server
	webhook   *webhook.Server

	// parts are run together; the first that ends ends all.
	parts []run.Part
}

// serve makes every part, then runs them until ctx ends. Health is served from the
// first: on Kubernetes the rest may have to wait for the API server, alive and not
// ready.
func serve(ctx context.Context, cfg *config.Server, stderr io.Writer) (err error) {
	p := &program{cfg: cfg, log: telemetry.NewLogger(stderr, cfg.Log), registry: telemetry.NewRegistry()}
	defer func() { err = errors.Join(err, p.close()) }()
	if _, err := harden.Memory(); err != nil {
		p.log.Warn("serving without a limit of memory", "error", err)
	}
	if err := p.prepare(ctx); err != nil {
		return err
	}
	p.openAdmin()
	// What the server answers goes on for a moment after it has been told to end.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, func() {
		p.starting.ending.Store(true)
		time.AfterFunc(p.lameDuck(), stop)
	})()
	err = run.All(serving, p.admin.Run, func(serving context.Context) error { return p.run(ctx, serving) })
	p.log.Info("server stopped")
	return err
}

// lameDuck is how long the server still answers after readiness has gone: whoever
// sends requests here must hear of that first. Off Kubernetes nobody asks.
func (p *program) lameDuck() time.Duration {
	if p.cluster == nil {
		return 0
	}
	return time.Second
}

// run opens what serves, in order, and runs it until serving ends; what is led ends
// with ctx, so that the next leader need not wait.
func (p *program) run(ctx, serving context.Context) error {
	for _, step := range []func(context.Context) error{
		p.openCluster, p.openAuthority, p.openAttestation, p.openDiscovery, p.openWebhook, p.openChecks, p.openGRPC, p.openLed,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	parts := slices.Concat(p.parts, []run.Part{tuneCollector})
	if c := p.cluster; c != nil {
		lead := c.lease.Lead(c.led...)
		parts = append(parts, func(serving context.Context) error { return leading(ctx, serving, lead) })
	}
	p.starting.done.Store(true)
	p.log.Info("server started", "trustDomain", p.trustDomain.Name(),
		"grpc", p.listeners.grpc.Addr().String(), "http", p.listeners.http.Addr().String(), "adminSocket", p.cfg.AdminSocket)
	return run.All(serving, parts...)
}

// leading runs a part until either context ends, and then waits for serving's end:
// that nothing is led any more ends nothing else.
func leading(ctx, serving context.Context, part run.Part) error {
	both, cancel := context.WithCancel(serving)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	if err := part(both); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	<-serving.Done()
	return serving.Err()
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
	cfg := ca.Config{
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
	}
	if p.cluster != nil {
		cfg.Keys, cfg.ChainOfVolume = p.cluster.blobs, true
	}
	if err := p.await(ctx, "the authority's keys", func(ctx context.Context) (err error) {
		p.authority, err = ca.Open(ctx, cfg)
		return err
	}); err != nil {
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

// fileAttestation has the workloads file answer for pods.
func (p *program) fileAttestation(cfg *attest.Config) (err error) {
	file := p.cfg.Attestation.WorkloadsFile
	if file == "" {
		return errors.New("attestation.workloadsFile: required; without it no pod is known, so nobody could be attested")
	}
	if p.workloads, err = workloads.NewWatcher(file, p.log); err != nil {
		return fmt.Errorf("attestation.workloadsFile: %w", err)
	}
	p.parts = append(p.parts, p.workloads.Run)
	cfg.Pods = attest.NewFilePods(p.workloads.Current)
	return nil
}

func (p *program) openAttestation(ctx context.Context) (err error) {
	a := p.cfg.Attestation
	issuers, runs, err := attest.OpenIssuers(a.Issuers, p.log, nil)
	if err != nil {
		return err
	}
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
	cfg := attest.Config{
		TrustDomain:         p.trustDomain,
		Issuers:             issuers,
		AgentAccounts:       p.agents,
		DirectCallers:       direct,
		TrustedNodeAccounts: nodes,
		ReservedNamespaces:  []string{p.cfg.Mesh.RootNamespace},
		Log:                 p.log,
	}
	if p.cluster != nil {
		err = p.attestation(ctx, &cfg)
	} else {
		err = p.fileAttestation(&cfg)
	}
	if err != nil {
		return err
	}
	p.issuers = cfg.Issuers
	attestor, err := attest.New(cfg)
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
