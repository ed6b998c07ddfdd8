package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"castellan.dev/internal/config"
)

const server = `apiVersion: castellan.dev/v1alpha1
kind: ServerConfig
dataDir: /var/lib/castellan
ca: {leafTTL: 30m}
attestation:
  issuers:
  - {issuer: "https://x.test", jwksFile: /keys.json}
mesh:
  trustDomain: cluster.local
`

func TestLoadServer(t *testing.T) {
	swap := func(old, new string) string { return strings.Replace(server, old, new, 1) }
	tests := map[string]struct{ text, want string }{
		"good":                    {server, ""},
		"document marker first":   {"# ours\n---\n" + server, ""},
		"unknown field":           {server + "colour: red\n", `unknown field "colour"`},
		"unknown field, deep":     {swap("jwksFile", "jwks_file"), `unknown field "attestation.issuers[0].jwks_file"`},
		"field in another case":   {swap("leafTTL", "leafTtl"), `unknown field "ca.leafTtl"`},
		"same field in two cases": {swap("dataDir: /var/lib/castellan", "dataDir: /a\ndatadir: /b"), `unknown field "datadir"`},
		"same field twice":        {swap("dataDir: /var/lib/castellan", "dataDir: /a\ndataDir: /b"), "already set in map"},
		"two documents":           {server + "---\n" + server, "more than one YAML document"},
		"wrong kind":              {swap("ServerConfig", "AgentConfig"), `kind: "AgentConfig", want "ServerConfig"`},
		"wrong type":              {swap("30m", "30"), `a duration is a string such as "90s"`},
		"half-written":            {server[:strings.Index(server, "/keys")], "yaml"},
		"no issuers":              {swap("issuers:\n  - {issuer: \"https://x.test\", jwksFile: /keys.json}", "issuers: []"), "attestation.issuers: at least one"},
		"leaf outlives issuer":    {swap("{leafTTL: 30m}", "{leafTTL: 12h, intermediateTTL: 13h}"), "ca.intermediateTTL: 13h0m0s must be at least twice"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "server.yaml")
			if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			var cfg config.Server
			err := config.Load(path, &cfg)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "server.yaml") {
					t.Fatalf("error %v, want %q", err, tt.want)
				}
				return
			}
			if err != nil || time.Duration(cfg.CA.LeafTTL) != 30*time.Minute || cfg.Mesh.TrustDomain != "cluster.local" {
				t.Fatalf("%+v, %v", cfg, err)
			}
		})
	}
}
