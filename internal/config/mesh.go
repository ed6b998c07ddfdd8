package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"castellan.dev/api/policy"
	"castellan.dev/identity"
)

// maxTrustedProxies is what the proxy looks at of X-Forwarded-For.
const maxTrustedProxies = 64

// CheckMesh fills the defaults of mesh settings and validates them. Errors name
// the field within the settings.
func CheckMesh(m *policy.Mesh) error {
	setDefault(&m.TrustDomain, "cluster.local")
	setDefault(&m.RootNamespace, "castellan-system")
	setDefault(&m.PathNormalization, policy.NormalizeBase)
	setDefault(&m.OutboundPolicy, policy.OutboundRegistryOnly)
	if _, err := identity.ParseTrustDomain(m.TrustDomain); err != nil {
		return fmt.Errorf("trustDomain: %w", err)
	}
	for i, a := range m.TrustDomainAliases {
		if _, err := identity.ParseTrustDomain(a); err != nil {
			return fmt.Errorf("trustDomainAliases[%d]: %w", i, err)
		}
	}
	// Any valid account name will do to check the namespace.
	if _, err := identity.NewAccount(m.RootNamespace, "default"); err != nil {
		return fmt.Errorf("rootNamespace: %w", err)
	}
	switch m.PathNormalization {
	case policy.NormalizeNone, policy.NormalizeBase, policy.NormalizeMergeSlashes, policy.NormalizeDecodeAndMergeSlashes:
	default:
		return fmt.Errorf("pathNormalization: %q, want %s, %s, %s or %s", m.PathNormalization,
			policy.NormalizeNone, policy.NormalizeBase, policy.NormalizeMergeSlashes, policy.NormalizeDecodeAndMergeSlashes)
	}
	switch m.OutboundPolicy {
	case policy.OutboundAllowAny, policy.OutboundRegistryOnly:
	default:
		return fmt.Errorf("outboundPolicy: %q, want %s or %s", m.OutboundPolicy, policy.OutboundRegistryOnly, policy.OutboundAllowAny)
	}
	if m.NumTrustedProxies < 0 || m.NumTrustedProxies > maxTrustedProxies {
		return fmt.Errorf("numTrustedProxies: %d, want 0 to %d", m.NumTrustedProxies, maxTrustedProxies)
	}
	if err := checkProviders(m.ExtensionProviders); err != nil {
		return err
	}
	for i, a := range m.JWKS.Allow {
		if _, err := netip.ParsePrefix(a); err != nil && a != "http" {
			return fmt.Errorf(`jwks.allow[%d]: %q, want an address range such as "10.0.0.0/8", or "http"`, i, a)
		}
	}
	return nil
}

func checkProviders(providers []policy.ExtensionProvider) error {
	seen := map[string]bool{}
	for i, p := range providers {
		field := fmt.Sprintf("extensionProviders[%d]", i)
		switch {
		case p.Name == "":
			return fmt.Errorf("%s.name: required", field)
		case seen[p.Name]:
			return fmt.Errorf("%s.name: %q is listed twice", field, p.Name)
		}
		seen[p.Name] = true
		if _, _, err := net.SplitHostPort(p.Address); err != nil && p.Address != "" {
			return fmt.Errorf("%s.address: %w", field, err)
		}
		if p.Timeout == "" {
			continue
		}
		d, err := time.ParseDuration(p.Timeout)
		if err == nil && d <= 0 {
			err = errors.New("not a positive duration")
		}
		if err != nil {
			return fmt.Errorf("%s.timeout: %w", field, err)
		}
	}
	return nil
}
