package authz

import (
	"maps"
	"slices"
	"strings"

	"castellan.dev/api/policy"
)

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func (v *validation) authorization(p *policy.AuthorizationPolicy) {
	v.selection(p.Selector, p.TargetRef, p.TargetRefs)
	v.action(p)
	if len(p.Rules) > maxRules {
		v.refuse("spec.rules", "", "%d rules, at most %d are allowed", len(p.Rules), maxRules)
		return
	}
	if field, n := excess(p); field != "" {
		v.tooMany(field, n)
		return
	}
	for i, rule := range p.Rules {
		v.rule(itemPath("spec.rules", i), rule, actionOf(p))
	}
	if actionOf(p) == policy.ActionAudit {
		v.warn("spec.action", p.Action, "AUDIT never decides, and castellan-proxy writes every request to its access log already")
	}
}

// actionOf is the action with the default of an absent one.
func actionOf(p *policy.AuthorizationPolicy) string {
	if p.Action == "" {
		return policy.ActionAllow
	}
	return p.Action
}

// action is rules 3, 4 and 22.
func (v *validation) action(p *policy.AuthorizationPolicy) {
	switch actionOf(p) {
	case policy.ActionAllow:
		if len(p.Rules) == 0 {
			v.warn("spec.rules", "", "an ALLOW policy without rules denies every request; add the rule {} if all are to be allowed")
		}
	case policy.ActionDeny:
		if len(p.Rules) == 0 {
			v.refuse("spec.rules", "", "a DENY policy without rules never denies; add the rule {} if all are to be denied")
		}
	case policy.ActionCustom:
		if len(p.Rules) == 0 {
			v.refuse("spec.rules", "", "a CUSTOM policy without rules never asks its provider; add the rule {} if it is to be asked about all")
		}
		v.provider(p.Provider)
	case policy.ActionAudit:
	default:
		v.refuse("spec.action", p.Action, "allowed: ALLOW, DENY, AUDIT, CUSTOM")
	}
	if p.Provider != nil && actionOf(p) != policy.ActionCustom {
		v.refuse("spec.provider", p.Provider.Name, "allowed with action CUSTOM only, not %s", actionOf(p))
	}
}

func (v *validation) provider(p *policy.Provider) {
	if p == nil || p.Name == "" {
		v.refuse("spec.provider.name", "", "required with action CUSTOM")
		return
	}
	var known []string
	for _, e := range v.mesh.ExtensionProviders {
		known = append(known, e.Name)
	}
	if slices.Contains(known, p.Name) {
		return
	}
	list := "the mesh settings declare none"
	if len(known) > 0 {
		list = "declared: " + strings.Join(known, ", ")
	}
	v.warn("spec.provider.name", p.Name, "unknown provider: every request that matches is denied (%s)", list)
}

func (v *validation) rule(field string, r policy.Rule, action string) {
	if r.From != nil && len(r.From) == 0 {
		v.refuse(field+".from", "", "must not be empty; leave it out to match every source")
	}
	if r.To != nil && len(r.To) == 0 {
		v.refuse(field+".to", "", "must not be empty; leave it out to match every operation")
	}
	if len(r.From)+len(r.To)+len(r.When) == 0 {
		v.emptyRule(field, action)
	}
	// The CRDs bound rules but not what is in them; without this a single rule
	// could outgrow every limit.
	if n := max(len(r.From), len(r.To), len(r.When)); n > maxRules {
		v.refuse(field, "", "%d entries in one of its lists, at most %d are allowed", n, maxRules)
		return
	}
	for i, from := range r.From {
		v.source(itemPath(field+".from", i)+".source", from.Source, action)
	}
	for i, to := range r.To {
		v.operation(itemPath(field+".to", i)+".operation", to.Operation)
	}
	for i, c := range r.When {
		v.condition(itemPath(field+".when", i), c, action)
	}
	v.onTCP(field, r, action)
}

func (v *validation) emptyRule(field, action string) {
	switch action {
	case policy.ActionAllow:
		v.warn(field, "", "an empty rule allows every request, callers without identity included")
	case policy.ActionDeny:
		v.warn(field, "", "an empty rule denies every request")
	}
}

// listField is one list of strings in a source or an operation.
type listField struct {
	name   string
	values []string
	check  func(v *validation, field string, value string)
}

func sourceFields(s *policy.Source) []listField {
	return []listField{
		{"principals", s.Principals, checkPrincipal},
		{"notPrincipals", s.NotPrincipals, checkPrincipal},
		{"requestPrincipals", s.RequestPrincipals, checkRequestPrincipal},
		{"notRequestPrincipals", s.NotRequestPrincipals, checkRequestPrincipal},
		{"namespaces", s.Namespaces, checkNamespace},
		{"notNamespaces", s.NotNamespaces, checkNamespace},
		{"serviceAccounts", s.ServiceAccounts, checkServiceAccount},
		{"notServiceAccounts", s.NotServiceAccounts, checkServiceAccount},
		{"trustDomains", s.TrustDomains, checkTrustDomain},
		{"notTrustDomains", s.NotTrustDomains, checkTrustDomain},
		{"ipBlocks", s.IPBlocks, checkIPBlock},
		{"notIpBlocks", s.NotIPBlocks, checkIPBlock},
		{"remoteIpBlocks", s.RemoteIPBlocks, checkIPBlock},
		{"notRemoteIpBlocks", s.NotRemoteIPBlocks, checkIPBlock},
	}
}

func operationFields(o *policy.Operation) []listField {
	return []listField{
		{"hosts", o.Hosts, checkString},
		{"notHosts", o.NotHosts, checkString},
		{"ports", o.Ports, checkPort},
		{"notPorts", o.NotPorts, checkPort},
		{"methods", o.Methods, checkMethod},
		{"notMethods", o.NotMethods, checkMethod},
		{"paths", o.Paths, checkPathValue},
		{"notPaths", o.NotPaths, checkPathValue},
	}
}

func (v *validation) source(field string, s *policy.Source, action string) {
	if s == nil {
		v.refuse(field, "", "required and must not be empty; leave `from` out to match every source")
		return
	}
	fields := sourceFields(s)
	if !v.lists(field, fields) {
		v.refuse(field, "", "must not be empty; leave `from` out to match every source")
		return
	}
	accounts := len(s.ServiceAccounts) + len(s.NotServiceAccounts)
	named := len(s.Principals) + len(s.NotPrincipals) + len(s.Namespaces) + len(s.NotNamespaces)
	if accounts > 0 && named > 0 {
		v.refuse(field, "", "serviceAccounts cannot stand with principals or namespaces; say it all with one of them")
	}
	for _, f := range fields {
		if strings.HasSuffix(strings.ToLower(f.name), "serviceaccounts") && len(f.values) > maxServiceAccounts {
			v.refuse(field+"."+f.name, "", "%d accounts, at most %d are allowed", len(f.values), maxServiceAccounts)
		}
		if action == policy.ActionCustom && len(f.values) > 0 && !customMayUse(f.name) {
			v.refuse(field+"."+f.name, f.values[0], "not with action CUSTOM: the provider is asked before identities are judged; allowed: ipBlocks, remoteIpBlocks")
		}
	}
	if action == policy.ActionAllow {
		v.negativeIdentity(field, s)
	}
}

// customMayUse is rule 22: nothing derived from mTLS or a token.
func customMayUse(source string) bool {
	return strings.HasSuffix(source, "pBlocks")
}

// negativeIdentity warns of rule 6: callers without identity pass every `not`.
func (v *validation) negativeIdentity(field string, s *policy.Source) {
	positive := len(s.Principals) + len(s.Namespaces) + len(s.ServiceAccounts) + len(s.TrustDomains)
	negative := len(s.NotPrincipals) + len(s.NotNamespaces) + len(s.NotServiceAccounts) + len(s.NotTrustDomains)
	if negative > 0 && positive == 0 {
		v.warn(field, "", "only excludes identities, so it allows callers that have none; add principals: [\"*\"] to ask for one")
	}
	if len(s.NotRequestPrincipals) > 0 && len(s.RequestPrincipals) == 0 {
		v.warn(field, "", "only excludes tokens, so it allows requests that carry none; add requestPrincipals: [\"*\"] to ask for one")
	}
}

func (v *validation) operation(field string, o *policy.Operation) {
	if o == nil || !v.lists(field, operationFields(o)) {
		v.refuse(field, "", "must not be empty; leave `to` out to match every operation")
	}
}

// lists checks every value of every list, and reports whether any list has one.
func (v *validation) lists(field string, fields []listField) bool {
	var given bool
	for _, f := range fields {
		given = given || len(f.values) > 0
	}
	for _, f := range fields {
		name := field + "." + f.name
		if given && f.values != nil && len(f.values) == 0 {
			v.warn(name, "", "an empty list is read as an absent one and restricts nothing")
		}
		v.values(name, f.values, f.check)
	}
	return given
}

func (v *validation) values(field string, values []string, check func(*validation, string, string)) {
	for i, value := range values {
		item := itemPath(field, i)
		if value == "" {
			v.refuse(item, "", "an empty string is not allowed")
			continue
		}
		if !v.short(item, value) {
			continue
		}
		check(v, item, value)
	}
}
