package webhook

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/internal/workloads"
)

// Review says what is wrong with a policy, by authz, and what beyond that may
// surprise its author, by the workloads there are. A nil file is not known: then
// nothing is said about what the policy selects.
func Review(doc policy.Document, mesh policy.Mesh, file *workloads.File) []authz.Finding {
	chosen := choose(doc, mesh, file)
	findings := authz.ValidateForAll(doc, mesh, chosen.ports)
	warn := func(field, reason string) {
		findings = append(findings, authz.Finding{Severity: authz.SeverityWarning, Field: field, Reason: reason})
	}
	selector, targeted := selection(doc)
	root := doc.Metadata.Namespace == rootNamespace(mesh)
	switch {
	case targeted: // authz says that no proxy looks at it
		return findings
	case root && len(selector) == 0:
		warn("metadata.namespace", "the root namespace: this applies to every workload of the mesh")
	case root && doc.Kind != policy.KindPeerAuthentication:
		warn("metadata.namespace", "the root namespace: this applies to such workloads of every namespace")
	}
	switch {
	case file == nil || len(selector) == 0 || root && doc.Kind == policy.KindPeerAuthentication:
	case chosen.inside == 0 && chosen.outside > 0:
		warn("spec.selector", "selects only pods without a sidecar, where nothing enforces it")
	case chosen.inside == 0:
		warn("spec.selector", "selects no workload that there is now")
	}
	return findings
}

// chosen is what a document selects.
type chosen struct {
	inside, outside int
	ports           []map[uint16]string // of those in the mesh, without repetition
}

func choose(doc policy.Document, mesh policy.Mesh, file *workloads.File) chosen {
	var c chosen
	if file == nil {
		return c
	}
	var declared map[string]map[uint16]string
	seen := map[string]bool{}
	for i := range file.Workloads {
		w := &file.Workloads[i]
		if !authz.Selects(doc, w.Namespace, w.Labels, mesh) {
			continue
		}
		if w.OutsideMesh {
			c.outside++
			continue
		}
		c.inside++
		if doc.Authorization == nil {
			continue
		}
		if declared == nil {
			declared = file.DeclaredPorts()
		}
		// fmt prints maps in the order of their keys.
		if key := fmt.Sprint(declared[w.PodUID]); !seen[key] {
			seen[key] = true
			c.ports = append(c.ports, declared[w.PodUID])
		}
	}
	return c
}

// selection returns the labels a document asks for, and whether it is for gateways.
func selection(doc policy.Document) (labels map[string]string, targeted bool) {
	var s *policy.Selector
	switch {
	case doc.Authorization != nil:
		a := doc.Authorization
		s, targeted = a.Selector, a.TargetRef != nil || len(a.TargetRefs) > 0
	case doc.RequestAuthentication != nil:
		r := doc.RequestAuthentication
		s, targeted = r.Selector, r.TargetRef != nil || len(r.TargetRefs) > 0
	case doc.PeerAuthentication != nil:
		s = doc.PeerAuthentication.Selector
	}
	if s != nil {
		labels = s.MatchLabels
	}
	return labels, targeted
}

func rootNamespace(mesh policy.Mesh) string { return cmp.Or(mesh.RootNamespace, "castellan-system") }

// findingOf makes a finding of what Decode refused.
func findingOf(err error) authz.Finding {
	f := authz.Finding{Severity: authz.SeverityError, Field: "document", Reason: err.Error()}
	var field *authz.FieldError
	if !errors.As(err, &field) {
		return f
	}
	f.Value, f.Reason = field.Value, field.Reason
	if field.Field != "" {
		f.Field = field.Field
	}
	if len(field.Allowed) > 0 {
		f.Reason += "; allowed: " + strings.Join(field.Allowed, ", ")
	}
	return f
}

const (
	// maxErrors named in one refusal.
	maxErrors = 5
	// warningLength is what the API's conventions recommend, maxWarning where the API
	// server cuts.
	warningLength = 120
	maxWarning    = 250
)

// split makes a message of the errors, empty where there is none, and warnings.
func split(findings []authz.Finding) (message string, warnings []string) {
	var refusals []string
	for _, f := range findings {
		if f.Severity == authz.SeverityError {
			refusals = append(refusals, text(f))
		} else {
			warnings = append(warnings, text(f))
		}
	}
	if more := len(refusals) - maxErrors; more > 0 {
		refusals = append(refusals[:maxErrors], fmt.Sprintf("and %d more", more))
	}
	return strings.Join(refusals, "; "), bounded(warnings)
}

// text is a finding without its severity, which the API server's client adds.
func text(f authz.Finding) string {
	if f.Value == "" {
		return f.Field + ": " + f.Reason
	}
	return fmt.Sprintf("%s: %q: %s", f.Field, f.Value, f.Reason)
}

// bounded keeps warnings few and short; `castellan authz validate` tells all.
func bounded(warnings []string) []string {
	var out []string
	for _, w := range warnings {
		if w = brief(w); !slices.Contains(out, w) {
			out = append(out, w)
		}
	}
	if more := len(out) - maxWarnings; more > 0 {
		out = append(out[:maxWarnings], fmt.Sprintf("and %d more", more))
	}
	return out
}

// brief keeps the clauses of a warning that fit, the first in any case.
func brief(w string) string {
	clauses := strings.Split(w, "; ")
	w = clauses[0]
	for _, c := range clauses[1:] {
		if len(w)+len(c)+2 > warningLength {
			break
		}
		w += "; " + c
	}
	if len(w) > maxWarning {
		w = strings.ToValidUTF8(w[:maxWarning-len("…")], "") + "…"
	}
	return w
}
