package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"castellan.dev/ca"
	"castellan.dev/internal/config"
	"castellan.dev/internal/kube"
	"castellan.dev/internal/run"
)

const (
	// awaitFirst and awaitMost bound how long after a failure at start the API server
	// is asked again; awaitTell is how often that it is waited for is logged.
	awaitFirst = 250 * time.Millisecond
	awaitMost  = 5 * time.Second
	awaitTell  = 30 * time.Second
)

// kubernetes is what the server has of Kubernetes besides what it follows of the
// cluster.
type kubernetes struct {
	*cluster
	cfg   *config.Kubernetes
	blobs *kube.Blobs
	lease *kube.Lease
	// led are the parts that write to the cluster: one server at a time runs them.
	led []run.Part
}

// openCluster makes the clients and waits for the Secret, so that all that follows
// finds an API server that answers. It is no reason to end that none does yet: a
// restart would not bring it sooner.
func (p *program) openCluster(ctx context.Context) (err error) {
	if p.cfg.Kubernetes == nil {
		return nil
	}
	c := &kubernetes{cfg: p.cfg.Kubernetes}
	client, err := kube.Open(*c.cfg)
	if err != nil {
		return err
	}
	if c.cluster, err = followCluster(client, p.cfg.Mesh, p.log); err != nil {
		return err
	}
	c.blobs = kube.NewBlobs(c.client, kube.BlobsConfig{Name: c.cfg.CASecret, Documents: ca.BlobNames(), Log: p.log})
	if c.lease, err = kube.NewLease(c.client, kube.LeaseConfig{Name: c.cfg.Lease, Log: p.log, Registerer: p.registry}); err != nil {
		return err
	}
	if err := p.registry.Register(faultGauge("castellan_ca_secret_fault",
		"1 while the Secret of the authority's keys is missing or altered, and the server goes on with what is in its memory.", c.blobs.Err)); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	p.cluster = c
	p.parts = append(p.parts, append(c.parts(), c.blobs.Run)...)
	return p.await(ctx, "the authority's keys", func(ctx context.Context) error { return c.blobs.Load(ctx) })
}

// await tries again what fails because the API server is away or not set up yet.
func (p *program) await(ctx context.Context, what string, try func(context.Context) error) error {
	var told time.Time
	for wait := awaitFirst; ; wait = min(2*wait, awaitMost) {
		err := try(ctx)
		if err == nil || !kube.MayPass(err) || ctx.Err() != nil {
			if err == nil && !told.IsZero() {
				p.log.Info("the API server gave what was waited for", "what", what)
			}
			p.starting.tell("")
			return err
		}
		p.starting.tell(fmt.Sprintf("waiting for %s: %v", what, err))
		if now := time.Now(); now.Sub(told) >= awaitTell { //nolint:forbidigo // how often a line is logged
			p.log.Warn("waiting for the API server", "what", what, "error", err)
			told = now
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

// stage is how far the server's start has come, for readiness.
type stage struct {
	waiting atomic.Pointer[string]
	done    atomic.Bool
	ending  atomic.Bool
}

func (s *stage) tell(what string) { s.waiting.Store(&what) }

func (s *stage) check() error {
	switch what := s.waiting.Load(); {
	case s.ending.Load():
		return fmt.Errorf("the server is ending")
	case s.done.Load():
		return nil
	case what != nil && *what != "":
		return fmt.Errorf("%s", *what)
	}
	return fmt.Errorf("the server is starting")
}

func faultGauge(name, help string, fault func() error) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
		if fault() != nil {
			return 1
		}
		return 0
	})
}

// openLed adds what one server at a time keeps in the cluster. It comes last: the
// others of it are there by then, and what it tells of them is true.
func (p *program) openLed(context.Context) error {
	c := p.cluster
	if c == nil {
		return nil
	}
	statuses, err := c.statuses(p.discovery, p.registry, p.log)
	if err != nil {
		return err
	}
	c.led = append(c.led, statuses,
		kube.KeepBundle(c.client, kube.BundleConfig{Name: c.cfg.BundleConfigMap, Log: p.log, Roots: func() ([]byte, <-chan struct{}) {
			changed := p.authority.Changed()
			return p.authority.Bundle().RootsPEM(), changed
		}}),
		kube.KeepTaints(c.client, c.informers, kube.TaintConfig{Agents: p.agents, Off: !c.cfg.KeepNodesTainted, Log: p.log}))
	if p.webhook != nil {
		c.led = append(c.led, kube.KeepHooks(c.client, kube.HooksConfig{Ready: p.webhook.Ready, Log: p.log, Roots: func() ([]*x509.Certificate, <-chan struct{}) {
			changed := p.authority.Changed()
			return p.authority.Bundle().Roots, changed
		}}))
	}
	return nil
}
