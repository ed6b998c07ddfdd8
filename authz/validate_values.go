package authz

import (
	"slices"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/identity"
)

// The checks below get values that are not empty.

// checkString warns of a `*` that does not mean what it seems to (rule 7).
func checkString(v *validation, field, value string) {
	switch rest, leading := strings.CutPrefix(value, "*"); {
	case value == "*":
	case leading && strings.Contains(rest, "*"):
		v.warn(field, value, "the leading * makes this a suffix match and every further * literal")
	case !leading && strings.Contains(strings.TrimSuffix(value, "*"), "*"):
		v.warn(field, value, "a * in the middle is literal; allowed as wildcard: *, prefix*, *suffix")
	}
}

// checkPrincipal is rules 7 and 11.
func checkPrincipal(v *validation, field, value string) {
	if strings.HasPrefix(value, "spiffe://") {
		v.warn(field, value, "never matches: a principal is written without the scheme, as in \"cluster.local/ns/NAMESPACE/sa/ACCOUNT\"")
		return
	}
	if value == "*" {
		return
	}
	if rest, leading := strings.CutPrefix(value, "*"); leading && !strings.Contains(rest, "*") {
		return
	}
	checkString(v, field, value)
	if strings.HasPrefix(value, "*") {
		return
	}
	td, path, ok := strings.Cut(value, "/")
	segments := strings.Count(path, "/") + 1
	switch {
	case !ok:
		if !strings.HasSuffix(value, "*") {
			v.warn(field, value, "never matches: a trust domain alone names no workload; write TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT")
		}
	case segments != 4 && v.expands(td):
		v.warn(field, value, "trust domain %q is taken literally here: only a principal of the form TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT stands for the mesh's domain and its aliases", td)
	}
}

// expands says whether a trust domain of a principal stands for others too.
func (v *validation) expands(td string) bool {
	full := td + "/ns/n/sa/n"
	meant := v.domains().principal(full)
	return len(meant) != 1 || meant[0] != full
}

// checkRequestPrincipal is rule 15.
func checkRequestPrincipal(v *validation, field, value string) {
	slash := strings.LastIndex(value, "/")
	stars := strings.Count(value, "*")
	switch {
	case value == "*":
	case value == "*/*":
		v.warn(field, value, "matches a subject of exactly \"*\" only; write * for any token")
	case slash < 0 && stars == 0:
		v.warn(field, value, "never matches: a request principal is ISSUER/SUBJECT")
	case strings.HasPrefix(value, "*") && strings.HasSuffix(value, "*") && stars > 1:
		v.warn(field, value, "the leading * wins and the last one is literal")
	case stars > 1, stars == 1 && !strings.HasPrefix(value, "*") && !strings.HasSuffix(value, "*"):
		v.warn(field, value, "a * in the middle is literal; allowed as wildcard: *, ISSUER/*, ISSUER/prefix*, */SUBJECT, *suffix/SUBJECT, *suffix, prefix*")
	}
}

// checkNamespace is rule 12; the namespace of a policy may have wildcards anywhere.
func checkNamespace(v *validation, field, value string) {
	if strings.Trim(value, "abcdefghijklmnopqrstuvwxyz0123456789-*") != "" {
		v.warn(field, value, "never matches: not the name of a namespace (lower-case letters, digits, - and * are allowed)")
	}
}

// checkServiceAccount is rule 13.
func checkServiceAccount(v *validation, field, value string) {
	if _, err := parseAccount(value, v.namespace); err != nil {
		v.refuse(field, value, "%v; allowed: ACCOUNT or NAMESPACE/ACCOUNT (for patterns use namespaces or principals)", err)
		return
	}
	if !strings.Contains(value, "/") {
		value = v.namespace + "/" + value
	}
	if _, err := identity.ParseAccount(value); err != nil {
		v.warn(field, value, "never matches: no service account can have this name")
	}
}

// checkTrustDomain is rule 14.
func checkTrustDomain(v *validation, field, value string) {
	if _, err := parseTrustDomain(value); err != nil {
		v.refuse(field, value, "%v; allowed: NAME, prefix*, *suffix, *", err)
		return
	}
	switch own := v.domains()[0]; {
	case strings.Trim(value, "abcdefghijklmnopqrstuvwxyz0123456789-._*") != "":
		v.warn(field, value, "never matches: not a trust domain (lower-case letters, digits, -, . and _ are allowed)")
	case value == clusterLocal && !slices.Contains(v.domains(), value):
		v.warn(field, value, "literal here: it does not stand for the mesh's trust domain %q as it does in principals", own)
	}
}

// checkIPBlock is rule 16.
func checkIPBlock(v *validation, field, value string) {
	if _, err := parseNet(value); err != nil {
		v.refuse(field, value, "%v; allowed as in 203.0.113.4, 203.0.113.0/24, 2001:db8::/32", err)
	}
}

// checkPort is rule 9.
func checkPort(v *validation, field, value string) {
	if _, err := parsePort(value); err != nil {
		v.refuse(field, value, "not a port; allowed: 0 to 65535, of the workload, not of its service")
	}
}

// checkMethod is rules 7 and 24: methods are compared as they are, and requests
// with one in lower case are refused before policy sees them.
func checkMethod(v *validation, field, value string) {
	checkString(v, field, value)
	if strings.ToUpper(value) != value {
		v.warn(field, value, "never matches: methods are upper case, and gRPC is POST")
	}
}

// checkPathValue is rule 10.
func checkPathValue(v *validation, field, value string) {
	if _, err := parsePath(value); err != nil {
		v.refuse(field, value, "%v; allowed: {*} for one segment, {**} for any number, each as a whole segment, {**} last", err)
		return
	}
	if !strings.ContainsAny(value, "{}") {
		checkString(v, field, value)
	}
	literal := strings.TrimSuffix(value, "*")
	switch {
	case value == "*" || strings.HasPrefix(value, "*"):
	case !strings.HasPrefix(value, "/"):
		v.warn(field, value, "never matches: a path starts with \"/\"")
	case strings.ContainsAny(literal, "?#"):
		v.warn(field, value, "never matches: query and fragment are not part of the path")
	case !strings.ContainsAny(literal, "{}*"):
		v.normalPath(field, value, literal)
	}
}

// normalPath warns of a path that no request has once it is normalised (rule 24).
func (v *validation) normalPath(field, value, literal string) {
	option := v.mesh.PathNormalization
	if option == "" {
		option = policy.NormalizeBase
	}
	normal, err := NormalizePath(option, literal)
	if err != nil || normal != literal && value == literal {
		v.warn(field, value, "never matches: under the mesh's pathNormalization %s no request has this path; write %q", option, normal)
	}
}
