package authz

import "strings"

// maxClaimDepth bounds nesting. Tokens are bounded in size where they are
// verified; a claim that lies deeper is as if it were absent, and a policy key
// that deep is not representable.
const maxClaimDepth = 16

// Claims are those of a verified token, prepared for matching; immutable.
type Claims struct {
	subject   subject
	principal string // issuer "/" subject, empty if either is
	root      *claim
}

// claim is one claim: its values if it is a string or a list with strings, its
// members if it is an object.
type claim struct {
	values  []string
	lookup  map[string]struct{} // of values, where there are many
	slot    uint32              // in memos, where there are many
	members map[string]*claim
}

// NewClaims prepares the payload of a verified token. Strings, and strings in
// lists, can match; numbers, booleans and null never do. The claims scope and
// permission, and those in spaceDelimited, are split at spaces at the top level,
// and the parts replace the whole (rule 18). The issuer is that of the rule that
// verified the token, for payloads that do not repeat it.
func NewClaims(payload map[string]any, issuer string, spaceDelimited []string) *Claims {
	c := &Claims{root: newClaim(payload, 0)}
	split := append([]string{"scope", "permission"}, spaceDelimited...)
	for _, name := range split {
		if text, ok := payload[name].(string); ok {
			c.root.members[name] = valuesClaim(strings.FieldsFunc(text, func(r rune) bool { return r == ' ' }))
		}
	}
	if iss, ok := payload["iss"].(string); ok {
		issuer = iss
	}
	sub, _ := payload["sub"].(string)
	c.subject = subject{iss: issuer, sub: sub}
	if issuer != "" && sub != "" {
		c.principal = issuer + "/" + sub
	}
	return c
}

func newClaim(v any, depth int) *claim {
	if depth > maxClaimDepth {
		return nil
	}
	switch v := v.(type) {
	case string:
		return &claim{values: []string{v}}
	case []string:
		return valuesClaim(v)
	case []any:
		var values []string
		for _, e := range v {
			if s, ok := e.(string); ok {
				values = append(values, s)
			}
		}
		return valuesClaim(values)
	case map[string]any:
		members := make(map[string]*claim, len(v))
		for name, e := range v {
			if m := newClaim(e, depth+1); m != nil {
				members[name] = m
			}
		}
		return &claim{members: members}
	default:
		return nil
	}
}

func valuesClaim(values []string) *claim {
	c := &claim{values: append([]string(nil), values...)}
	if len(values) > fewValues {
		c.lookup = make(map[string]struct{}, len(values))
		for _, v := range values {
			c.lookup[v] = struct{}{}
			c.slot = c.slot*31 + textHash(v)
		}
	}
	return c
}

// textHash is FNV-1a. It only spreads; nothing rests on it.
func textHash(s string) uint32 {
	h := uint32(2166136261)
	for i := range len(s) {
		h = (h ^ uint32(s[i])) * 16777619
	}
	return h
}

// at returns the claim at a path of names, or nil.
func (c *Claims) at(path []string) *claim {
	if c == nil {
		return nil
	}
	n := c.root
	for _, name := range path {
		if n = n.members[name]; n == nil {
			return nil
		}
	}
	return n
}
