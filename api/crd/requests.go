package crd

// RequestAuthenticationSpec says whose end-user tokens the workloads it selects accept.
//
// +kubebuilder:validation:XValidation:rule="(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1",message="only one of targetRefs or selector can be set"
type RequestAuthenticationSpec struct {
	// Workloads that the policy is for; without it, all of its namespace, or in the root namespace of the mesh.
	Selector *WorkloadSelector `json:"selector,omitempty"`
	// Older form of targetRefs.
	TargetRef *TargetReference `json:"targetRef,omitempty"`
	// Gateway API objects that the policy is for. Sidecars ignore policies that have any.
	//
	// +kubebuilder:validation:MaxItems=16
	TargetRefs []TargetReference `json:"targetRefs,omitempty"`
	// Tokens that are accepted. A request with a token that none of them accepts is refused; one without any passes.
	//
	// +kubebuilder:validation:MaxItems=4096
	JWTRules []JWTRule `json:"jwtRules,omitempty"`
}

// JWTRule is one issuer's tokens.
//
// +kubebuilder:validation:XValidation:rule="(has(self.jwksUri) ? 1 : 0) + (has(self.jwks_uri) ? 1 : 0) + (has(self.jwks) ? 1 : 0) <= 1",message="only one of jwks or jwksUri can be set"
type JWTRule struct {
	// The issuer, as the token's claim iss has it.
	//
	// +kubebuilder:validation:MinLength=1
	Issuer string `json:"issuer,omitempty"`
	// Audiences of which the token must have one; without them any will do.
	//
	// +kubebuilder:validation:items:MinLength=1
	Audiences []string `json:"audiences,omitempty"`
	// Where the issuer publishes its keys; without it and jwks, OpenID Connect Discovery tells.
	JwksURI JwksURI `json:"jwksUri,omitempty"`
	// Older name of jwksUri.
	OldJwksURI JwksURI `json:"jwks_uri,omitempty"`
	// The issuer's keys themselves, as a JSON Web Key Set.
	Jwks string `json:"jwks,omitempty"`
	// Headers that carry the token, in place of Authorization and the query parameter access_token.
	FromHeaders []JWTHeader `json:"fromHeaders,omitempty"`
	// Query parameters that carry the token.
	//
	// +kubebuilder:validation:items:MinLength=1
	FromParams []string `json:"fromParams,omitempty"`
	// Cookies that carry the token.
	//
	// +kubebuilder:validation:items:MinLength=1
	FromCookies []string `json:"fromCookies,omitempty"`
	// Header that the verified payload is passed on in, base64 encoded.
	OutputPayloadToHeader string `json:"outputPayloadToHeader,omitempty"`
	// Claims of a verified token that are passed on in headers.
	OutputClaimToHeaders []ClaimToHeader `json:"outputClaimToHeaders,omitempty"`
	// Whether the token is passed on.
	ForwardOriginalToken bool `json:"forwardOriginalToken,omitempty"`
	// How long fetching the keys may take; default 5s.
	//
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1ms')",message="must be a valid duration greater than 1ms"
	Timeout string `json:"timeout,omitempty"`
	// Claims that hold a list separated by spaces, besides scope and permission.
	//
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=1
	SpaceDelimitedClaims []string `json:"spaceDelimitedClaims,omitempty"`
}

// JwksURI is where keys are published.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=2048
// +kubebuilder:validation:XValidation:rule="url(self).getScheme() in ['http', 'https']",message="url must have scheme http:// or https://"
type JwksURI string

// JWTHeader is a header that carries a token.
type JWTHeader struct {
	// Name of the header.
	//
	// +kubebuilder:validation:MinLength=1
	Name string `json:"name"`
	// What stands before the token, with the space.
	Prefix string `json:"prefix,omitempty"`
}

// ClaimToHeader passes a claim on.
type ClaimToHeader struct {
	// Header that the claim is put into.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:Pattern=`^[-_A-Za-z0-9]+$`
	Header string `json:"header"`
	// Claim, with dots into nested ones.
	//
	// +kubebuilder:validation:MinLength=1
	Claim string `json:"claim"`
}

// WorkloadSelector picks workloads by their labels.
type WorkloadSelector struct {
	// Labels that a workload must have, all of them.
	//
	// +kubebuilder:validation:MaxProperties=4096
	// +kubebuilder:validation:XValidation:rule="self.all(key, !key.contains('*'))",message="wildcard not allowed in label key match"
	// +kubebuilder:validation:XValidation:rule="self.all(key, key.size() != 0)",message="key must not be empty"
	MatchLabels map[string]LabelValue `json:"matchLabels,omitempty"`
}

// LabelValue is the value of a label.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="!self.contains('*')",message="wildcard not allowed in label value match"
type LabelValue string

// TargetReference points at a Gateway API object, or a Service.
type TargetReference struct {
	// Group of the object.
	//
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`
	Group string `json:"group,omitempty"`
	// Kind of the object.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$`
	Kind string `json:"kind"`
	// Name of the object.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// Must be empty: the object is in the policy's namespace.
	//
	// +kubebuilder:validation:XValidation:rule="self.size() == 0",message="cross namespace referencing is not currently supported"
	Namespace string `json:"namespace,omitempty"`
}
