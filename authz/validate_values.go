package authz

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"castellan.dev/api/policy"
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

// expands says whether a trust domain stands for other names than its own.
func (v *validation) expands(td string) bool {
	known := v.knownDomains()
	if td == "cluster.local" && (len(known) > 1 || known[0] != td) {
		return true
	}
	return len(known) > 1 && slices.Contains(known, td)
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
	ns, name, slash := strings.Cut(value, "/")
	if !slash {
		ns, name = "n", value
	}
	switch {
	case strings.Contains(value, "*"):
		v.refuse(field, value, "no wildcard is allowed; use namespaces or principals for patterns")
	case len(value) > maxAccountLength:
		v.refuse(field, value, "%d bytes long, at most %d are allowed", len(value), maxAccountLength)
	case ns == "" || name == "" || strings.Contains(name, "/"):
		v.refuse(field, value, "allowed: ACCOUNT or NAMESPACE/ACCOUNT")
	case !validLabelName(ns) || !validSubdomain(name):
		v.warn(field, value, "never matches: no service account can have this name")
	}
}

// checkTrustDomain is rule 14.
func checkTrustDomain(v *validation, field, value string) {
	inner := value
	if value != "*" {
		inner = strings.TrimPrefix(strings.TrimSuffix(value, "*"), "*")
	}
	switch {
	case value == "*":
	case strings.Contains(value, "/"):
		v.refuse(field, value, "a trust domain has no \"/\"; write the bare name, as in \"cluster.local\"")
	case strings.Count(value, "*") > 1 || strings.Contains(inner, "*"):
		v.refuse(field, value, "one * is allowed, at the start or the end")
	case strings.Trim(inner, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "":
		v.warn(field, value, "never matches: not a trust domain (lower-case letters, digits, -, . and _ are allowed)")
	case value == "cluster.local" && v.mesh.TrustDomain != "" && !slices.Contains(v.knownDomains(), value):
		v.warn(field, value, "literal here: it does not stand for the mesh's trust domain %q as it does in principals", v.mesh.TrustDomain)
	}
}

// checkIPBlock is rule 16.
func checkIPBlock(v *validation, field, value string) {
	if _, ok := parseBlock(value); !ok {
		v.refuse(field, value, "not an IP address or CIDR; allowed as in 203.0.113.4, 203.0.113.0/24, 2001:db8::/32")
	}
}

// parseBlock reads an address or a CIDR. A zone is refused: packets carry none.
func parseBlock(value string) (netip.Prefix, bool) {
	if strings.Contains(value, "/") {
		p, err := netip.ParsePrefix(value)
		return p, err == nil
	}
	a, err := netip.ParseAddr(value)
	if err != nil || a.Zone() != "" {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, a.BitLen()), true
}

// checkPort is rule 9.
func checkPort(v *validation, field, value string) {
	if _, err := strconv.ParseUint(value, 10, 16); err != nil {
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

// checkPath is rule 10.
func checkPath(v *validation, field, value string) {
	if reason := templateFault(value); reason != "" {
		v.refuse(field, value, "%s", reason)
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

// templateFault says what is wrong with the braces of a path, "" if nothing is.
func templateFault(path string) string {
	if !strings.ContainsAny(path, "{}") {
		return ""
	}
	const allowed = "; allowed: {*} for one segment, {**} for any number, each as a whole segment, {**} last"
	if !strings.Contains(path, "{*}") && !strings.Contains(path, "{**}") {
		return "a { or } outside a template operator is not allowed" + allowed
	}
	if !strings.HasPrefix(path, "/") {
		return "a path template starts with \"/\"" + allowed
	}
	var ended bool
	for segment := range strings.SplitSeq(path[1:], "/") {
		switch {
		case segment == "{*}" || segment == "{**}":
			if ended {
				return "no operator is allowed after {**}" + allowed
			}
			ended = segment == "{**}"
		case strings.ContainsAny(segment, "{}"):
			return "an operator must be a whole segment" + allowed
		case strings.Contains(segment, "*"):
			return "no other * is allowed in a path template" + allowed
		case !pchars(segment):
			return "literals of a path template hold only the characters RFC 3986 allows in a segment" + allowed
		}
	}
	return ""
}

// pchars checks RFC 3986 section 3.3, percent-encoding included.
func pchars(segment string) bool {
	for i := 0; i < len(segment); i++ {
		c := segment[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("-._~!$&'()+,;=:@", c) >= 0:
		case c == '%' && i+2 < len(segment) && isHex(segment[i+1]) && isHex(segment[i+2]):
			i += 2
		default:
			return false
		}
	}
	return true
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}
