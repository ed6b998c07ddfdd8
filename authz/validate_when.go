package authz

import (
	"strings"

	"castellan.dev/api/policy"
)

// retiredKeys are `when` keys that policies of the field may have, with what to
// use instead.
var retiredKeys = [...][2]string{
	{"destination.labels", "use selector.matchLabels"},
	{"destination.namespace", "use metadata.namespace"},
	{"destination.name", "use selector.matchLabels"},
	{"destination.user", "use selector.matchLabels"},
	{"request.headers[:path]", "use operation.paths, which are compared with the normalised path"},
	{"experimental.envoy.filters.", "castellan-proxy has no Envoy filters whose metadata could be matched"},
}

const allowedKeys = "request.headers[NAME], request.auth.principal, request.auth.audiences, request.auth.presenter, " +
	"request.auth.claims[NAME], source.ip, remote.ip, source.namespace, source.principal, source.serviceAccount, " +
	"source.trustDomain, destination.ip, destination.port, connection.sni"

// condition is rules 17, 21 and 22.
func (v *validation) condition(field string, c policy.Condition, action string) {
	if len(c.Values) == 0 && len(c.NotValues) == 0 {
		v.refuse(field, c.Key, "at least one of values and notValues is required")
	}
	if !v.short(field+".key", c.Key) {
		return
	}
	key, err := parseKey(c.Key)
	if err != nil {
		v.refuse(field+".key", c.Key, "%v%s; allowed: %s", err, retired(c.Key), allowedKeys)
		return
	}
	check := conditionCheck(key.attr)
	for _, list := range []listField{{"values", c.Values, check}, {"notValues", c.NotValues, check}} {
		if list.values != nil && len(list.values) == 0 && len(c.Values)+len(c.NotValues) > 0 {
			v.warn(field+"."+list.name, "", "an empty list is read as an absent one and restricts nothing")
		}
		v.values(field+"."+list.name, list.values, list.check)
	}
	v.conditionAction(field, c, action)
}

func retired(key string) string {
	for _, r := range retiredKeys {
		if strings.HasPrefix(key, r[0]) {
			return ": " + r[1]
		}
	}
	return ""
}

// conditionCheck returns what to check a key's values with.
func conditionCheck(a attr) func(*validation, string, string) {
	switch a {
	case attrSourceIP, attrDestinationIP, attrRemoteIP:
		return checkIPBlock
	case attrPort:
		return checkPort
	case attrNamespace:
		return checkNamespace
	case attrPrincipal:
		return checkPrincipal
	case attrAccount:
		return checkServiceAccount
	case attrTrustDomain:
		return checkTrustDomain
	case attrSubject:
		return checkRequestPrincipal
	case attrMethod:
		return checkMethod
	default:
		return checkString
	}
}

func (v *validation) conditionAction(field string, c policy.Condition, action string) {
	caller := strings.HasPrefix(c.Key, "source.") && c.Key != "source.ip"
	token := strings.HasPrefix(c.Key, "request.auth.")
	switch {
	case action == policy.ActionCustom && (caller || token):
		v.refuse(field+".key", c.Key, "not with action CUSTOM: its provider is asked before identities and tokens are judged")
	case action == policy.ActionAllow && caller && len(c.Values) == 0:
		v.warn(field+".notValues", "", "only excludes identities, so it allows callers that have none; add a source with principals: [\"*\"] to ask for one")
	case action == policy.ActionAllow && token && len(c.Values) == 0:
		v.warn(field+".notValues", "", "only excludes tokens, so it allows requests that carry none; add requestPrincipals: [\"*\"] to ask for one")
	}
}
