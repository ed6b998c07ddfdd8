package attest

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"time"

	"castellan.dev/internal/config"
	"castellan.dev/internal/jws"
)

// OpenIssuers makes issuers of configuration, with what keeps their keys fresh:
// run every one of the returned functions. A file of keys must be readable now; a
// server of keys need not be.
func OpenIssuers(list []config.TokenIssuer, log *slog.Logger, now func() time.Time) ([]Issuer, []func(context.Context) error, error) {
	var issuers []Issuer
	var runs []func(context.Context) error
	for i, t := range list {
		issuer := Issuer{Name: t.Issuer, Audiences: t.Audiences, Cluster: t.Cluster}
		if t.JWKSFile != "" {
			f, err := jws.NewFile(t.JWKSFile, log, now)
			if err != nil {
				return nil, nil, fmt.Errorf("attestation.issuers[%d].jwksFile: %w", i, err)
			}
			issuer.Keys, runs = f, append(runs, f.Run)
		} else {
			r, err := remote(t, log, now)
			if err != nil {
				return nil, nil, fmt.Errorf("attestation.issuers[%d]: %w", i, err)
			}
			issuer.Keys, runs = r, append(runs, r.Run)
		}
		issuers = append(issuers, issuer)
	}
	return issuers, runs, nil
}

// remote opens a server of keys. Its URL is the operator's own, not a policy
// author's: the guard lets loopback and private addresses through (an API server
// has no other), while metadata addresses stay blocked and plain http is a switch.
func remote(t config.TokenIssuer, log *slog.Logger, now func() time.Time) (*jws.Remote, error) {
	cfg := jws.RemoteConfig{Source: "jwks:" + t.JWKSURI, Allow: []string{"0.0.0.0/0", "::/0"}, Log: log, Now: now}
	if t.OIDC {
		cfg.Source = "oidc:" + t.Issuer
	}
	if t.InsecureAllowHTTP {
		cfg.Allow = append(cfg.Allow, "http")
	}
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err != nil {
			return nil, fmt.Errorf("caFile: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("caFile: %s holds no certificate as PEM", t.CAFile)
		}
	}
	return jws.NewRemote(cfg)
}
