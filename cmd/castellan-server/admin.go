package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"castellan.dev/ca/server"
	"castellan.dev/internal/telemetry"
)

// openAdmin makes the plain HTTP side: health and metrics, and what openChecks adds
// once it is there. The server's own liveness hangs on nobody else, the API server
// least of all: ending would not bring it back.
func (p *program) openAdmin() {
	p.admin = telemetry.NewAdmin(p.listeners.http, p.registry, p.log)
	p.admin.AddCheck("started", p.starting.check)
	p.admin.Handle("GET /keys", http.HandlerFunc(p.serveKeys))
	if p.cfg.CA.JWTIssuer != "" {
		p.admin.Handle("GET /.well-known/openid-configuration", http.HandlerFunc(p.serveDiscovery))
	}
}

// serveKeys and serveDiscovery publish the keys of JWT-SVIDs for relying parties
// (OpenID Connect Discovery 3 and 4).
func (p *program) serveKeys(w http.ResponseWriter, _ *http.Request) {
	if !p.starting.done.Load() {
		http.Error(w, "starting", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "max-age=60")
	_, _ = w.Write(p.authority.Bundle().MarshalJWTAuthorities())
}

func (p *program) serveDiscovery(w http.ResponseWriter, _ *http.Request) {
	doc, err := oidcDocument(p.cfg.CA.JWTIssuer)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(doc)
}

// openChecks adds what the parts say of themselves.
func (p *program) openChecks(context.Context) error {
	p.admin.AddCheck("ledger", p.ledger.Healthy)
	p.admin.AddCheck("authority", p.authority.Ready)
	p.admin.AddCheck("discovery", p.discovery.Ready)
	p.admin.AddCheck("tokenIssuers", p.issuersReady)
	if c := p.cluster; c != nil {
		c.checks(p.admin)
		// With the keys in memory the server signs on: see kube.Blobs.
		p.admin.AddNotice("authorityKeys", c.blobs.Err)
		return nil
	}
	// Its last good version is in force: taking the server away would do more harm.
	p.admin.AddNotice("workloadsFile", p.workloads.Err)
	if err := p.registry.Register(faultGauge("castellan_workloads_file_refused",
		"1 while the workloads file as it is now is refused and its last good version is in force.", p.workloads.Err)); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}

// problems are what the operator is told of by name.
func (p *program) problems() []server.Problem {
	list := []server.Problem{
		{Name: "ledger", Check: p.ledger.Healthy},
		{Name: "authority", Check: p.authority.Ready},
		{Name: "token issuers", Check: p.issuersReady},
	}
	if c := p.cluster; c != nil {
		return append(list, server.Problem{Name: "authority's keys", Check: c.blobs.Err}, server.Problem{Name: "API server", Check: c.heard})
	}
	return append([]server.Problem{{Name: "workloads file", Check: p.workloads.Err}}, list...)
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
