package authz

import (
	"net/netip"
	"strings"
)

// fixed holds what the connection fixes, in the form terms compare. Empty texts
// and zero addresses are missing attributes.
type fixedValues struct {
	principal   string
	account     string
	namespace   string
	trustDomain string
	port        string
	sni         string
	source      netip.Addr
	destination netip.Addr
	remote      netip.Addr
}

// query is one question to one program. It lives on the caller's stack.
type query struct {
	fixed *fixedValues
	// req is nil on TCP, where no term asks for what a request says.
	req    *Request
	host   string // lower case
	remote netip.Addr
	prog   *program
}

// matches reports whether clause id holds. With fixedToo false the fixed terms
// are known to hold.
func (q *query) matches(id uint32, fixedToo bool) bool {
	c := &q.prog.clauses[id]
	if fixedToo && !q.all(c.fixed) {
		return false
	}
	if !q.all(c.asked) {
		return false
	}
	for _, or := range c.alternatives {
		if !q.any(or) {
			return false
		}
	}
	return true
}

func (q *query) any(or [][]term) bool {
	for _, terms := range or {
		if q.all(terms) {
			return true
		}
	}
	return false
}

func (q *query) all(terms []term) bool {
	for i := range terms {
		if !q.term(&terms[i]) {
			return false
		}
	}
	return true
}

// term evaluates one field. A missing attribute fails the positive values and
// satisfies the negative ones (rule 6).
func (q *query) term(t *term) bool {
	switch t.ref.attr {
	case attrSourceIP:
		return t.holdsIP(q.fixed.source)
	case attrDestinationIP:
		return t.holdsIP(q.fixed.destination)
	case attrRemoteIP:
		return t.holdsIP(q.remote)
	case attrSubject:
		return (t.pos == nil || t.pos.matchSubject(q.req.Claims)) && (t.neg == nil || !t.neg.matchSubject(q.req.Claims))
	case attrClaim:
		claim := q.req.Claims.at(t.ref.claim)
		return (t.pos == nil || t.pos.matchValues(claim)) && (t.neg == nil || !t.neg.matchValues(claim))
	case attrHeader:
		return q.header(t)
	default:
		return t.holds(q.text(t.ref.attr))
	}
}

func (t *term) holds(v string) bool {
	return (t.pos == nil || t.pos.matchText(v)) && (t.neg == nil || !t.neg.matchText(v))
}

func (t *term) holdsIP(a netip.Addr) bool {
	return (t.pos == nil || t.pos.matchIP(a)) && (t.neg == nil || !t.neg.matchIP(a))
}

// header compares the values of a repeated header joined. Where a match denies,
// one value that matches by itself is enough too, so that a second value cannot
// hide the first (rule 18 as decided).
func (q *query) header(t *term) bool {
	values := q.headerValues(t.ref.name)
	switch len(values) {
	case 0:
		return t.pos == nil
	case 1:
		return t.holds(values[0])
	}
	if t.holds(strings.Join(values, ",")) {
		return true
	}
	if !q.prog.eachValue {
		return false
	}
	for _, v := range values {
		if t.holds(v) {
			return true
		}
	}
	return false
}

func (q *query) headerValues(name string) []string {
	if q.req.Header == nil {
		return nil
	}
	return q.req.Header.Values(name)
}

// text returns the value of an attribute that is one text.
func (q *query) text(a attr) string {
	switch a {
	case attrPrincipal:
		return q.fixed.principal
	case attrAccount:
		return q.fixed.account
	case attrNamespace:
		return q.fixed.namespace
	case attrTrustDomain:
		return q.fixed.trustDomain
	case attrPort:
		return q.fixed.port
	case attrSNI:
		return q.fixed.sni
	case attrPath:
		return q.req.Path
	case attrHost:
		return q.host
	case attrAuthority:
		return q.req.Host
	case attrMethod:
		return q.req.Method
	default:
		return ""
	}
}
