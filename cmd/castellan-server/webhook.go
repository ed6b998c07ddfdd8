package main

import (
	"context"

	"castellan.dev/webhook"
)

// openWebhook serves admission where it is configured.
func (p *program) openWebhook(context.Context) error {
	if p.cfg.Webhook == nil {
		return nil
	}
	injector, err := webhook.NewInjector(p.cfg.Webhook.Inject, p.cluster.cfg.Namespace)
	if err != nil {
		return err
	}
	p.webhook, err = webhook.New(webhook.Config{
		Listener:       p.listeners.webhook,
		GetCertificate: p.authority.ServingCertificate(),
		Injector:       injector,
		Mesh:           p.cfg.Mesh,
		Workloads:      p.cluster.inventory,
		Namespaces:     p.cluster.informers,
		Log:            p.log,
		Registerer:     p.registry,
	})
	if err != nil {
		return err
	}
	p.parts = append(p.parts, p.webhook.Run)
	p.admin.AddCheck("webhook", p.webhook.Ready)
	return nil
}
