package main

import (
	"context"
	"errors"
	"fmt"

	"castellan.dev/ca/attest"
	"castellan.dev/identity"
	"castellan.dev/internal/config"
	"castellan.dev/internal/kube"
)

// attestation adds to cfg what the cluster knows of pods and of tokens.
func (p *program) attestation(ctx context.Context, cfg *attest.Config) error {
	c := p.cluster
	pods, err := kube.NewPods(c.informers, c.client, nil, p.registry)
	if err != nil {
		return err
	}
	cfg.Pods, cfg.AgentsAreListed = clusterPods{pods}, true
	cfg.ReservedNamespaces = append(cfg.ReservedNamespaces, c.cfg.Namespace)
	if c.cfg.Verification == config.VerifyByTokenReview {
		cfg.Reviewer, cfg.ReviewAudiences, cfg.ReviewCluster = clusterReviewer{kube.NewReviewer(c.client)}, c.cfg.Audiences, c.cfg.Cluster
		return nil
	}
	var name string
	if err := p.await(ctx, "the name that the API server issues tokens under", func(ctx context.Context) (err error) {
		name, err = kube.FindIssuer(ctx, c.client)
		return err
	}); err != nil {
		return err
	}
	keys, err := kube.IssuerKeys(c.client, name, p.log, nil)
	if err != nil {
		return err
	}
	p.log.Info("tokens of the cluster are verified here", "issuer", name, "audiences", c.cfg.Audiences)
	p.parts = append(p.parts, keys.Run)
	cfg.Issuers = append(cfg.Issuers, attest.Issuer{Name: name, Audiences: c.cfg.Audiences, Cluster: c.cfg.Cluster, Keys: keys})
	return nil
}

// clusterPods gives attestation the cluster's pods.
type clusterPods struct{ pods *kube.Pods }

// Pod implements attest.Pods.
func (c clusterPods) Pod(ctx context.Context, ref attest.PodRef) (attest.Pod, error) {
	pod, err := c.pods.Pod(ctx, kube.PodRef(ref))
	switch {
	case errors.Is(err, kube.ErrNoPod):
		err = fmt.Errorf("%w: %w", attest.ErrNotFound, err)
	case errors.Is(err, kube.ErrNoAccount):
		err = fmt.Errorf("%w: %w", attest.ErrNoAccount, err)
	}
	return attest.Pod(pod), err
}

// OnNode implements attest.Pods.
func (c clusterPods) OnNode(ctx context.Context, node string, account identity.Account) ([]attest.Pod, error) {
	list, err := c.pods.OnNode(ctx, node, account)
	pods := make([]attest.Pod, 0, len(list))
	for _, pod := range list {
		pods = append(pods, attest.Pod(pod))
	}
	return pods, err
}

// clusterReviewer gives attestation the API server's reviews.
type clusterReviewer struct{ reviewer *kube.Reviewer }

// Review implements attest.Reviewer.
func (c clusterReviewer) Review(ctx context.Context, token string, audiences []string) (attest.Review, error) {
	answer, err := c.reviewer.Review(ctx, token, audiences)
	if errors.Is(err, kube.ErrTokenRefused) {
		err = fmt.Errorf("%w: %w", attest.ErrTokenRefused, err)
	}
	return attest.Review(answer), err
}
