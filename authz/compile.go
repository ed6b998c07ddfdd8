package authz

import (
	"cmp"
	"fmt"
	"slices"

	"castellan.dev/api/policy"
)

// dryRun is the annotation of policies that are only to cast a shadow.
const dryRun = "istio.io/dry-run"

// Snapshot is policy compiled for one workload. It is immutable and safe for
// concurrent use; a nil Snapshot denies everything.
type Snapshot struct {
	denyAll string
	http    programs
	tcp     programs
	// noAllow and noMatch are the shadows that no rule casts.
	noAllow, noMatch Shadow

	modes mtlsModes
	jwt   []policy.JWTRule
}

// Compile never fails: what cannot be represented fails closed and is a Problem.
func Compile(cfg Config) (*Snapshot, []Problem) {
	c := compiler{cfg: cfg, domains: newDomains(cfg.Mesh, cfg.Workload.TrustDomain.Name())}
	docs := c.selected()
	s := &Snapshot{
		denyAll: cfg.DenyAll,
		noAllow: Shadow{Allowed: true, Rule: -1, Reason: ReasonNoAllowPolicy},
		noMatch: Shadow{Rule: -1, Reason: ReasonNoMatch},
	}
	httpOnly := c.policies(docs, &s.http, false)
	s.tcp = s.http
	if httpOnly {
		s.tcp = programs{}
		c.policies(docs, &s.tcp, true)
	}
	s.modes = c.peerAuthentication(docs)
	for _, d := range docs {
		if d.RequestAuthentication != nil {
			s.jwt = append(s.jwt, d.RequestAuthentication.JWTRules...)
		}
	}
	return s, c.problems
}

// HasHTTPRules says whether a request may be denied, or more be said of it than
// that no policy is there.
func (s *Snapshot) HasHTTPRules() bool {
	return s == nil || s.denyAll != "" || s.http != programs{}
}

// JWTRules returns the rules of all RequestAuthentications that select the
// workload, pooled (rule 25), by namespace and name of their documents.
func (s *Snapshot) JWTRules() []policy.JWTRule {
	if s == nil {
		return nil
	}
	return slices.Clone(s.jwt)
}

// compiler holds one Compile.
type compiler struct {
	cfg      Config
	domains  domains
	problems []Problem
}

// selected returns the documents that apply, by namespace and name, so that what
// is reported does not hang on the order in which they came.
func (c *compiler) selected() []policy.Document {
	w := c.cfg.Workload
	var docs []policy.Document
	for _, d := range c.cfg.Documents {
		if Selects(d, w.Account.Namespace(), w.Labels, c.cfg.Mesh) {
			docs = append(docs, d)
		}
	}
	slices.SortStableFunc(docs, func(a, b policy.Document) int {
		return cmp.Or(cmp.Compare(a.Metadata.Namespace, b.Metadata.Namespace), cmp.Compare(a.Metadata.Name, b.Metadata.Name))
	})
	return docs
}

// policies compiles the AuthorizationPolicies for HTTP or TCP and says whether
// one of them has a field that makes the two differ. Problems are reported once,
// for HTTP.
func (c *compiler) policies(docs []policy.Document, into *programs, tcp bool) (httpOnly bool) {
	providers := c.providers(docs, tcp)
	for _, d := range docs {
		if d.Kind != policy.KindAuthorization && d.Authorization == nil {
			continue
		}
		spec := d.Authorization
		if spec == nil {
			// Like an empty spec: an ALLOW policy without rules, which denies.
			spec = new(policy.AuthorizationPolicy)
		}
		p := c.program(d, spec, into, providers, tcp)
		if p == nil {
			continue
		}
		r := reader{namespace: d.Metadata.Namespace, allow: p.allow, tcp: tcp, domains: c.domains}
		if !tcp {
			r.report = func(field, value, reason string) { c.problem(d, field, value, reason) }
		}
		for i, rule := range p.rules {
			answer := p.answer
			answer.Rule = i
			if draft, ok := r.read(rule, fmt.Sprintf("spec.rules[%d]", i)); ok && !p.void {
				p.into.add(draft, answer)
			}
		}
		httpOnly = httpOnly || r.httpOnly
	}
	for _, p := range into.slots() {
		p.finish()
	}
	return httpOnly
}

// policyPlan is where a policy goes and what its rules answer.
type policyPlan struct {
	into   *program
	rules  []policy.Rule
	answer Decision
	allow  bool // ALLOW: fails closed by not matching
	void   bool // its rules never match
}

// program says which program a policy belongs to; nil if it decides nothing.
func (c *compiler) program(d policy.Document, spec *policy.AuthorizationPolicy, into *programs, providers resolved, tcp bool) *policyPlan {
	p := &policyPlan{rules: spec.Rules}
	p.answer = Decision{Action: spec.Action, Policy: d.Metadata.Namespace + "/" + d.Metadata.Name}
	annotation, dry := d.Metadata.Annotations[dryRun]
	report := func(field, value, reason string) {
		if !tcp {
			c.problem(d, field, value, reason)
		}
	}
	if dry && (annotation != "true" || spec.Action == policy.ActionCustom || spec.Action == policy.ActionAudit) {
		report("metadata.annotations["+dryRun+"]", annotation, `dry-run is "true", on ALLOW and DENY only`)
		dry, p.void = false, spec.Action == policy.ActionAllow || spec.Action == ""
	}
	slot := &into.deny
	switch spec.Action {
	case policy.ActionAllow, "":
		p.allow = true
		p.answer.Allowed, p.answer.Action, p.answer.Reason = true, policy.ActionAllow, ReasonAllowed
		slot = &into.allow
		if dry {
			slot = &into.dryAllow
		}
	case policy.ActionDeny:
		p.answer.Reason = ReasonDenied
		if dry {
			slot = &into.dryDeny
		}
	case policy.ActionCustom:
		p.answer.Provider, p.answer.Reason = providers.name, providers.reason
		slot = &into.custom
	case policy.ActionAudit:
		return nil // never decides (rule 3)
	default:
		report("spec.action", spec.Action, "unknown action; everything is denied")
		p.answer.Action, p.answer.Reason = policy.ActionDeny, ReasonDenied
		p.rules = []policy.Rule{{}}
	}
	if field, n := excess(spec); field != "" {
		// An ALLOW policy then never matches, every other one always does.
		report(field, "", tooManyValues(n))
		if p.rules = nil; !p.allow {
			p.rules = []policy.Rule{{}}
		}
	}
	if len(p.rules) == 0 && !p.allow {
		// Rule 4: not valid. Whoever wrote it wanted something denied.
		report("spec.rules", "", spec.Action+" without rules; everything is denied")
		p.rules = []policy.Rule{{}}
	}
	if *slot == nil {
		*slot = &program{eachValue: !p.allow}
	}
	p.into = *slot
	return p
}

// resolved is what CUSTOM policies of the workload come to.
type resolved struct{ name, reason string }

// providers resolves the provider of the CUSTOM policies. One per workload can
// be asked; where it is unknown, or there are several, nobody can, and what their
// rules match is denied (rule 22).
func (c *compiler) providers(docs []policy.Document, tcp bool) resolved {
	var found []string
	ok := true
	for _, d := range docs {
		if d.Authorization == nil || d.Authorization.Action != policy.ActionCustom {
			continue
		}
		name := ""
		if d.Authorization.Provider != nil {
			name = d.Authorization.Provider.Name
		}
		if !slices.Contains(found, name) {
			found = append(found, name)
		}
		known := slices.ContainsFunc(c.cfg.Mesh.ExtensionProviders, func(p policy.ExtensionProvider) bool { return p.Name == name })
		reason := ""
		switch {
		case name == "":
			reason = "required; what its rules match is denied"
		case len(found) > 1:
			reason = "a workload has one provider; what CUSTOM rules match is denied"
		case !known:
			// Of the mesh settings, not of the document: admission warns.
			ok = false
			continue
		default:
			continue
		}
		ok = false
		if !tcp {
			c.problem(d, "spec.provider.name", name, reason)
		}
	}
	if len(found) == 1 && ok {
		return resolved{name: found[0], reason: ReasonCustom}
	}
	return resolved{reason: ReasonCustomUnresolved}
}

func (c *compiler) problem(d policy.Document, field, value, reason string) {
	const most = 120 // of a value repeated in status and logs
	if len(value) > most {
		value = value[:most] + "…"
	}
	c.problems = append(c.problems, Problem{
		Kind: d.Kind, Namespace: d.Metadata.Namespace, Name: d.Metadata.Name,
		Field: field, Value: value, Reason: reason,
	})
}
