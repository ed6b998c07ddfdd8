package reference

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/casbin/govaluate"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
)

// matchers are the functions that model.conf names. Each takes an attribute of
// the request and a column of the line.
type matchers struct {
	// domains lists the trust domains that have the role "mesh".
	domains func() ([]string, error)
	// parsed keeps columns read once; what is measured is casbin, not JSON.
	parsed sync.Map
}

func (m *matchers) byName() map[string]govaluate.ExpressionFunction {
	return map[string]govaluate.ExpressionFunction{
		"principal":        field(m, m.principal),
		"peerNamespace":    field(m, peerNamespace),
		"serviceAccount":   m.accountField,
		"trustDomain":      field(m, m.trustDomain),
		"ipBlock":          field(m, ipBlock),
		"port":             field(m, port),
		"requestPrincipal": field(m, requestPrincipal),
		"host":             field(m, host),
		"method":           field(m, method),
		"path":             field(m, path),
		"conditions":       m.conditions,
	}
}

// field makes a casbin function of one that matches an attribute against values.
func field[A any](m *matchers, match func(A, []string) (bool, error)) govaluate.ExpressionFunction {
	return func(args ...any) (any, error) {
		attribute, ok := args[0].(A)
		if !ok {
			return false, fmt.Errorf("attribute of type %T", args[0])
		}
		values, err := column[[]string](m, args[1])
		if err != nil {
			return false, err
		}
		return match(attribute, values)
	}
}

func column[T any](m *matchers, arg any) (T, error) {
	var v T
	text, ok := arg.(string)
	if !ok {
		return v, fmt.Errorf("column of type %T", arg)
	}
	if known, ok := m.parsed.Load(text); ok {
		if v, ok := known.(T); ok {
			return v, nil
		}
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return v, fmt.Errorf("column %q: %w", text, err)
	}
	m.parsed.Store(text, v)
	return v, nil
}

// match is rule 7 for an attribute that is there. A leading * wins.
func match(value, pattern string) bool {
	switch {
	case pattern == "*":
		return value != ""
	case strings.HasPrefix(pattern, "*"):
		return strings.HasSuffix(value, pattern[1:])
	case strings.HasSuffix(pattern, "*"):
		return strings.HasPrefix(value, pattern[:len(pattern)-1])
	default:
		return value == pattern
	}
}

// matchPresent is match for what `*` finds even when it is empty.
func matchPresent(value, pattern string) bool { return pattern == "*" || match(value, pattern) }

func oneOf(value string, patterns []string, match func(value, pattern string) bool) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return match(value, pattern) })
}

// principal is rule 11.
func (m *matchers) principal(peer spiffeid.ID, values []string) (bool, error) {
	if peer.IsZero() {
		return false, nil
	}
	domains, err := m.domains()
	if err != nil {
		return false, err
	}
	name := strings.TrimPrefix(peer.String(), "spiffe://")
	for _, v := range values {
		for _, meant := range standsFor(v, domains) {
			if match(name, meant) {
				return true, nil
			}
		}
	}
	return false, nil
}

// standsFor lists the principals that one of policy stands for: a principal of
// five segments whose trust domain is known, or cluster.local, or a partial
// wildcard that matches a known one, is that principal in every known domain.
func standsFor(principal string, domains []string) []string {
	segments := strings.Split(principal, "/")
	td := segments[0]
	if len(segments) != 5 || td == "*" {
		return []string{principal}
	}
	partial := func(d string) bool {
		return strings.HasPrefix(td, "*") && strings.HasSuffix(d, td[1:]) ||
			strings.HasSuffix(td, "*") && strings.HasPrefix(d, td[:len(td)-1])
	}
	if td != "cluster.local" && !slices.Contains(domains, td) && !slices.ContainsFunc(domains, partial) {
		return []string{principal}
	}
	var meant []string
	for _, d := range domains {
		if strings.HasPrefix(td, "*") && strings.HasSuffix(d, td[1:]) {
			meant = append(meant, principal)
			continue
		}
		meant = append(meant, d+"/"+strings.Join(segments[1:], "/"))
	}
	return meant
}

// peerNamespace is rule 12: the namespace segment, with any number of wildcards.
func peerNamespace(peer spiffeid.ID, values []string) (bool, error) {
	w, err := identity.FromID(peer)
	if err != nil {
		// An identity of another shape has no namespace.
		return false, nil
	}
	for _, v := range values {
		pattern := strings.ReplaceAll(regexp.QuoteMeta(v), `\*`, `.*`)
		if regexp.MustCompile(`(?s)^(` + pattern + `)$`).MatchString(w.Account().Namespace()) {
			return true, nil
		}
	}
	return false, nil
}

// accountField is rule 13: the third column is the policy's namespace.
func (m *matchers) accountField(args ...any) (any, error) {
	peer, okPeer := args[0].(spiffeid.ID)
	namespace, okNamespace := args[2].(string)
	if !okPeer || !okNamespace {
		return false, errors.New("serviceAccount wants a peer, accounts and a namespace")
	}
	values, err := column[[]string](m, args[1])
	if err != nil {
		return false, err
	}
	return serviceAccount(peer, values, namespace), nil
}

func serviceAccount(peer spiffeid.ID, values []string, namespace string) bool {
	w, err := identity.FromID(peer)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(values, func(v string) bool {
		if !strings.Contains(v, "/") {
			v = namespace + "/" + v
		}
		return v == w.Account().String()
	})
}

// trustDomain is rule 14: cluster.local is literal here.
func (m *matchers) trustDomain(peer spiffeid.ID, values []string) (bool, error) {
	if peer.IsZero() {
		return false, nil
	}
	domains, err := m.domains()
	if err != nil {
		return false, err
	}
	name := peer.TrustDomain().Name()
	for _, v := range values {
		if match(name, v) || slices.Contains(domains, v) && slices.Contains(domains, name) {
			return true, nil
		}
	}
	return false, nil
}

// ipBlock is rule 16.
func ipBlock(ip netip.Addr, values []string) (bool, error) {
	if !ip.IsValid() {
		return false, nil
	}
	return slices.ContainsFunc(values, func(v string) bool {
		if p, err := netip.ParsePrefix(v); err == nil {
			if p.Addr().Is4In6() && p.Bits() >= 96 {
				p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
			}
			return p.Contains(ip)
		}
		a, err := netip.ParseAddr(v)
		return err == nil && a.Unmap() == ip
	}), nil
}

// port is rule 9. It comes as text, since casbin's expressions make every number
// a floating one.
func port(p string, values []string) (bool, error) {
	return slices.ContainsFunc(values, func(v string) bool {
		n, err := strconv.Atoi(v)
		return err == nil && strconv.Itoa(n) == p
	}), nil
}

// requestPrincipal is rule 15.
func requestPrincipal(t *Token, values []string) (bool, error) {
	issuer, subject := t.principal()
	if issuer == "" || subject == "" {
		return false, nil
	}
	for _, v := range values {
		wantIssuer, wantSubject := "*", "*"
		cut := strings.LastIndex(v, "/")
		leading, trailing := strings.HasPrefix(v, "*"), strings.HasSuffix(v, "*")
		switch {
		case v == "*":
		case cut < 0 && leading: // *suffix of the subject
			wantSubject = v
		case cut < 0 && trailing: // prefix* of the issuer
			wantIssuer = v
		case cut < 0:
			continue
		case leading: // */sub, *suf/sub: the subject is literal
			if v[:cut] != "*" && !strings.HasSuffix(issuer, v[1:cut]) || v[cut+1:] != subject {
				continue
			}
			return true, nil
		case trailing: // iss/*, iss/pre*: the issuer is literal
			if v[:cut] != issuer || !strings.HasPrefix(subject, strings.TrimSuffix(v[cut+1:], "*")) {
				continue
			}
			return true, nil
		default:
			if v == issuer+"/"+subject && cut == len(issuer) {
				return true, nil
			}
			continue
		}
		if match(issuer, wantIssuer) && match(subject, wantSubject) {
			return true, nil
		}
	}
	return false, nil
}

// host is rule 8: without regard to ASCII case, the port included.
func host(value string, values []string) (bool, error) {
	return oneOf(lowerASCII(value), values, func(v, p string) bool { return matchPresent(v, lowerASCII(p)) }), nil
}

func lowerASCII(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func method(value string, values []string) (bool, error) {
	return oneOf(value, values, matchPresent), nil
}

// path is rule 10.
func path(value string, values []string) (bool, error) {
	return oneOf(value, values, func(v, p string) bool {
		if isTemplate(p) {
			return matchTemplate(v, p)
		}
		return match(v, p)
	}), nil
}

// matchTemplate makes a regular expression of the template; `(?s)` and classes of
// "all but /" so that no odd character slips past.
func matchTemplate(value, pattern string) bool {
	expression := regexp.QuoteMeta(pattern)
	expression = strings.ReplaceAll(expression, regexp.QuoteMeta("{**}"), `.*`)
	expression = strings.ReplaceAll(expression, regexp.QuoteMeta("{*}"), `[^/]+`)
	return regexp.MustCompile(`(?s)^` + expression + `$`).MatchString(value)
}
