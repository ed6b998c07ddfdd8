package reference

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// Token is what a verified end-user token says.
type Token struct {
	Payload map[string]any
	// Issuer is that of the rule which verified it, for a payload without one.
	Issuer string
	// SpaceDelimited are the claims that rule has under spaceDelimitedClaims.
	SpaceDelimited []string
}

// call is one question, with all its attributes.
type call struct {
	protocol       string
	peer           spiffeid.ID
	source, remote netip.Addr
	destination    netip.Addr
	port           string
	sni            string
	request        *authz.Request
	token          *Token
}

func newCall(p authz.Peer, remote netip.Addr) *call {
	if !remote.IsValid() {
		remote = p.SourceIP
	}
	return &call{
		peer: p.ID, source: plain(p.SourceIP), remote: plain(remote), destination: plain(p.DestinationIP),
		port: strconv.Itoa(int(p.DestinationPort)), sni: p.SNI,
	}
}

func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// conditions matches all of a rule's `when`: (call, conditions, policy's namespace, eft).
func (m *matchers) conditions(args ...any) (any, error) {
	c, okCall := args[0].(*call)
	namespace, okNamespace := args[2].(string)
	eft, okEft := args[3].(string)
	if !okCall || !okNamespace || !okEft {
		return false, fmt.Errorf("conditions wants a call, conditions, a namespace and an effect")
	}
	conditions, err := column[[]policy.Condition](m, args[1])
	if err != nil {
		return false, err
	}
	for _, condition := range conditions {
		ok, err := m.condition(c, condition, namespace, eft == "deny")
		if err != nil || !ok {
			return false, err
		}
	}
	return true, nil
}

func (m *matchers) condition(c *call, condition policy.Condition, namespace string, denies bool) (bool, error) {
	if c.protocol == "tcp" && strings.HasPrefix(condition.Key, "request.") {
		// Lines that allow do not come here; one that denies loses the condition.
		return true, nil
	}
	if name, ok := inner(condition.Key, "request.headers["); ok {
		return headerCondition(c, lowerASCII(name), condition, denies), nil
	}
	values, err := m.values(c, condition.Key, condition.Values, namespace)
	if err != nil {
		return false, err
	}
	notValues, err := m.values(c, condition.Key, condition.NotValues, namespace)
	if err != nil {
		return false, err
	}
	return (len(condition.Values) == 0 || values) && (len(condition.NotValues) == 0 || !notValues), nil
}

// values says whether one of the values matches the attribute of the key; never
// where the attribute is missing.
func (m *matchers) values(c *call, key string, values []string, namespace string) (bool, error) {
	switch key {
	case "source.ip":
		return ipBlock(c.source, values)
	case "remote.ip":
		return ipBlock(c.remote, values)
	case "source.namespace":
		return peerNamespace(c.peer, values)
	case "source.principal":
		return m.principal(c.peer, values)
	case "source.serviceAccount":
		return serviceAccount(c.peer, values, namespace), nil
	case "source.trustDomain":
		return m.trustDomain(c.peer, values)
	case "request.auth.principal":
		return requestPrincipal(c.token, values)
	case "request.auth.audiences":
		return anyOf(c.token.claim([]string{"aud"}), values), nil
	case "request.auth.presenter":
		return anyOf(c.token.claim([]string{"azp"}), values), nil
	case "destination.ip":
		return ipBlock(c.destination, values)
	case "destination.port":
		return port(c.port, values)
	case "connection.sni":
		return c.sni != "" && oneOf(lowerASCII(c.sni), values, func(v, p string) bool { return match(v, lowerASCII(p)) }), nil
	}
	if claims, ok := inner(key, "request.auth.claims["); ok {
		return anyOf(c.token.claim(strings.Split(claims, "][")), values), nil
	}
	return false, fmt.Errorf("unknown key %q", key)
}

func inner(key, prefix string) (string, bool) {
	rest, ok := strings.CutPrefix(key, prefix)
	return strings.TrimSuffix(rest, "]"), ok
}

func anyOf(attributes, values []string) bool {
	return slices.ContainsFunc(attributes, func(a string) bool { return oneOf(a, values, match) })
}

// headerCondition is rule 18: the joined value decides, and a rule that denies
// also fires when the condition holds for any single value.
func headerCondition(c *call, name string, condition policy.Condition, denies bool) bool {
	var have []string
	switch name {
	case ":authority", "host":
		have = []string{c.request.Host}
	case ":method":
		have = []string{c.request.Method}
	default:
		if c.request.Header != nil {
			have = c.request.Header.Values(name)
		}
	}
	if len(have) == 0 {
		return len(condition.Values) == 0
	}
	views := []string{strings.Join(have, ",")}
	if denies {
		views = append(views, have...)
	}
	return slices.ContainsFunc(views, func(view string) bool {
		return (len(condition.Values) == 0 || oneOf(view, condition.Values, matchPresent)) &&
			(len(condition.NotValues) == 0 || !oneOf(view, condition.NotValues, matchPresent))
	})
}

// principal returns issuer and subject, empty where there is no token.
func (t *Token) principal() (issuer, subject string) {
	if t == nil {
		return "", ""
	}
	issuer, given := t.Payload["iss"].(string)
	if !given {
		issuer = t.Issuer
	}
	subject, _ = t.Payload["sub"].(string)
	return issuer, subject
}

// stringsOf returns a claim's string, or the strings of its list.
func stringsOf(v any) []string {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []string:
		return v
	case []any:
		var all []string
		for _, item := range v {
			if s, ok := item.(string); ok {
				all = append(all, s)
			}
		}
		return all
	default:
		return nil
	}
}

// claim follows nested names; the strings of scope, permission and those the rule
// names are split, which replaces them.
func (t *Token) claim(names []string) []string {
	if t == nil {
		return nil
	}
	var value any = t.Payload
	for _, name := range names {
		object, ok := value.(map[string]any)
		if !ok {
			return nil
		}
		value = object[name]
	}
	split := len(names) == 1 && (names[0] == "scope" || names[0] == "permission" || slices.Contains(t.SpaceDelimited, names[0]))
	if s, ok := value.(string); ok && split {
		return slices.DeleteFunc(strings.Split(s, " "), func(part string) bool { return part == "" })
	}
	return stringsOf(value)
}
