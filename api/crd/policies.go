// Package crd holds the Kubernetes objects around the policy documents, for the
// custom resource definitions in deploy/crds to be generated from (`make
// generate`): the same JSON as Istio's security.istio.io, field for field, so that
// what users have applies unchanged, with the validation that Istio's definitions
// have. v1 and v1beta1 are the served versions.
//
// It holds no logic. It refuses nothing that Istio's definitions accept: what the
// engine cannot represent is for the webhook to refuse, with a better reason. It
// assumes that api/policy has the same fields, which a test compares.
package crd

// AuthorizationPolicySpec says who may do what with the workloads it selects.
//
// +kubebuilder:validation:XValidation:rule="(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1",message="only one of targetRefs or selector can be set"
type AuthorizationPolicySpec struct {
	// Workloads that the policy is for; without it, all of its namespace, or in the root namespace of the mesh.
	Selector *WorkloadSelector `json:"selector,omitempty"`
	// Older form of targetRefs.
	TargetRef *TargetReference `json:"targetRef,omitempty"`
	// Gateway API objects that the policy is for. Sidecars ignore policies that have any.
	//
	// +kubebuilder:validation:MaxItems=16
	TargetRefs []TargetReference `json:"targetRefs,omitempty"`
	// Rules, of which one must match for the action to be taken. ALLOW without rules allows nothing.
	//
	// +kubebuilder:validation:MaxItems=512
	Rules []Rule `json:"rules,omitempty"`
	// What is done with requests that match: ALLOW (default), DENY, AUDIT or CUSTOM.
	Action Action `json:"action,omitempty"`
	// The extension provider that CUSTOM asks.
	Provider *ExtensionProvider `json:"provider,omitempty"`
}

// Action of an AuthorizationPolicy.
//
// +kubebuilder:validation:Enum=ALLOW;DENY;AUDIT;CUSTOM
type Action string

// ExtensionProvider is one of the mesh settings.
type ExtensionProvider struct {
	// Name of the extension provider.
	Name string `json:"name,omitempty"`
}

// Rule matches when one of from, one of to and all of when do. What is absent matches everything.
type Rule struct {
	// Who calls.
	//
	// +kubebuilder:validation:MaxItems=512
	From []From `json:"from,omitempty"`
	// What is asked.
	To []To `json:"to,omitempty"`
	// Further conditions.
	When []Condition `json:"when,omitempty"`
}

// From is one alternative of who calls.
type From struct {
	Source *Source `json:"source,omitempty"`
}

// To is one alternative of what is asked.
type To struct {
	Operation *Operation `json:"operation,omitempty"`
}

// Source matches when all of its fields do, and a field when one of its values does.
//
// +kubebuilder:validation:XValidation:rule="(has(self.serviceAccounts) || has(self.notServiceAccounts)) ? (!has(self.principals) && !has(self.notPrincipals) && !has(self.namespaces) && !has(self.notNamespaces)) : true",message="Cannot set serviceAccounts with namespaces or principals"
type Source struct {
	// Identities of the peer's certificate, TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT.
	Principals []string `json:"principals,omitempty"`
	// None of these identities.
	NotPrincipals []string `json:"notPrincipals,omitempty"`
	// Identities of the end user's token, ISSUER/SUBJECT.
	RequestPrincipals []string `json:"requestPrincipals,omitempty"`
	// None of these.
	NotRequestPrincipals []string `json:"notRequestPrincipals,omitempty"`
	// Namespaces of the peer's identity.
	Namespaces []string `json:"namespaces,omitempty"`
	// None of these.
	NotNamespaces []string `json:"notNamespaces,omitempty"`
	// Service accounts of the peer's identity, ACCOUNT in the policy's namespace or NAMESPACE/ACCOUNT.
	//
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=320
	ServiceAccounts []string `json:"serviceAccounts,omitempty"`
	// None of these.
	//
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=320
	NotServiceAccounts []string `json:"notServiceAccounts,omitempty"`
	// Trust domains of the peer's identity.
	TrustDomains []string `json:"trustDomains,omitempty"`
	// None of these.
	NotTrustDomains []string `json:"notTrustDomains,omitempty"`
	// IP addresses or blocks of the packet's source.
	IPBlocks []string `json:"ipBlocks,omitempty"`
	// None of these.
	NotIPBlocks []string `json:"notIpBlocks,omitempty"`
	// IP addresses or blocks of the original client, as trusted proxies tell it.
	RemoteIPBlocks []string `json:"remoteIpBlocks,omitempty"`
	// None of these.
	NotRemoteIPBlocks []string `json:"notRemoteIpBlocks,omitempty"`
}

// Operation matches when all of its fields do, and a field when one of its values does.
type Operation struct {
	// Hosts of HTTP requests.
	Hosts []string `json:"hosts,omitempty"`
	// None of these.
	NotHosts []string `json:"notHosts,omitempty"`
	// Ports of the workload.
	Ports []string `json:"ports,omitempty"`
	// None of these.
	NotPorts []string `json:"notPorts,omitempty"`
	// Methods of HTTP requests; POST for gRPC.
	Methods []string `json:"methods,omitempty"`
	// None of these.
	NotMethods []string `json:"notMethods,omitempty"`
	// Paths of HTTP requests; /PACKAGE.SERVICE/METHOD for gRPC.
	Paths []string `json:"paths,omitempty"`
	// None of these.
	NotPaths []string `json:"notPaths,omitempty"`
}

// Condition on one attribute.
type Condition struct {
	// Name of the attribute, as in request.headers[x] or source.ip.
	Key string `json:"key"`
	// Values of which the attribute must have one.
	Values []string `json:"values,omitempty"`
	// Values that it must not have.
	NotValues []string `json:"notValues,omitempty"`
}

// PeerAuthenticationSpec says whether the workloads it selects demand mutual TLS.
//
// +kubebuilder:validation:XValidation:rule="has(self.portLevelMtls) ? (((has(self.selector) && has(self.selector.matchLabels)) ? self.selector.matchLabels : {}).size() > 0) : true",message="portLevelMtls requires selector"
type PeerAuthenticationSpec struct {
	// Workloads that the policy is for; without it, all of its namespace, or in the root namespace of the mesh.
	Selector *WorkloadSelector `json:"selector,omitempty"`
	// Mutual TLS of the workload.
	MTLS *MutualTLS `json:"mtls,omitempty"`
	// Mutual TLS of single ports of the workload, by number.
	//
	// +kubebuilder:validation:MinProperties=1
	// +kubebuilder:validation:XValidation:rule="self.all(key, 0 < int(key) && int(key) <= 65535)",message="port must be between 1-65535"
	PortLevelMTLS map[string]MutualTLS `json:"portLevelMtls,omitempty"`
}

// MutualTLS is how connections are accepted.
type MutualTLS struct {
	// STRICT, PERMISSIVE, DISABLE; UNSET inherits.
	Mode Mode `json:"mode,omitempty"`
}

// Mode of mutual TLS.
//
// +kubebuilder:validation:Enum=UNSET;DISABLE;PERMISSIVE;STRICT
type Mode string
