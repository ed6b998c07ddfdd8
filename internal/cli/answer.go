package cli

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
)

// maxNamed bounds the pods that a line names.
const maxNamed = 5

// answer is the decision as programs read it.
type answer struct {
	Allowed bool   `json:"allowed"`
	Code    int    `json:"code"`
	Action  string `json:"action,omitempty"`
	Policy  string `json:"policy"`
	Rule    int    `json:"rule"`
	Reason  string `json:"reason"`
	From    string `json:"from"`
	To      string `json:"to"`
	// Request is what was judged, the path normalised.
	Request string `json:"request"`
	Shadow  string `json:"shadow,omitempty"`
	// Pods are where it is so, on a cluster.
	Pods []string `json:"pods,omitempty"`
	// Enforced, on a cluster, is whether it is as their proxies have it now: yes, no
	// (Warnings say why) or unknown.
	Enforced string   `json:"enforced,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
	Steps    []string `json:"steps,omitempty"`
	// Endpoints, where not all decide the same, are the several answers, of which the
	// one above is the first that denies.
	Endpoints []*answer `json:"endpoints,omitempty"`
}

func (a *answer) step(format string, args ...any) {
	a.Steps = append(a.Steps, fmt.Sprintf(format, args...))
}

// refuse is a refusal before policy is asked.
func (a *answer) refuse(code int, reason string) {
	a.Allowed, a.Code, a.Reason, a.Rule = false, code, reason, -1
	a.step("decision: %d: %s", code, reason)
}

// why is the reason with the policy and rule it comes from.
func (a *answer) why() string {
	if a.Policy == "" {
		return a.Reason
	}
	by := a.Action + " " + a.Policy
	if a.Rule >= 0 {
		by += fmt.Sprintf(", rule %d", a.Rule)
	}
	return a.Reason + " (" + by + ")"
}

func (a *answer) verdict() string {
	if a.Allowed {
		return "allowed"
	}
	return fmt.Sprintf("denied (%d)", a.Code)
}

// says is what two answers must agree on to be one.
func (a *answer) says(other *answer) bool {
	return a.verdict() == other.verdict() && a.why() == other.why() && a.To == other.To && a.Request == other.Request && a.Shadow == other.Shadow
}

// together makes one answer of several: allowed where all allow, as nobody knows
// which endpoint a caller's proxy will choose.
func together(all []*answer) *answer {
	var warnings []string
	for _, a := range all {
		for _, w := range a.Warnings {
			if !slices.Contains(warnings, w) {
				warnings = append(warnings, w)
			}
		}
	}
	distinct := alike(all)
	first := distinct[0]
	for _, a := range distinct {
		if first.Allowed && !a.Allowed {
			first = a
		}
	}
	out := *first
	out.Warnings = warnings
	if len(distinct) > 1 {
		out.Endpoints = distinct
		for _, a := range distinct {
			if a.Enforced != out.Enforced {
				// The least that holds for all.
				out.Enforced = cmp.Or(worse(a.Enforced, out.Enforced), out.Enforced)
			}
		}
	}
	return &out
}

func worse(a, b string) string {
	for _, e := range []string{"no", "unknown", "yes"} {
		if a == e || b == e {
			return e
		}
	}
	return ""
}

// alike makes one of those that say the same.
func alike(all []*answer) []*answer {
	var out []*answer
	for _, a := range all {
		i := slices.IndexFunc(out, a.says)
		if i < 0 {
			out = append(out, a)
			continue
		}
		out[i].Enforced = worse(out[i].Enforced, a.Enforced)
		pods := slices.Concat(out[i].Pods, a.Pods)
		slices.Sort(pods)
		out[i].Pods = slices.Compact(pods)
	}
	return out
}

func (a *answer) print(w io.Writer) error {
	var b strings.Builder
	if len(a.Endpoints) == 0 {
		fmt.Fprintf(&b, "%s: %s -> %s %s: %s\n", a.verdict(), a.From, a.To, a.Request, a.why())
		a.details(&b, "  ")
	} else {
		fmt.Fprintf(&b, "%s: %s -> %s %s: not all endpoints decide the same\n", a.verdict(), a.From, a.To, a.Request)
		for _, one := range a.Endpoints {
			fmt.Fprintf(&b, "  %s: %s %s: %s\n", one.verdict(), one.To, one.Request, one.why())
			one.details(&b, "    ")
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (a *answer) details(b *strings.Builder, indent string) {
	if len(a.Pods) > 0 {
		fmt.Fprintf(b, "%sat %s\n", indent, visible(named(a.Pods)))
	}
	for _, s := range a.Steps {
		fmt.Fprintf(b, "%s%s\n", indent, s)
	}
}

// named lists some of many.
func named(names []string) string {
	if len(names) <= maxNamed {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:maxNamed], ", "), len(names)-maxNamed)
}
