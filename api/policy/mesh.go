package policy

// Ways to normalise a request's path before it is judged and forwarded.
const (
	NormalizeNone                  = "NONE"
	NormalizeBase                  = "BASE"
	NormalizeMergeSlashes          = "MERGE_SLASHES"
	NormalizeDecodeAndMergeSlashes = "DECODE_AND_MERGE_SLASHES"
)

// Outbound policies: what a proxy does with destinations that are not in the mesh.
const (
	OutboundAllowAny     = "ALLOW_ANY"
	OutboundRegistryOnly = "REGISTRY_ONLY"
)

// Mesh holds the settings that every part of a mesh must agree on. They stand
// under `mesh:` in the server's configuration and travel to proxies with policy.
type Mesh struct {
	TrustDomain        string   `json:"trustDomain,omitempty"`
	TrustDomainAliases []string `json:"trustDomainAliases,omitempty"`
	// RootNamespace is where mesh-wide policies live; default "castellan-system".
	RootNamespace string `json:"rootNamespace,omitempty"`
	// PathNormalization is one of the Normalize constants; default BASE.
	PathNormalization string `json:"pathNormalization,omitempty"`
	// OutboundPolicy is one of the Outbound constants; default REGISTRY_ONLY off Kubernetes.
	OutboundPolicy string `json:"outboundPolicy,omitempty"`
	// NumTrustedProxies is how many addresses at the end of X-Forwarded-For were
	// written by proxies we trust; 0 takes the packet's source as remote.ip.
	NumTrustedProxies  int                 `json:"numTrustedProxies,omitempty"`
	ExtensionProviders []ExtensionProvider `json:"extensionProviders,omitempty"`
	JWKS               JWKSFetch           `json:"jwks,omitzero"`
}

// ExtensionProvider is an external authorizer that CUSTOM policies name.
type ExtensionProvider struct {
	Name string `json:"name"`
	// Address is the host:port of its envoy.service.auth.v3.Authorization service.
	Address string `json:"address"`
	// FailOpen lets requests pass while the provider is down; logged and counted.
	FailOpen bool `json:"failOpen,omitempty"`
	// Timeout is a Go duration; default "600ms".
	Timeout string `json:"timeout,omitempty"`
}

// JWKSFetch bounds where key sets may be fetched from.
type JWKSFetch struct {
	// Allow lists CIDRs, and "http", without which loopback, private addresses
	// and plain http are refused. Link-local and metadata addresses always are.
	Allow []string `json:"allow,omitempty"`
}
