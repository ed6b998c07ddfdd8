package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca/ledger"
	"castellan.dev/discovery"
)

func (p *program) openDiscovery(context.Context) (err error) {
	cfg := discovery.Config{
		Mesh:        p.cfg.Mesh,
		TrustDomain: p.trustDomain,
		Bundle:      p.bundle,
		LastGoodDir: filepath.Join(p.cfg.DataDir, "policy"),
		Agents:      p.agents,
		NodeOf:      p.nodeOf,
		Log:         p.log,
		Registerer:  p.registry,
	}
	if p.cluster != nil {
		cfg.Workloads, cfg.Source = p.cluster.inventory, p.cluster.source
	} else {
		cfg.Workloads = p.workloads
	}
	if dir := p.cfg.Discovery.PolicyDir; dir != "" {
		p.source, err = discovery.NewDirectory(discovery.DirectoryConfig{Path: dir, Mesh: p.cfg.Mesh, Log: p.log})
		if err != nil {
			return fmt.Errorf("discovery.policyDir: %w", err)
		}
		cfg.Source = p.source
		p.parts = append(p.parts, p.source.Run)
	}
	if p.discovery, err = discovery.New(cfg); err != nil {
		return err
	}
	p.parts = append(p.parts, p.discovery.Run)
	return nil
}

// bundle is the authority's bundle as a resource.
func (p *program) bundle() (*castellanv1.Bundle, <-chan struct{}) {
	changed := p.authority.Changed()
	b := p.authority.Bundle()
	if b == nil {
		return nil, changed
	}
	return &castellanv1.Bundle{
		TrustDomain:        b.TrustDomain.Name(),
		X509Authorities:    b.RootsDER(),
		JwtAuthorities:     b.MarshalJWTAuthorities(),
		Sequence:           b.Sequence,
		RefreshHintSeconds: int64(b.RefreshHint.Seconds()),
	}, changed
}

// nodeOf tells by the ledger which node an agent's certificate was issued to:
// the node that its token proved then.
func (p *program) nodeOf(ctx context.Context, serial string) (string, error) {
	entry, err := p.ledger.BySerial(ctx, serial)
	if errors.Is(err, ledger.ErrNotFound) {
		return "", fmt.Errorf("serial %s: %w", serial, discovery.ErrUnknownNode)
	}
	if err != nil {
		return "", err
	}
	if entry.Node == "" {
		return "", fmt.Errorf("serial %s was issued to no node: %w", serial, discovery.ErrUnknownNode)
	}
	return entry.Node, nil
}
