package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"castellan.dev/authz"
	"castellan.dev/discovery"
	"castellan.dev/internal/kube"
)

func TestVerdicts(t *testing.T) {
	if verdicts(nil) != nil {
		t.Error("what is not known became no policies")
	}
	got := verdicts([]discovery.DocumentStatus{{
		Ref: discovery.Ref{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "a"}, UID: "u", Generation: 7,
		LastGoodInForce: true, Selected: 3, Programmed: 2, Refused: 1,
		Findings: []authz.Finding{
			{Severity: authz.SeverityError, Field: "spec.action", Value: "NO", Reason: "unknown"},
			{Severity: authz.SeverityWarning, Field: "spec.rules", Reason: "risky"},
		},
	}, {Denies: true}, {Accepted: true}})
	want := []kube.Verdict{{
		Kind: "AuthorizationPolicy", Namespace: "shop", Name: "a", UID: "u", Generation: 7, LastGood: true,
		Errors: []string{`spec.action: "NO": unknown`}, Warnings: []string{"spec.rules: risky"}, Selected: 3, Programmed: 2, Refused: 1,
	}, {Denies: true}, {Accepted: true}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
