package reference

import (
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"castellan.dev/api/policy"
)

// soundRule drops from a rule what cannot be represented (rule 21) and says
// whether the rule was whole: if it was not, it must never allow.
func soundRule(r policy.Rule) (sound policy.Rule, whole bool) {
	whole = (r.From == nil || len(r.From) > 0) && (r.To == nil || len(r.To) > 0)
	keep := func(values []string, ok func(string) bool) []string {
		for _, v := range values {
			if v == "" || !ok(v) {
				whole = false
				return nil
			}
		}
		return values
	}
	for _, f := range r.From {
		s := policy.Source{}
		if f.Source != nil {
			s = soundSource(*f.Source, keep)
		}
		if f.Source == nil || emptySource(*f.Source) {
			whole = false
		}
		sound.From = append(sound.From, policy.From{Source: &s})
	}
	for _, t := range r.To {
		o := policy.Operation{}
		if t.Operation != nil {
			o = soundOperation(*t.Operation, keep)
		}
		if t.Operation == nil || emptyOperation(*t.Operation) {
			whole = false
		}
		sound.To = append(sound.To, policy.To{Operation: &o})
	}
	for _, c := range r.When {
		ok := soundValue(c.Key)
		if ok == nil || len(c.Values)+len(c.NotValues) == 0 {
			whole = false
			continue
		}
		before := whole
		whole = true
		keep(c.Values, ok)
		keep(c.NotValues, ok)
		if whole {
			sound.When = append(sound.When, c)
		}
		whole = whole && before
	}
	return sound, whole
}

func emptySource(s policy.Source) bool {
	return len(slices.Concat(s.Principals, s.NotPrincipals, s.RequestPrincipals, s.NotRequestPrincipals,
		s.Namespaces, s.NotNamespaces, s.ServiceAccounts, s.NotServiceAccounts, s.TrustDomains, s.NotTrustDomains,
		s.IPBlocks, s.NotIPBlocks, s.RemoteIPBlocks, s.NotRemoteIPBlocks)) == 0
}

func emptyOperation(o policy.Operation) bool {
	return len(slices.Concat(o.Hosts, o.NotHosts, o.Ports, o.NotPorts, o.Methods, o.NotMethods, o.Paths, o.NotPaths)) == 0
}

func soundSource(s policy.Source, keep func([]string, func(string) bool) []string) policy.Source {
	return policy.Source{
		Principals:           keep(s.Principals, anyString),
		NotPrincipals:        keep(s.NotPrincipals, anyString),
		RequestPrincipals:    keep(s.RequestPrincipals, anyString),
		NotRequestPrincipals: keep(s.NotRequestPrincipals, anyString),
		Namespaces:           keep(s.Namespaces, anyString),
		NotNamespaces:        keep(s.NotNamespaces, anyString),
		ServiceAccounts:      keep(s.ServiceAccounts, soundAccount),
		NotServiceAccounts:   keep(s.NotServiceAccounts, soundAccount),
		TrustDomains:         keep(s.TrustDomains, soundDomain),
		NotTrustDomains:      keep(s.NotTrustDomains, soundDomain),
		IPBlocks:             keep(s.IPBlocks, soundBlock),
		NotIPBlocks:          keep(s.NotIPBlocks, soundBlock),
		RemoteIPBlocks:       keep(s.RemoteIPBlocks, soundBlock),
		NotRemoteIPBlocks:    keep(s.NotRemoteIPBlocks, soundBlock),
	}
}

func soundOperation(o policy.Operation, keep func([]string, func(string) bool) []string) policy.Operation {
	return policy.Operation{
		Hosts:      keep(o.Hosts, anyString),
		NotHosts:   keep(o.NotHosts, anyString),
		Ports:      keep(o.Ports, soundPort),
		NotPorts:   keep(o.NotPorts, soundPort),
		Methods:    keep(o.Methods, anyString),
		NotMethods: keep(o.NotMethods, anyString),
		Paths:      keep(o.Paths, soundPath),
		NotPaths:   keep(o.NotPaths, soundPath),
	}
}

func anyString(string) bool { return true }

var (
	headerKey = regexp.MustCompile("^request\\.headers\\[([-!#$%&'*+.^_`|~0-9A-Za-z]+|:(?i:authority|method))\\]$")
	claimKey  = regexp.MustCompile(`^request\.auth\.claims(\[[^\[\]]+\])+$`)
)

// soundValue says which values a `when` key takes; nil for a key nobody knows.
func soundValue(key string) func(string) bool {
	switch key {
	case "source.ip", "remote.ip", "destination.ip":
		return soundBlock
	case "source.serviceAccount":
		return soundAccount
	case "source.trustDomain":
		return soundDomain
	case "destination.port":
		return soundPort
	case "source.namespace", "source.principal", "request.auth.principal", "request.auth.audiences",
		"request.auth.presenter", "connection.sni":
		return anyString
	}
	if headerKey.MatchString(key) || claimKey.MatchString(key) {
		return anyString
	}
	return nil
}

var account = regexp.MustCompile(`^[^/*]+(/[^/*]+)?$`)

func soundAccount(v string) bool { return len(v) <= 320 && account.MatchString(v) }

var domain = regexp.MustCompile(`^(\*|[^*/]+|\*[^*/]+|[^*/]+\*)$`)

func soundDomain(v string) bool { return domain.MatchString(v) }

func soundBlock(v string) bool {
	if _, err := netip.ParsePrefix(v); err == nil {
		return true
	}
	a, err := netip.ParseAddr(v)
	return err == nil && a.Zone() == ""
}

func soundPort(v string) bool {
	n, err := strconv.Atoi(v)
	return err == nil && n >= 0 && n <= 65535 && strings.Trim(v, "0123456789") == ""
}

// template is rule 10: whole segments of pchar, {*} or {**}, and no operator
// after {**}.
var template = regexp.MustCompile(`^(/(` + pchar + `*|\{\*\}))*(/\{\*\*\}(/` + pchar + `*)*)?$`)

const pchar = `([-A-Za-z0-9._~!$&'()+,;=:@]|%[0-9A-Fa-f]{2})`

func soundPath(v string) bool {
	if !strings.ContainsAny(v, "{}") {
		return true
	}
	return isTemplate(v) && template.MatchString(v)
}

func isTemplate(v string) bool { return strings.Contains(v, "{*}") || strings.Contains(v, "{**}") }
