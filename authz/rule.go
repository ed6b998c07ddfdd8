package authz

import (
	"errors"
	"fmt"

	"castellan.dev/api/policy"
)

// draft is what one field or condition asks, before sets are built.
type draft struct {
	ref      ref
	pos, neg []pattern // nil: does not ask
}

// conj is an AND of drafts; an empty one holds always.
type conj []draft

// ruleDraft is a rule in the form (OR of from) AND (OR of to) AND when.
type ruleDraft struct {
	from, to []conj // empty: not asked
	when     conj
}

// reader turns the rules of one policy into drafts. What cannot be represented
// fails closed (rule 21): an ALLOW rule that holds it is void, every other one
// loses the field and matches more. On TCP the HTTP-only fields are treated the
// same way (rules 19 and 20 as decided).
type reader struct {
	namespace string
	allow     bool
	tcp       bool
	domains   domains
	// report takes what cannot be represented; nil reports nothing.
	report func(field, value, reason string)

	void     bool // of the rule being read
	httpOnly bool // some field so far means nothing on TCP
}

// read returns the rule's draft, or false if it never matches.
func (r *reader) read(rule policy.Rule, field string) (ruleDraft, bool) {
	r.void = false
	var d ruleDraft
	if rule.From != nil && len(rule.From) == 0 {
		r.fail(field+".from", "", errors.New("empty list"))
	}
	for i, from := range rule.From {
		d.from = append(d.from, r.source(from.Source, fmt.Sprintf("%s.from[%d].source", field, i)))
	}
	if rule.To != nil && len(rule.To) == 0 {
		r.fail(field+".to", "", errors.New("empty list"))
	}
	for i, to := range rule.To {
		d.to = append(d.to, r.operation(to.Operation, fmt.Sprintf("%s.to[%d].operation", field, i)))
	}
	for i, c := range rule.When {
		d.when = append(d.when, r.condition(c, fmt.Sprintf("%s.when[%d]", field, i))...)
	}
	return d, !r.void
}

func (r *reader) source(s *policy.Source, field string) conj {
	if s == nil {
		s = new(policy.Source)
	}
	return r.fields(field, []fieldValues{
		{attrPrincipal, "principals", s.Principals, "notPrincipals", s.NotPrincipals},
		{attrSubject, "requestPrincipals", s.RequestPrincipals, "notRequestPrincipals", s.NotRequestPrincipals},
		{attrNamespace, "namespaces", s.Namespaces, "notNamespaces", s.NotNamespaces},
		{attrAccount, "serviceAccounts", s.ServiceAccounts, "notServiceAccounts", s.NotServiceAccounts},
		{attrTrustDomain, "trustDomains", s.TrustDomains, "notTrustDomains", s.NotTrustDomains},
		{attrSourceIP, "ipBlocks", s.IPBlocks, "notIpBlocks", s.NotIPBlocks},
		{attrRemoteIP, "remoteIpBlocks", s.RemoteIPBlocks, "notRemoteIpBlocks", s.NotRemoteIPBlocks},
	})
}

func (r *reader) operation(o *policy.Operation, field string) conj {
	if o == nil {
		o = new(policy.Operation)
	}
	return r.fields(field, []fieldValues{
		{attrHost, "hosts", o.Hosts, "notHosts", o.NotHosts},
		{attrPort, "ports", o.Ports, "notPorts", o.NotPorts},
		{attrMethod, "methods", o.Methods, "notMethods", o.NotMethods},
		{attrPath, "paths", o.Paths, "notPaths", o.NotPaths},
	})
}

// fieldValues is a field and its negation.
type fieldValues struct {
	attr    attr
	name    string
	values  []string
	notName string
	not     []string
}

func (r *reader) fields(field string, list []fieldValues) conj {
	var c conj
	asked := false
	for _, f := range list {
		if len(f.values)+len(f.not) == 0 {
			continue
		}
		asked = true
		d := draft{ref: ref{attr: f.attr}}
		if len(f.values) > 0 {
			d.pos = r.values(d.ref, f.values, field+"."+f.name)
		}
		if len(f.not) > 0 {
			d.neg = r.values(d.ref, f.not, field+"."+f.notName)
		}
		if d.pos != nil || d.neg != nil {
			c = append(c, d)
		}
	}
	if !asked {
		r.fail(field, "", errors.New("empty: it would match everything"))
	}
	return c
}

func (r *reader) condition(c policy.Condition, field string) conj {
	key, err := parseKey(c.Key)
	if err != nil {
		r.fail(field+".key", c.Key, err)
		return nil
	}
	if len(c.Values)+len(c.NotValues) == 0 {
		r.fail(field, c.Key, errors.New("neither values nor notValues"))
		return nil
	}
	// What is wrong in either list drops the condition, not half of it.
	d := draft{ref: key}
	if len(c.Values) > 0 {
		if d.pos = r.values(key, c.Values, field+".values"); d.pos == nil {
			return nil
		}
	}
	if len(c.NotValues) > 0 {
		if d.neg = r.values(key, c.NotValues, field+".notValues"); d.neg == nil {
			return nil
		}
	}
	return conj{d}
}

// values parses one list; nil if it is to be dropped.
func (r *reader) values(at ref, values []string, field string) []pattern {
	if at.attr.httpOnly() {
		r.httpOnly = true
		if r.tcp {
			// An ALLOW fails closed by not matching, the others by matching more.
			r.void = r.void || r.allow
			return nil
		}
	}
	patterns := make([]pattern, 0, len(values))
	ok := true
	for i, value := range values {
		if len(value) > maxValue {
			r.fail(fmt.Sprintf("%s[%d]", field, i), value, errLongValue)
			ok = false
			continue
		}
		for _, v := range r.domains.expand(at.attr, value) {
			p, err := at.parse(v, r.namespace)
			if err != nil {
				r.fail(fmt.Sprintf("%s[%d]", field, i), value, err)
				ok = false
				break
			}
			patterns = append(patterns, p)
		}
	}
	if !ok {
		return nil
	}
	return patterns
}

func (r *reader) fail(field, value string, err error) {
	r.void = r.void || r.allow
	if r.report != nil {
		r.report(field, value, err.Error())
	}
}
