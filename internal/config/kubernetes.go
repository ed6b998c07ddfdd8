package config

import (
	"errors"
	"fmt"

	"castellan.dev/identity"
)

// Ways a workload's token is verified on Kubernetes.
const (
	// VerifyLocally checks signatures with the API server's published keys and asks
	// the informers for the pod: no call to the API server for each certificate.
	VerifyLocally = "local"
	// VerifyByTokenReview asks the API server about each token.
	VerifyByTokenReview = "tokenReview"
)

// Kubernetes makes an API server the source of pods, services, policies and
// token keys, and the keeper of the authority's keys.
type Kubernetes struct {
	// Kubeconfig is a file; empty: the server's own service account.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	// Namespace is where the server runs and keeps its objects; default castellan-system.
	Namespace string `json:"namespace,omitempty"`
	// Cluster is what callers name in the clusterid metadata; default "Kubernetes".
	Cluster string `json:"cluster,omitempty"`
	// Audiences of workload tokens; default castellan.dev, istio-ca.
	Audiences []string `json:"audiences,omitempty"`
	// Verification is "local" (default) or "tokenReview".
	Verification string `json:"verification,omitempty"`
	// CASecret keeps the authority's keys; default castellan-ca.
	CASecret string `json:"caSecret,omitempty"`
	// BundleConfigMap is where the roots are published as PEM, under "bundle.pem";
	// default castellan-bundle.
	BundleConfigMap string `json:"bundleConfigMap,omitempty"`
	// Lease elects the one replica that writes to the cluster; default castellan-server.
	Lease string `json:"lease,omitempty"`
	// KeepNodesTainted: a node without a ready agent keeps pods away.
	KeepNodesTainted bool `json:"keepNodesTainted,omitempty"`
}

func (k *Kubernetes) setDefaults() {
	setDefault(&k.Namespace, "castellan-system")
	setDefault(&k.Cluster, "Kubernetes")
	setDefault(&k.Verification, VerifyLocally)
	setDefault(&k.CASecret, "castellan-ca")
	setDefault(&k.BundleConfigMap, "castellan-bundle")
	setDefault(&k.Lease, "castellan-server")
	if len(k.Audiences) == 0 {
		k.Audiences = []string{"castellan.dev", "istio-ca"}
	}
}

func (k *Kubernetes) validate() error {
	if k.Verification != VerifyLocally && k.Verification != VerifyByTokenReview {
		return fmt.Errorf("kubernetes.verification: %q, want %s or %s", k.Verification, VerifyLocally, VerifyByTokenReview)
	}
	for i, a := range k.Audiences {
		if a == "" {
			return fmt.Errorf("kubernetes.audiences[%d]: is empty", i)
		}
	}
	for _, f := range []struct{ field, value string }{
		{"namespace", k.Namespace}, {"caSecret", k.CASecret}, {"bundleConfigMap", k.BundleConfigMap}, {"lease", k.Lease},
	} {
		// An object's name follows the rules of an account's.
		if _, err := identity.NewAccount("default", f.value); err != nil {
			return fmt.Errorf("kubernetes.%s: %q is no name of an object", f.field, f.value)
		}
	}
	return nil
}

// checkSources: what is and who exists has one source.
func (s *Server) checkSources() error {
	if s.Kubernetes == nil {
		return nil
	}
	if s.Attestation.WorkloadsFile != "" || s.Discovery.PolicyDir != "" {
		return errors.New("kubernetes: with it pods and policies come from the API server; remove attestation.workloadsFile and discovery.policyDir")
	}
	return s.Kubernetes.validate()
}
