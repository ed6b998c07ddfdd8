package authz

import (
	"net/netip"
	"slices"
	"strings"
)

// fewValues is up to how many values are compared one by one; more are looked up.
const fewValues = 6

// set is the values of one field, ORed; immutable.
type set struct {
	any      bool // "*" that takes empty
	nonEmpty bool // "*"
	exact    []string
	lookup   map[string]struct{} // of exact, where there are many
	prefixes []string
	suffixes []string
	prefixed *radix[bool]
	suffixed *radix[bool]
	// patterns is what the set was made of, until the index is built.
	patterns []pattern
	// odd are globs, and templates where there are few; templated holds many.
	odd       []pattern
	templated *templateTree[bool]

	ranges []ipRange

	subjects      []pattern
	exactSubjects map[subject]struct{}
}

// subject is the end user a token names.
type subject struct{ iss, sub string }

type ipRange struct{ first, last netip.Addr }

// newSet builds the set of some patterns.
func newSet(patterns []pattern) *set {
	s := new(set)
	for i := range patterns {
		switch p := &patterns[i]; p.kind {
		case patAny:
			s.any = true
		case patNonEmpty:
			s.nonEmpty = true
		case patExact:
			s.exact = append(s.exact, p.text)
		case patPrefix:
			s.prefixes = append(s.prefixes, p.text)
		case patSuffix:
			s.suffixes = append(s.suffixes, p.text)
		case patTemplate, patGlob:
			s.odd = append(s.odd, *p)
		case patNet:
			s.ranges = append(s.ranges, rangeOf(p.net))
		case patSubject:
			s.addSubject(p)
		}
	}
	s.index()
	return s
}

func (s *set) addSubject(p *pattern) {
	if p.iss.kind != patExact || p.sub.kind != patExact {
		s.subjects = append(s.subjects, *p)
		return
	}
	if s.exactSubjects == nil {
		s.exactSubjects = make(map[subject]struct{})
	}
	s.exactSubjects[subject{p.iss.text, p.sub.text}] = struct{}{}
}

// index prepares look-ups where there are many values.
func (s *set) index() {
	if len(s.exact) > fewValues {
		s.lookup = make(map[string]struct{}, len(s.exact))
		for _, v := range s.exact {
			s.lookup[v] = struct{}{}
		}
	}
	if len(s.prefixes) > fewValues {
		s.prefixed = newRadix(members(s.prefixes), false)
	}
	if len(s.suffixes) > fewValues {
		s.suffixed = newRadix(members(s.suffixes), true)
	}
	if len(s.odd) > fewValues {
		s.indexTemplates()
	}
	s.ranges = mergeRanges(s.ranges)
}

// indexTemplates moves the templates into a tree.
func (s *set) indexTemplates() {
	templates := make(map[string]bool)
	var globs []pattern
	for _, p := range s.odd {
		if p.kind == patTemplate {
			templates[p.text] = true
		} else {
			globs = append(globs, p)
		}
	}
	s.odd, s.templated = globs, newTemplateTree(templates)
}

func members(texts []string) map[string]bool {
	m := make(map[string]bool, len(texts))
	for _, t := range texts {
		m[t] = true
	}
	return m
}

// matchText reports whether one value takes v. A missing attribute is the empty
// text, which no value but patAny takes.
func (s *set) matchText(v string) bool {
	if s.any || s.nonEmpty && v != "" {
		return true
	}
	if s.lookup != nil {
		if _, ok := s.lookup[v]; ok {
			return true
		}
	} else {
		for _, e := range s.exact {
			if e == v {
				return true
			}
		}
	}
	return s.matchEnds(v) || s.matchOdd(v)
}

func (s *set) matchEnds(v string) bool {
	if s.prefixed != nil {
		c := s.prefixed.walk(v)
		if _, ok := c.next(); ok {
			return true
		}
	} else {
		for _, p := range s.prefixes {
			if strings.HasPrefix(v, p) {
				return true
			}
		}
	}
	if s.suffixed != nil {
		c := s.suffixed.walk(v)
		_, ok := c.next()
		return ok
	}
	for _, p := range s.suffixes {
		if strings.HasSuffix(v, p) {
			return true
		}
	}
	return false
}

func (s *set) matchOdd(v string) bool {
	for i := range s.odd {
		if s.odd[i].matchText(v) {
			return true
		}
	}
	return s.templated != nil && s.templated.visit(v, func(bool) bool { return true })
}

// matchValues reports whether one value of the set takes one of the claim's.
func (s *set) matchValues(claim *claim) bool {
	if claim == nil {
		return false
	}
	// A long list in a token meets a short one in a policy: look ours up in theirs.
	if claim.lookup != nil && len(s.exact) <= len(claim.values) && s.onlyExact() {
		for _, e := range s.exact {
			if _, ok := claim.lookup[e]; ok {
				return true
			}
		}
		return false
	}
	for _, v := range claim.values {
		if s.matchText(v) {
			return true
		}
	}
	return false
}

func (s *set) onlyExact() bool {
	return !s.any && !s.nonEmpty && len(s.prefixes) == 0 && len(s.suffixes) == 0 && len(s.odd) == 0 && s.templated == nil
}

// matchSubject compares a request principal; a token without issuer or subject
// has none.
func (s *set) matchSubject(c *Claims) bool {
	if c == nil || c.principal == "" {
		return false
	}
	if _, ok := s.exactSubjects[c.subject]; ok {
		return true
	}
	for i := range s.subjects {
		p := &s.subjects[i]
		if p.iss.matchText(c.subject.iss) && p.sub.matchText(c.subject.sub) {
			return true
		}
	}
	return false
}

// matchIP reports whether an address lies in one of the ranges; the zero address
// is a missing one.
func (s *set) matchIP(a netip.Addr) bool {
	if !a.IsValid() {
		return false
	}
	lo, hi := 0, len(s.ranges)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if s.ranges[mid].last.Less(a) {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo < len(s.ranges) && !a.Less(s.ranges[lo].first)
}

func rangeOf(p netip.Prefix) ipRange {
	first := p.Addr()
	last := first.AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 1 << (7 - i%8)
	}
	addr, _ := netip.AddrFromSlice(last)
	return ipRange{first: first, last: addr}
}

// mergeRanges sorts ranges and joins those that overlap. Addresses of the two
// families sort apart.
func mergeRanges(ranges []ipRange) []ipRange {
	slices.SortFunc(ranges, func(a, b ipRange) int { return a.first.Compare(b.first) })
	out := ranges[:0]
	for _, r := range ranges {
		if n := len(out); n > 0 && !out[n-1].last.Less(r.first) {
			if out[n-1].last.Less(r.last) {
				out[n-1].last = r.last
			}
			continue
		}
		out = append(out, r)
	}
	return out
}
