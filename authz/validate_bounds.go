package authz

import (
	"fmt"

	"castellan.dev/api/policy"
)

// Bounds on what one policy may hold, beyond those of its lists of rules: what
// looks at policies takes time in proportion to this, for everybody's. Policies
// that people write stay far below.
const (
	// maxValues are the values of all lists of a policy together.
	maxValues = 10_000
	// maxValue is the length of one of them in bytes.
	maxValue = 4096
	// maxLabels are those a selector may ask for.
	maxLabels = 256
)

func (v *validation) tooMany(field string, n int) { v.refuse(field, "", "%s", tooManyValues(n)) }

func tooManyValues(n int) string {
	return fmt.Sprintf("with this list the policy has too many values: %d in all its lists together, at most %d are allowed; make several policies of it", n, maxValues)
}

// short reports whether a value is not too long.
func (v *validation) short(field, value string) bool {
	if len(value) > maxValue {
		v.refuse(field, value, "%d bytes long, at most %d are allowed", len(value), maxValue)
		return false
	}
	return true
}

// tally counts values; field is the list with which they became too many.
type tally struct {
	n     int
	field string
}

func (t *tally) add(n int, format string, args ...any) {
	if t.n += n; t.n > maxValues && t.field == "" {
		t.field = fmt.Sprintf(format, args...)
	}
}

// excess returns the list with which the values of a policy become too many, ""
// if they do not, and how many they are in all.
func excess(p *policy.AuthorizationPolicy) (field string, n int) {
	var t tally
	for i := range p.Rules {
		r := &p.Rules[i]
		for j := range r.From {
			if s := r.From[j].Source; s != nil {
				for _, l := range sourceFields(s) {
					t.add(len(l.values), "spec.rules[%d].from[%d].source.%s", i, j, l.name)
				}
			}
		}
		for j := range r.To {
			if o := r.To[j].Operation; o != nil {
				for _, l := range operationFields(o) {
					t.add(len(l.values), "spec.rules[%d].to[%d].operation.%s", i, j, l.name)
				}
			}
		}
		for j := range r.When {
			t.add(len(r.When[j].Values), "spec.rules[%d].when[%d].values", i, j)
			t.add(len(r.When[j].NotValues), "spec.rules[%d].when[%d].notValues", i, j)
		}
	}
	return t.field, t.n
}

// excessJWT is excess for a RequestAuthentication.
func excessJWT(p *policy.RequestAuthentication) (field string, n int) {
	var t tally
	for i := range p.JWTRules {
		r := &p.JWTRules[i]
		t.add(len(r.Audiences), "spec.jwtRules[%d].audiences", i)
		t.add(len(r.FromHeaders), "spec.jwtRules[%d].fromHeaders", i)
		t.add(len(r.FromParams), "spec.jwtRules[%d].fromParams", i)
		t.add(len(r.FromCookies), "spec.jwtRules[%d].fromCookies", i)
		t.add(len(r.OutputClaimToHeaders), "spec.jwtRules[%d].outputClaimToHeaders", i)
		t.add(len(r.SpaceDelimitedClaims), "spec.jwtRules[%d].spaceDelimitedClaims", i)
	}
	return t.field, t.n
}
