// Package policy holds plain structs of the security.istio.io/v1 documents and
// of the mesh settings they are read with, in the same JSON as users have. It
// holds no logic and refuses nothing: authz decodes, validates and compiles.
package policy

import "time"

// Kinds of document.
const (
	KindAuthorization         = "AuthorizationPolicy"
	KindRequestAuthentication = "RequestAuthentication"
	KindPeerAuthentication    = "PeerAuthentication"

	Group = "security.istio.io"
)

// Document is one policy object: its metadata and exactly one of the specs, by Kind.
type Document struct {
	Kind     string
	Metadata Metadata

	Authorization         *AuthorizationPolicy
	RequestAuthentication *RequestAuthentication
	PeerAuthentication    *PeerAuthentication
}

// Metadata is what of a Kubernetes object's metadata policy depends on.
type Metadata struct {
	Name              string            `json:"name"`
	Namespace         string            `json:"namespace,omitempty"`
	Labels            map[string]string `json:"labels,omitempty"`
	Annotations       map[string]string `json:"annotations,omitempty"`
	UID               string            `json:"uid,omitempty"`
	Generation        int64             `json:"generation,omitempty"`
	CreationTimestamp time.Time         `json:"creationTimestamp,omitzero"`
}

// Selector picks workloads by labels, all of which must be equal. Nil or empty picks all.
type Selector struct {
	MatchLabels map[string]string `json:"matchLabels,omitempty"`
}

// TargetRef points at a Gateway API object; sidecars ignore policies that have one.
type TargetRef struct {
	Group     string `json:"group,omitempty"`
	Kind      string `json:"kind"`
	Name      string `json:"name"`
	Namespace string `json:"namespace,omitempty"`
}

// Actions of an AuthorizationPolicy; empty means ALLOW.
const (
	ActionAllow  = "ALLOW"
	ActionDeny   = "DENY"
	ActionAudit  = "AUDIT"
	ActionCustom = "CUSTOM"
)

// AuthorizationPolicy is the spec of that kind.
type AuthorizationPolicy struct {
	Selector   *Selector   `json:"selector,omitempty"`
	TargetRef  *TargetRef  `json:"targetRef,omitempty"`
	TargetRefs []TargetRef `json:"targetRefs,omitempty"`
	Action     string      `json:"action,omitempty"`
	Provider   *Provider   `json:"provider,omitempty"`
	Rules      []Rule      `json:"rules,omitempty"`
}

// Provider names an extension provider of the mesh settings.
type Provider struct {
	Name string `json:"name"`
}

// Rule matches when one of From, one of To and all of When match; an absent list matches all.
type Rule struct {
	From []From      `json:"from,omitempty"`
	To   []To        `json:"to,omitempty"`
	When []Condition `json:"when,omitempty"`
}

// From wraps a Source.
type From struct {
	Source *Source `json:"source,omitempty"`
}

// To wraps an Operation.
type To struct {
	Operation *Operation `json:"operation,omitempty"`
}

// Source says who calls; its fields are ANDed, values of one field ORed.
type Source struct {
	Principals           []string `json:"principals,omitempty"`
	NotPrincipals        []string `json:"notPrincipals,omitempty"`
	RequestPrincipals    []string `json:"requestPrincipals,omitempty"`
	NotRequestPrincipals []string `json:"notRequestPrincipals,omitempty"`
	Namespaces           []string `json:"namespaces,omitempty"`
	NotNamespaces        []string `json:"notNamespaces,omitempty"`
	ServiceAccounts      []string `json:"serviceAccounts,omitempty"`
	NotServiceAccounts   []string `json:"notServiceAccounts,omitempty"`
	TrustDomains         []string `json:"trustDomains,omitempty"`
	NotTrustDomains      []string `json:"notTrustDomains,omitempty"`
	IPBlocks             []string `json:"ipBlocks,omitempty"`
	NotIPBlocks          []string `json:"notIpBlocks,omitempty"`
	RemoteIPBlocks       []string `json:"remoteIpBlocks,omitempty"`
	NotRemoteIPBlocks    []string `json:"notRemoteIpBlocks,omitempty"`
}

// Operation says what is asked; its fields are ANDed, values of one field ORed.
type Operation struct {
	Hosts      []string `json:"hosts,omitempty"`
	NotHosts   []string `json:"notHosts,omitempty"`
	Ports      []string `json:"ports,omitempty"`
	NotPorts   []string `json:"notPorts,omitempty"`
	Methods    []string `json:"methods,omitempty"`
	NotMethods []string `json:"notMethods,omitempty"`
	Paths      []string `json:"paths,omitempty"`
	NotPaths   []string `json:"notPaths,omitempty"`
}

// Condition is one `when` entry.
type Condition struct {
	Key       string   `json:"key"`
	Values    []string `json:"values,omitempty"`
	NotValues []string `json:"notValues,omitempty"`
}

// RequestAuthentication is the spec of that kind.
type RequestAuthentication struct {
	Selector   *Selector   `json:"selector,omitempty"`
	TargetRef  *TargetRef  `json:"targetRef,omitempty"`
	TargetRefs []TargetRef `json:"targetRefs,omitempty"`
	JWTRules   []JWTRule   `json:"jwtRules,omitempty"`
}

// JWTRule says whose end-user tokens are accepted, where they stand, and what is passed on.
type JWTRule struct {
	Issuer                string          `json:"issuer,omitempty"`
	Audiences             []string        `json:"audiences,omitempty"`
	JwksURI               string          `json:"jwksUri,omitempty"`
	Jwks                  string          `json:"jwks,omitempty"`
	FromHeaders           []JWTHeader     `json:"fromHeaders,omitempty"`
	FromParams            []string        `json:"fromParams,omitempty"`
	FromCookies           []string        `json:"fromCookies,omitempty"`
	OutputPayloadToHeader string          `json:"outputPayloadToHeader,omitempty"`
	OutputClaimToHeaders  []ClaimToHeader `json:"outputClaimToHeaders,omitempty"`
	ForwardOriginalToken  bool            `json:"forwardOriginalToken,omitempty"`
	// Timeout is a duration in Go or protobuf JSON form ("5s").
	Timeout              string   `json:"timeout,omitempty"`
	SpaceDelimitedClaims []string `json:"spaceDelimitedClaims,omitempty"`
}

// JWTHeader is a header, and the prefix its value must start with, that carries a token.
type JWTHeader struct {
	Name   string `json:"name"`
	Prefix string `json:"prefix,omitempty"`
}

// ClaimToHeader copies one claim of a verified token into a request header.
type ClaimToHeader struct {
	Header string `json:"header"`
	Claim  string `json:"claim"`
}

// Modes of mutual TLS; empty and UNSET inherit.
const (
	ModeUnset      = "UNSET"
	ModeDisable    = "DISABLE"
	ModePermissive = "PERMISSIVE"
	ModeStrict     = "STRICT"
)

// PeerAuthentication is the spec of that kind.
type PeerAuthentication struct {
	Selector *Selector  `json:"selector,omitempty"`
	MTLS     *MutualTLS `json:"mtls,omitempty"`
	// PortLevelMTLS is by workload port in decimal, as JSON objects have it.
	PortLevelMTLS map[string]MutualTLS `json:"portLevelMtls,omitempty"`
}

// MutualTLS is a mode.
type MutualTLS struct {
	Mode string `json:"mode,omitempty"`
}
