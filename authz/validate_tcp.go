package authz

import (
	"maps"
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
	if !v.declared {
		return action != policy.ActionAllow && !namesPorts(r)
	}
	return reachesAny(r, v.tcp)
}

// ports are workload ports, as policies write them.
type ports map[string]bool

// tcpPorts are the ports that some of the workloads declare to be TCP.
func tcpPorts(sets ...map[uint16]string) ports {
	out := ports{}
	for _, set := range sets {
		for port, protocol := range set {
			if isTCP(protocol) {
				out[strconv.Itoa(int(port))] = true
			}
		}
	}
	return out
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

// reachesAny says whether a rule can apply to one of the ports. Every value is
// looked at once, however many ports there are.
func reachesAny(r policy.Rule, left ports) bool {
	for _, c := range r.When {
		if c.Key == "destination.port" {
			left = left.narrow(c.Values, c.NotValues)
		}
	}
	if len(left) == 0 || len(r.To) == 0 {
		return len(left) > 0
	}
	return slices.ContainsFunc(r.To, func(to policy.To) bool {
		return to.Operation == nil || len(left.narrow(to.Operation.Ports, to.Operation.NotPorts)) > 0
	})
}

// narrow returns the ports that are among values, unless those are none, and not
// among others. p stays as it is.
func (p ports) narrow(values, others []string) ports {
	out := p
	if len(values) > 0 {
		out = ports{}
		for _, v := range values {
			if p[v] {
				out[v] = true
			}
		}
	}
	copied := len(values) > 0
	for _, v := range others {
		if !out[v] {
			continue
		}
		if !copied {
			out, copied = maps.Clone(out), true
		}
		delete(out, v)
	}
	return out
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
