package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"castellan.dev/internal/telemetry"
)

// openAdmin makes the plain HTTP side: health, metrics, and the public keys of
// JWT-SVIDs for relying parties (OpenID Connect Discovery 3 and 4).
func (p *program) openAdmin(context.Context) error {
	admin := telemetry.NewAdmin(p.listeners.http, p.registry, p.log)
	admin.AddCheck("ledger", p.ledger.Healthy)
	admin.AddCheck("authority", p.authority.Ready)
	admin.AddCheck("discovery", p.discovery.Ready)
	admin.AddCheck("tokenIssuers", p.issuersReady)
	// Its last good version is in force: taking the server away would do more harm.
	admin.AddNotice("workloadsFile", p.workloads.Err)
	refused := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "castellan_workloads_file_refused",
		Help: "1 while the workloads file as it is now is refused and its last good version is in force.",
	}, func() float64 {
		if p.workloads.Err() != nil {
			return 1
		}
		return 0
	})
	if err := p.registry.Register(refused); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	admin.Handle("GET /keys", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "max-age=60")
		_, _ = w.Write(p.authority.Bundle().MarshalJWTAuthorities())
	}))
	if issuer := p.cfg.CA.JWTIssuer; issuer != "" {
		doc, err := oidcDocument(issuer)
		if err != nil {
			return err
		}
		admin.Handle("GET /.well-known/openid-configuration", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write(doc)
		}))
	}
	p.parts = append(p.parts, admin.Run)
	return nil
}

func oidcDocument(issuer string) ([]byte, error) {
	return json.Marshal(map[string]any{
		"issuer":                                issuer,
		"jwks_uri":                              strings.TrimSuffix(issuer, "/") + "/keys",
		"authorization_endpoint":                "",
		"response_types_supported":              []string{"id_token"},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": []string{"ES256"},
	})
}

// issuersReady fails until every issuer's keys have been had once.
func (p *program) issuersReady() error {
	for _, i := range p.issuers {
		if _, err := i.Keys.Keys(); err != nil {
			return fmt.Errorf("no keys of issuer %q yet: %w", i.Name, err)
		}
	}
	return nil
}
