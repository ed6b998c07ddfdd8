package webhook

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
	"sync"

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
	// ports are those of the workloads in the mesh, without repetition; none where
	// they are too many to look at, or some workload has too many.
	ports []map[uint16]string
}

func choose(doc policy.Document, mesh policy.Mesh, file *workloads.File) chosen {
	var c chosen
	if file == nil {
		return c
	}
	declared := declaredBy(file)
	seen := map[string]bool{}
	known := doc.Authorization != nil
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
		if !known {
			continue
		}
		ports := declared(w)
		if known = len(ports) <= authz.MaxPorts; !known {
			continue
		}
		// fmt prints maps in the order of their keys.
		if key := fmt.Sprint(ports); !seen[key] {
			seen[key] = true
			c.ports = append(c.ports, ports)
			known = len(c.ports) <= authz.MaxPortSets
		}
	}
	if !known {
		c.ports = nil
	}
	return c
}

// declaredBy returns what says which ports a workload declares. Of a resolved file
// only those are looked at that are asked for.
func declaredBy(file *workloads.File) func(*workloads.Workload) map[uint16]string {
	if file.Resolved {
		return func(w *workloads.Workload) map[uint16]string {
			ports := make(map[uint16]string, len(w.Ports))
			for _, p := range w.Ports {
				ports[p.Number] = p.Protocol
			}
			return ports
		}
	}
	declared := sync.OnceValue(file.DeclaredPorts)
	return func(w *workloads.Workload) map[uint16]string { return declared()[w.PodUID] }
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
	var shown notes
	more := 0
	for _, f := range findings {
		switch {
		case f.Severity != authz.SeverityError:
			shown.add(text(f), f.More)
		case f.More > 0:
			more += f.More
		case len(refusals) < maxErrors:
			refusals = append(refusals, text(f))
		default:
			more++
		}
	}
	if more > 0 {
		refusals = append(refusals, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(refusals, "; "), shown.all()
}

// text is a finding without its severity, which the API server's client adds.
func text(f authz.Finding) string {
	if f.Value == "" {
		return f.Field + ": " + f.Reason
	}
	return fmt.Sprintf("%s: %q: %s", f.Field, f.Value, f.Reason)
}

// bounded keeps warnings few and short; `castellan authz validate` tells more.
func bounded(warnings []string) []string {
	var n notes
	for _, w := range warnings {
		n.add(w, 0)
	}
	return n.all()
}

// notes are the warnings of one answer, each once.
type notes struct {
	list []string
	seen map[string]bool
	more int
}

// add takes a warning, or one that stands for more.
func (n *notes) add(w string, more int) {
	if more > 0 {
		n.more += more
		return
	}
	w = brief(w)
	if n.seen[w] {
		return
	}
	if n.seen == nil {
		n.seen = map[string]bool{}
	}
	n.seen[w] = true
	if len(n.list) < maxWarnings {
		n.list = append(n.list, w)
	} else {
		n.more++
	}
}

func (n *notes) all() []string {
	if n.more == 0 {
		return n.list
	}
	return append(n.list, fmt.Sprintf("and %d more", n.more))
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
