package authz

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// patternKind is a way a value of a policy is compared.
type patternKind uint8

const (
	patExact patternKind = iota
	patPrefix
	patSuffix
	patNonEmpty // "*"
	patAny      // "*" where present is enough, even if empty
	patTemplate // {*} and {**} in a path
	patGlob     // "*" anywhere, in namespaces
	patNet      // an address or CIDR
	patSubject  // issuer and subject of a request principal
)

// pattern is one value of a policy, parsed.
type pattern struct {
	kind patternKind
	text string
	tmpl []segment
	net  netip.Prefix
	iss  *pattern
	sub  *pattern
}

// Reasons for which a value cannot be represented.
var (
	errEmptyValue = errors.New("empty value")
	errLongValue  = fmt.Errorf("longer than %d bytes", maxValue)
	errBraces     = errors.New("'{' and '}' may stand only in the operators {*} and {**}, each a whole segment")
)

// parseString reads the common form of rule 7: exact, "p*", "*s" and "*". A
// leading star wins; any other star is literal. present is the kind of "*".
func parseString(v string, present patternKind) (pattern, error) {
	switch {
	case v == "":
		return pattern{}, errEmptyValue
	case v == "*":
		return pattern{kind: present}, nil
	case v[0] == '*':
		return pattern{kind: patSuffix, text: v[1:]}, nil
	case v[len(v)-1] == '*':
		return pattern{kind: patPrefix, text: v[:len(v)-1]}, nil
	default:
		return pattern{kind: patExact, text: v}, nil
	}
}

// matchText holds for the kinds that compare one string.
func (p *pattern) matchText(s string) bool {
	switch p.kind {
	case patExact:
		return s == p.text
	case patPrefix:
		return strings.HasPrefix(s, p.text)
	case patSuffix:
		return strings.HasSuffix(s, p.text)
	case patNonEmpty:
		return s != ""
	case patAny:
		return true
	case patTemplate:
		return matchTemplate(p.tmpl, s)
	case patGlob:
		return matchGlob(p.text, s)
	default:
		return false
	}
}

// parseGlob reads a namespace, in which any star stands for any run of
// characters within the segment (rule 12). Without an inner star it is an
// ordinary value.
func parseGlob(v string) (pattern, error) {
	if v == "" {
		return pattern{}, errEmptyValue
	}
	if strings.Trim(v, "*") == "" {
		return pattern{kind: patNonEmpty}, nil
	}
	switch strings.Count(v, "*") {
	case 0:
		return pattern{kind: patExact, text: v}, nil
	case 1:
		if v[0] == '*' || v[len(v)-1] == '*' {
			return parseString(v, patNonEmpty)
		}
	}
	return pattern{kind: patGlob, text: v}, nil
}

// matchGlob compares with stars anywhere, in time len(glob) × len(s) at worst.
func matchGlob(glob, s string) bool {
	g, i := 0, 0
	star, mark := -1, 0
	for i < len(s) {
		switch {
		case g < len(glob) && glob[g] == '*':
			star, mark = g, i
			g++
		case g < len(glob) && glob[g] == s[i]:
			g++
			i++
		case star >= 0:
			mark++
			g, i = star+1, mark
		default:
			return false
		}
	}
	for g < len(glob) && glob[g] == '*' {
		g++
	}
	return g == len(glob)
}

// parseNet reads an address or CIDR. Host bits are masked, as users of the
// documents expect, and IPv4-mapped IPv6 is IPv4, as peers' addresses are.
func parseNet(v string) (pattern, error) {
	if v == "" {
		return pattern{}, errEmptyValue
	}
	if !strings.Contains(v, "/") {
		addr, err := netip.ParseAddr(v)
		if err != nil || addr.Zone() != "" {
			return pattern{}, errors.New("not an IP address or CIDR")
		}
		addr = addr.Unmap()
		return pattern{kind: patNet, net: netip.PrefixFrom(addr, addr.BitLen())}, nil
	}
	prefix, err := netip.ParsePrefix(v)
	if err != nil {
		return pattern{}, errors.New("not an IP address or CIDR")
	}
	if prefix.Addr().Is4In6() && prefix.Bits() >= 96 {
		prefix = netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-96)
	}
	return pattern{kind: patNet, net: prefix.Masked()}, nil
}

// parseSubject reads a request principal (rule 15). It is split at the last
// slash, since issuers are URLs; a leading star beats a trailing one.
func parseSubject(v string) (pattern, error) {
	if v == "" {
		return pattern{}, errEmptyValue
	}
	present := &pattern{kind: patNonEmpty}
	exact := func(s string) *pattern { return &pattern{kind: patExact, text: s} }
	p := pattern{kind: patSubject, iss: present, sub: present}
	if v == "*" {
		return p, nil
	}
	iss, sub := v, ""
	slash := strings.LastIndexByte(v, '/')
	if slash >= 0 {
		iss, sub = v[:slash], v[slash+1:]
	}
	switch {
	case v[0] == '*' && slash < 0:
		p.sub = &pattern{kind: patSuffix, text: v[1:]}
	case v[0] == '*':
		if iss != "*" {
			p.iss = &pattern{kind: patSuffix, text: iss[1:]}
		}
		p.sub = exact(sub)
	case v[len(v)-1] == '*' && slash < 0:
		p.iss = &pattern{kind: patPrefix, text: v[:len(v)-1]}
	case v[len(v)-1] == '*':
		p.iss = exact(iss)
		if sub != "*" {
			p.sub = &pattern{kind: patPrefix, text: sub[:len(sub)-1]}
		}
	default:
		// Without a slash the subject is empty, and no token has that one.
		p.iss, p.sub = exact(iss), exact(sub)
	}
	return p, nil
}

// parseAccount reads "[ns/]sa" and returns it with its namespace (rule 13).
func parseAccount(v, namespace string) (pattern, error) {
	const longest = 320
	ns, sa, ok := strings.Cut(v, "/")
	if !ok {
		ns, sa = namespace, v
	}
	switch {
	case v == "":
		return pattern{}, errEmptyValue
	case strings.Contains(v, "*"):
		return pattern{}, errors.New("service accounts take no wildcard")
	case ns == "" || sa == "" || strings.Contains(sa, "/"):
		return pattern{}, errors.New("not of the form [NAMESPACE/]ACCOUNT")
	case len(v) > longest:
		return pattern{}, errors.New("longer than 320 characters")
	}
	return pattern{kind: patExact, text: ns + "/" + sa}, nil
}

// parseTrustDomain reads a value of trustDomains (rule 14).
func parseTrustDomain(v string) (pattern, error) {
	if v == "" {
		return pattern{}, errEmptyValue
	}
	if strings.Contains(v, "/") {
		return pattern{}, errors.New("a trust domain has no '/'")
	}
	if n := strings.Count(v, "*"); n > 1 || n == 1 && v[0] != '*' && v[len(v)-1] != '*' {
		return pattern{}, errors.New("one '*' is allowed, at an end")
	}
	return parseString(v, patNonEmpty)
}

// parsePort reads a port and writes it canonically, which makes it comparable.
func parsePort(v string) (pattern, error) {
	if v == "" {
		return pattern{}, errEmptyValue
	}
	n := 0
	for _, c := range []byte(v) {
		if c < '0' || c > '9' || len(v) > 5 {
			return pattern{}, errors.New("not a port (0-65535)")
		}
		n = n*10 + int(c-'0')
	}
	if n > 65535 {
		return pattern{}, errors.New("not a port (0-65535)")
	}
	return pattern{kind: patExact, text: portText(uint16(n))}, nil
}

// asciiLower folds ASCII only, and allocates only where there is something to fold.
func asciiLower(s string) string {
	for i := range len(s) {
		if c := s[i]; c >= 'A' && c <= 'Z' {
			b := []byte(s)
			for j := i; j < len(b); j++ {
				if b[j] >= 'A' && b[j] <= 'Z' {
					b[j] += 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}
