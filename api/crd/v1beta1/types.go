// Package v1beta1 holds the policy objects of security.istio.io/v1beta1. It holds no logic;
// see package crd.
//
// +groupName=security.istio.io
// +versionName=v1beta1
package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"castellan.dev/api/crd"
)

// AuthorizationPolicy says who may do what with workloads.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=authorizationpolicies,shortName=ap,categories={istio-io,security-istio-io}
// +kubebuilder:metadata:labels="app.kubernetes.io/part-of=castellan"
// +kubebuilder:metadata:annotations="helm.sh/resource-policy=keep"
// +kubebuilder:printcolumn:name="Action",type=string,JSONPath=`.spec.action`,description="What is done with requests that match."
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`,description="Whether this version is in force."
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].status`,description="Whether every proxy it is for has acknowledged it."
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type AuthorizationPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   crd.AuthorizationPolicySpec `json:"spec,omitempty"`
	Status *crd.Status                 `json:"status,omitempty"`
}

// PeerAuthentication says whether workloads demand mutual TLS.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=peerauthentications,shortName=pa,categories={istio-io,security-istio-io}
// +kubebuilder:metadata:labels="app.kubernetes.io/part-of=castellan"
// +kubebuilder:metadata:annotations="helm.sh/resource-policy=keep"
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mtls.mode`,description="How connections are accepted."
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`,description="Whether this version is in force."
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].status`,description="Whether every proxy it is for has acknowledged it."
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type PeerAuthentication struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   crd.PeerAuthenticationSpec `json:"spec,omitempty"`
	Status *crd.Status                `json:"status,omitempty"`
}

// RequestAuthentication says whose end-user tokens workloads accept.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=requestauthentications,shortName=ra,categories={istio-io,security-istio-io}
// +kubebuilder:metadata:labels="app.kubernetes.io/part-of=castellan"
// +kubebuilder:metadata:annotations="helm.sh/resource-policy=keep"
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`,description="Whether this version is in force."
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].status`,description="Whether every proxy it is for has acknowledged it."
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type RequestAuthentication struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   crd.RequestAuthenticationSpec `json:"spec,omitempty"`
	Status *crd.Status                   `json:"status,omitempty"`
}
