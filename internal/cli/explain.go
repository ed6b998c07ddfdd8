package cli

import (
	"fmt"
	"maps"
	"reflect"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// maxExplained bounds the rules whose parts are tried one by one.
const maxExplained = 64

// probe decides the request at hand by another snapshot.
type probe func(*authz.Snapshot) authz.Decision

// explain notes of every rule that selects the receiver whether it matches, and
// if not, which of its fields do not. Nothing here knows how a field matches:
// each rule, and then each part of it, is compiled as a policy of its own and the
// proxy's evaluator is asked.
func (d *decision) explain(ask probe) {
	if !d.q.explain {
		return
	}
	n := 0
	for _, doc := range d.s.docs {
		a := doc.Authorization
		if a == nil || !authz.Selects(doc, d.r.workload.Account.Namespace(), d.r.workload.Labels, d.s.mesh) || a.Action == policy.ActionAudit {
			continue
		}
		for i, rule := range a.Rules {
			if n++; n > maxExplained {
				d.step("(more than %d rules; the others are left out)", maxExplained)
				return
			}
			d.step("%s %s/%s rule %d: %s", strings.Trim(actionOf(doc), " ()"), doc.Metadata.Namespace, doc.Metadata.Name, i, d.match(ask, doc, rule))
		}
	}
}

// match says whether a rule matches, or what of it does not.
func (d *decision) match(ask probe, doc policy.Document, rule policy.Rule) string {
	if d.matches(ask, doc, rule) {
		return "matches"
	}
	var failing []string
	from, anyFrom := []string{}, len(rule.From) == 0
	for i, f := range rule.From {
		if d.matches(ask, doc, policy.Rule{From: []policy.From{f}}) {
			anyFrom = true
		}
		from = append(from, fields(fmt.Sprintf("from[%d].source", i), f.Source, func(s *policy.Source) bool {
			return d.matches(ask, doc, policy.Rule{From: []policy.From{{Source: s}}})
		})...)
	}
	to, anyTo := []string{}, len(rule.To) == 0
	for i, t := range rule.To {
		if d.matches(ask, doc, policy.Rule{To: []policy.To{t}}) {
			anyTo = true
		}
		to = append(to, fields(fmt.Sprintf("to[%d].operation", i), t.Operation, func(o *policy.Operation) bool {
			return d.matches(ask, doc, policy.Rule{To: []policy.To{{Operation: o}}})
		})...)
	}
	// Of several sources one suffices: they fail together or not at all.
	if !anyFrom {
		failing = append(failing, from...)
	}
	if !anyTo {
		failing = append(failing, to...)
	}
	for i, w := range rule.When {
		if !d.matches(ask, doc, policy.Rule{When: []policy.Condition{w}}) {
			failing = append(failing, fmt.Sprintf("when[%d] (%s)", i, w.Key))
		}
	}
	if len(failing) == 0 {
		return "does not match"
	}
	return "does not match: " + strings.Join(failing, ", ")
}

// matches asks the evaluator about a policy of this one rule.
func (d *decision) matches(ask probe, doc policy.Document, rule policy.Rule) bool {
	spec := *doc.Authorization
	spec.Rules = []policy.Rule{rule}
	one := doc
	one.Authorization = &spec
	// A policy that is only tried out is explained as if it were enforced.
	one.Metadata.Annotations = maps.Clone(doc.Metadata.Annotations)
	delete(one.Metadata.Annotations, "istio.io/dry-run")
	snapshot, _ := authz.Compile(authz.Config{Documents: []policy.Document{one}, Workload: d.r.workload, Mesh: d.s.mesh})
	return ask(snapshot).Rule == 0
}

// fields names the fields of a source or operation that do not match by themselves.
func fields[T any](path string, of *T, matches func(*T) bool) []string {
	if of == nil {
		return nil
	}
	var failing []string
	value := reflect.ValueOf(of).Elem()
	for i := range value.NumField() {
		if value.Field(i).IsZero() {
			continue
		}
		only := new(T)
		reflect.ValueOf(only).Elem().Field(i).Set(value.Field(i))
		if !matches(only) {
			name, _, _ := strings.Cut(value.Type().Field(i).Tag.Get("json"), ",")
			failing = append(failing, path+"."+name)
		}
	}
	return failing
}
