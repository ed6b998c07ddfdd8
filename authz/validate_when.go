package authz

import (
	"strings"

	"castellan.dev/api/policy"
)

// conditionKeys are the `when` keys without a name in brackets (rule 17), each
// with the check of its values.
var conditionKeys = [...]struct {
	key   string
	check func(*validation, string, string)
}{
	{"source.ip", checkIPBlock},
	{"remote.ip", checkIPBlock},
	{"source.namespace", checkNamespace},
	{"source.principal", checkPrincipal},
	{"source.serviceAccount", checkServiceAccount},
	{"source.trustDomain", checkTrustDomain},
	{"request.auth.principal", checkRequestPrincipal},
	{"request.auth.audiences", checkString},
	{"request.auth.presenter", checkString},
	{"destination.ip", checkIPBlock},
	{"destination.port", checkPort},
	{"connection.sni", checkString},
}

// retiredKeys are those that older policies have, with what replaces them.
var retiredKeys = [...][2]string{
	{"destination.labels", "use selector.matchLabels"},
	{"destination.namespace", "use metadata.namespace"},
	{"destination.name", "use selector.matchLabels"},
	{"destination.user", "use selector.matchLabels"},
	{"experimental.envoy.filters.", "castellan-proxy has no Envoy filters whose metadata could be matched"},
}

const allowedKeys = "allowed: request.headers[NAME], request.auth.principal, request.auth.audiences, request.auth.presenter, " +
	"request.auth.claims[NAME], source.ip, remote.ip, source.namespace, source.principal, source.serviceAccount, " +
	"source.trustDomain, destination.ip, destination.port, connection.sni"

// condition is rules 17, 21 and 22.
func (v *validation) condition(field string, c policy.Condition, action string) {
	if len(c.Values) == 0 && len(c.NotValues) == 0 {
		v.refuse(field, c.Key, "at least one of values and notValues is required")
	}
	check, reason := conditionCheck(c.Key)
	if check == nil {
		v.refuse(field+".key", c.Key, "%s", reason)
		return
	}
	for _, list := range []listField{{"values", c.Values, check}, {"notValues", c.NotValues, check}} {
		if list.values != nil && len(list.values) == 0 && len(c.Values)+len(c.NotValues) > 0 {
			v.warn(field+"."+list.name, "", "an empty list is read as an absent one and restricts nothing")
		}
		v.values(field+"."+list.name, list.values, list.check)
	}
	v.conditionAction(field, c, action)
}

func (v *validation) conditionAction(field string, c policy.Condition, action string) {
	identity := strings.HasPrefix(c.Key, "source.") && c.Key != "source.ip"
	token := strings.HasPrefix(c.Key, "request.auth.")
	switch {
	case action == policy.ActionCustom && (identity || token):
		v.refuse(field+".key", c.Key, "not with action CUSTOM: the provider is asked before identities and tokens are judged")
	case action == policy.ActionAllow && identity && len(c.Values) == 0:
		v.warn(field+".notValues", "", "only excludes identities, so it allows callers that have none; add values: [\"*\"] where that is allowed, or principals: [\"*\"]")
	case action == policy.ActionAllow && token && len(c.Values) == 0:
		v.warn(field+".notValues", "", "only excludes tokens, so it allows requests that carry none; add requestPrincipals: [\"*\"]")
	}
}

// conditionCheck returns the check of a key's values, or why the key is refused.
func conditionCheck(key string) (check func(*validation, string, string), reason string) {
	for _, k := range conditionKeys {
		if k.key == key {
			return k.check, ""
		}
	}
	if key == "" {
		return nil, "required; " + allowedKeys
	}
	for _, r := range retiredKeys {
		if strings.HasPrefix(key, r[0]) {
			return nil, "not served: " + r[1]
		}
	}
	if name, ok := strings.CutPrefix(key, "request.headers"); ok {
		return headerKey(name)
	}
	if names, ok := strings.CutPrefix(key, "request.auth.claims"); ok {
		return claimKey(names)
	}
	return nil, "unknown key; " + allowedKeys
}

func headerKey(bracketed string) (check func(*validation, string, string), reason string) {
	name, ok := inBrackets(bracketed)
	switch {
	case !ok:
		return nil, "malformed; allowed: request.headers[NAME]"
	case name == ":authority" || name == ":method":
		return checkString, ""
	case strings.HasPrefix(name, ":"):
		return nil, "not served; allowed of the pseudo-headers: :authority, :method (for the path use operation.paths, which is normalised)"
	case !headerName(name):
		return nil, "not the name of a header; allowed: letters, digits and !#$%&'*+-.^_`|~"
	default:
		return checkString, ""
	}
}

// claimKey reads [a][b][c].
func claimKey(bracketed string) (check func(*validation, string, string), reason string) {
	rest := bracketed
	for rest != "" {
		end := strings.IndexByte(rest, ']')
		if end < 0 {
			break
		}
		if _, ok := inBrackets(rest[:end+1]); !ok {
			break
		}
		rest = rest[end+1:]
	}
	if bracketed == "" || rest != "" {
		return nil, "malformed; allowed: request.auth.claims[NAME], request.auth.claims[NAME][NESTED]"
	}
	return checkString, ""
}

// inBrackets returns what stands in one pair of brackets.
func inBrackets(s string) (string, bool) {
	inner, open := strings.CutPrefix(s, "[")
	inner, closed := strings.CutSuffix(inner, "]")
	return inner, open && closed && inner != "" && !strings.ContainsAny(inner, "[]")
}

// headerName checks an RFC 9110 token.
func headerName(name string) bool {
	for _, c := range []byte(name) {
		alphanumeric := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !alphanumeric && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return name != ""
}
