package crd

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Status of a policy, in the form of Istio's.
//
// +kubebuilder:pruning:PreserveUnknownFields
type Status struct {
	// What has become of the policy. Accepted: this version is in force. Programmed: every proxy it is for has acknowledged it.
	//
	// +listType=map
	// +listMapKey=type
	Conditions []StatusCondition `json:"conditions,omitempty"`
	// Generation that the conditions are about.
	ObservedGeneration *intstr.IntOrString `json:"observedGeneration,omitempty"`
	// Findings of analyzers.
	ValidationMessages []ValidationMessage `json:"validationMessages,omitempty"`
}

// StatusCondition is one thing that is or is not so.
type StatusCondition struct {
	// What it is about.
	Type string `json:"type"`
	// True, False or Unknown.
	Status string `json:"status,omitempty"`
	// Why, in one word.
	Reason string `json:"reason,omitempty"`
	// Why, for people.
	Message string `json:"message,omitempty"`
	// When status last became another.
	LastTransitionTime *metav1.Time `json:"lastTransitionTime,omitempty"`
	// When it was last looked at.
	LastProbeTime *metav1.Time `json:"lastProbeTime,omitempty"`
	// Generation that it is about.
	ObservedGeneration *intstr.IntOrString `json:"observedGeneration,omitempty"`
}

// ValidationMessage is one finding of an analyzer.
type ValidationMessage struct {
	// The kind of finding.
	Type *ValidationType `json:"type,omitempty"`
	// Where the finding is explained.
	DocumentationURL string `json:"documentationUrl,omitempty"`
	// How severe it is.
	//
	// +kubebuilder:validation:Enum=UNKNOWN;ERROR;WARNING;INFO
	Level string `json:"level,omitempty"`
}

// ValidationType names a kind of finding.
type ValidationType struct {
	// Name for people.
	Name string `json:"name,omitempty"`
	// Code for machines.
	Code string `json:"code,omitempty"`
}
