package authz

import (
	"slices"
	"strconv"
	"strings"

	"castellan.dev/api/policy"
)

// onTCP warns of rules that a TCP port reads otherwise than an HTTP port does
// (rules 19 and 20): an ALLOW rule with an HTTP field never matches there, and a
// DENY or CUSTOM rule loses the field and so matches more.
func (v *validation) onTCP(field string, r policy.Rule, action string) {
	fields := httpFields(field, r)
	if len(fields) == 0 || action == policy.ActionAudit || !v.reachesTCP(r, action) {
		return
	}
	for _, f := range fields {
		if action == policy.ActionAllow {
			v.warn(f, "", "HTTP only: on a TCP port this whole rule never allows; give TCP ports a rule of their own")
			continue
		}
		v.warn(f, "", "HTTP only: on a TCP port this field is dropped and the rule applies to all that the rest of it matches; name the HTTP ports in `ports`")
	}
}

// reachesTCP says whether a rule can apply to a TCP port. Where nobody declared
// ports, a DENY or CUSTOM rule can unless it names the ports it is for; an ALLOW
// rule is not held against its author, since it can only allow less.
func (v *validation) reachesTCP(r policy.Rule, action string) bool {
	if v.ports == nil {
		return action != policy.ActionAllow && !namesPorts(r)
	}
	for port, protocol := range v.ports {
		if isTCP(protocol) && reachesPort(r, strconv.Itoa(int(port))) {
			return true
		}
	}
	return false
}

// isTCP holds for declared protocols that are not HTTP. An undeclared one is
// told apart by its first bytes and so may be either.
func isTCP(protocol string) bool {
	switch p := strings.ToLower(protocol); {
	case p == "", strings.HasPrefix(p, "http") && p != "https", strings.HasPrefix(p, "grpc"):
		return false
	case p == "h2c", p == "kubernetes.io/h2c", p == "kubernetes.io/ws":
		return false
	default:
		return true
	}
}

func namesPorts(r policy.Rule) bool {
	for _, c := range r.When {
		if c.Key == "destination.port" && len(c.Values) > 0 {
			return true
		}
	}
	for _, to := range r.To {
		if to.Operation == nil || len(to.Operation.Ports) == 0 {
			return false
		}
	}
	return len(r.To) > 0
}

func reachesPort(r policy.Rule, port string) bool {
	for _, c := range r.When {
		if c.Key == "destination.port" && (len(c.Values) > 0 && !slices.Contains(c.Values, port) || slices.Contains(c.NotValues, port)) {
			return false
		}
	}
	for _, to := range r.To {
		o := to.Operation
		if o == nil || (len(o.Ports) == 0 || slices.Contains(o.Ports, port)) && !slices.Contains(o.NotPorts, port) {
			return true
		}
	}
	return len(r.To) == 0
}

// httpFields lists the paths of a rule's HTTP-only fields (rule 19).
func httpFields(field string, r policy.Rule) []string {
	var fields []string
	add := func(prefix string, lists []listField, httpOnly func(string) bool) {
		for _, l := range lists {
			if len(l.values) > 0 && httpOnly(strings.ToLower(l.name)) {
				fields = append(fields, prefix+"."+l.name)
			}
		}
	}
	for i, from := range r.From {
		if from.Source != nil {
			add(itemPath(field+".from", i)+".source", sourceFields(from.Source), func(name string) bool {
				return strings.HasSuffix(name, "requestprincipals")
			})
		}
	}
	for i, to := range r.To {
		if to.Operation != nil {
			add(itemPath(field+".to", i)+".operation", operationFields(to.Operation), func(name string) bool {
				return !strings.HasSuffix(name, "ports")
			})
		}
	}
	for i, c := range r.When {
		if strings.HasPrefix(c.Key, "request.") {
			fields = append(fields, itemPath(field+".when", i)+".key")
		}
	}
	return fields
}
