package config_test

import (
	"slices"
	"testing"

	"castellan.dev/internal/config"
)

const clusterServer = header + `ServerConfig
dataDir: /var/lib/castellan
kubernetes: {}
`

func TestKubernetes(t *testing.T) {
	runRows(t, clusterServer, map[string]row{
		"good":              {`{}`, ""},
		"verification":      {`{kubernetes: {verification: remote}}`, `kubernetes.verification: "remote", want local or tokenReview`},
		"an empty audience": {`{kubernetes: {audiences: [a, ""]}}`, `kubernetes.audiences[1]: is empty`},
		"namespace":         {`{kubernetes: {namespace: Castellan}}`, `kubernetes.namespace: "Castellan" is no name of an object`},
		"secret":            {`{kubernetes: {caSecret: a/b}}`, `kubernetes.caSecret: "a/b" is no name of an object`},
		"bundle":            {`{kubernetes: {bundleConfigMap: a/b}}`, `kubernetes.bundleConfigMap: "a/b" is no name of an object`},
		"lease":             {`{kubernetes: {lease: a/b}}`, `kubernetes.lease: "a/b" is no name of an object`},
		"policies elsewhere": {`{discovery: {policyDir: /p}}`,
			`kubernetes: with it pods and policies come from the API server; remove attestation.workloadsFile and discovery.policyDir`},
		"pods elsewhere": {`{attestation: {workloadsFile: /w}}`,
			`kubernetes: with it pods and policies come from the API server; remove attestation.workloadsFile and discovery.policyDir`},
		"another issuer, without keys": {`{attestation: {issuers: [{issuer: x}]}}`, `attestation.issuers[0]: set exactly one of jwksFile, jwksUri and oidc`},
	}, func() interface{ Validate() error } { return &config.Server{} })
}

// TestKubernetesDefaults: what names the server's place follows its namespace.
func TestKubernetesDefaults(t *testing.T) {
	var s config.Server
	if err := load(t, merge(t, clusterServer, `{kubernetes: {namespace: mesh}}`), &s); err != nil {
		t.Fatal(err)
	}
	k := s.Kubernetes
	if k.Namespace != "mesh" || k.Cluster != "Kubernetes" || k.Verification != config.VerifyLocally || k.CASecret != "castellan-ca" ||
		k.BundleConfigMap != "castellan-bundle" || k.Lease != "castellan-server" || !slices.Equal(k.Audiences, []string{"castellan.dev", "istio-ca"}) {
		t.Errorf("%+v", k)
	}
	if !slices.Equal(s.Attestation.AgentAccounts, []string{"mesh/castellan-agent"}) || s.ServingNames[0] != "castellan-server.mesh.svc" {
		t.Errorf("%v, %v", s.Attestation.AgentAccounts, s.ServingNames)
	}
}
