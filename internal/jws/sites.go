package jws

import (
	"cmp"
	"net/url"
	"slices"
	"strings"

	"castellan.dev/api/policy"
)

// siteKind is a kind of place in a request.
type siteKind uint8

const (
	inHeader siteKind = iota
	inParam
	inCookie
)

// site is one place that rules read tokens from (authz 26).
type site struct {
	kind siteKind
	name string // headers: lower-case
	// readers are the rules that read here, by the prefix they want; the longest
	// prefix first. Params and cookies have one reader with prefix "".
	readers []reader
	strip   []string // name alone, so that a result need not allocate
}

type reader struct {
	prefix string
	rules  []int
}

// addSites adds the places of rule i. Any place a rule names replaces the two default ones.
func (a *Authenticator) addSites(r policy.JWTRule, i int) {
	if len(r.FromHeaders)+len(r.FromParams)+len(r.FromCookies) == 0 {
		a.addSite(inHeader, "authorization", "Bearer ", i)
		a.addSite(inParam, "access_token", "", i)
		return
	}
	for _, h := range r.FromHeaders {
		a.addSite(inHeader, strings.ToLower(h.Name), h.Prefix, i)
	}
	for _, p := range r.FromParams {
		a.addSite(inParam, p, "", i)
	}
	for _, c := range r.FromCookies {
		a.addSite(inCookie, c, "", i)
	}
}

func (a *Authenticator) addSite(kind siteKind, name, prefix string, rule int) {
	at := slices.IndexFunc(a.sites, func(s site) bool { return s.kind == kind && s.name == name })
	if at < 0 {
		at = len(a.sites)
		a.sites = append(a.sites, site{kind: kind, name: name, strip: []string{name}})
	}
	s := &a.sites[at]
	r := slices.IndexFunc(s.readers, func(r reader) bool { return r.prefix == prefix })
	if r < 0 {
		r = len(s.readers)
		s.readers = append(s.readers, reader{prefix: prefix})
	}
	if !slices.Contains(s.readers[r].rules, rule) {
		s.readers[r].rules = append(s.readers[r].rules, rule)
	}
}

func sortSites(sites []site) {
	for _, s := range sites {
		slices.SortStableFunc(s.readers, func(a, b reader) int { return cmp.Compare(len(b.prefix), len(a.prefix)) })
	}
}

// header examines one header. The value must begin with the prefix (design
// decision on authz 26); one that does not is no token. Of several prefixes that
// fit, the longest reads it.
func (e *examination) header(s *site, values []string) bool {
	for _, value := range values {
		for i := range s.readers {
			token, ok := strings.CutPrefix(value, s.readers[i].prefix)
			if !ok {
				continue
			}
			if token == "" {
				break
			}
			v, ok := e.token(s.readers[i].rules, token)
			if !ok {
				return false
			}
			e.result.StripHeaders = e.strip(v, e.result.StripHeaders, s)
			break
		}
	}
	return true
}

// params examines one query parameter, under whatever escaping its name is written.
func (e *examination) params(s *site, rawQuery string) bool {
	for rawQuery != "" {
		var pair string
		pair, rawQuery, _ = strings.Cut(rawQuery, "&")
		name, value, _ := strings.Cut(pair, "=")
		if !sameParam(name, s.name) || value == "" {
			continue
		}
		if strings.ContainsAny(value, "%+") {
			decoded, err := url.QueryUnescape(value)
			if err != nil {
				return e.refuse(401, "token in a query parameter with a broken escape")
			}
			value = decoded
		}
		v, ok := e.token(s.readers[0].rules, value)
		if !ok {
			return false
		}
		e.result.StripParams = e.strip(v, e.result.StripParams, s)
	}
	return true
}

func sameParam(raw, name string) bool {
	if raw == name {
		return true
	}
	if !strings.ContainsAny(raw, "%+") {
		return false
	}
	decoded, err := url.QueryUnescape(raw)
	return err == nil && decoded == name
}

// cookies examines one cookie (RFC 6265 4.2.1; quotes around a value are dropped).
func (e *examination) cookies(s *site, values []string) bool {
	for _, line := range values {
		for line != "" {
			var pair string
			pair, line, _ = strings.Cut(line, ";")
			name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
			if strings.TrimSpace(name) != s.name {
				continue
			}
			value = unquote(strings.TrimSpace(value))
			if value == "" {
				continue
			}
			v, ok := e.token(s.readers[0].rules, value)
			if !ok {
				return false
			}
			e.result.StripCookies = e.strip(v, e.result.StripCookies, s)
		}
	}
	return true
}

func unquote(s string) string {
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		return s[1 : len(s)-1]
	}
	return s
}

// strip adds the site to what must not be forwarded, unless the rule forwards
// tokens (authz 30).
func (e *examination) strip(v *Verified, list []string, s *site) []string {
	if e.a.rules[v.rule].forward || slices.Contains(list, s.name) {
		return list
	}
	if list == nil {
		return s.strip
	}
	return append(slices.Clip(list), s.name)
}

// StripQuery returns rawQuery without the given parameters.
func StripQuery(rawQuery string, params []string) string {
	if len(params) == 0 {
		return rawQuery
	}
	kept := make([]string, 0, 8)
	for pair := range strings.SplitSeq(rawQuery, "&") {
		name, _, _ := strings.Cut(pair, "=")
		if !slices.ContainsFunc(params, func(p string) bool { return sameParam(name, p) }) {
			kept = append(kept, pair)
		}
	}
	return strings.Join(kept, "&")
}

// StripCookie returns a Cookie header's value without the given cookies, "" if none is left.
func StripCookie(value string, names []string) string {
	if len(names) == 0 {
		return value
	}
	kept := make([]string, 0, 8)
	for pair := range strings.SplitSeq(value, ";") {
		pair = strings.TrimSpace(pair)
		name, _, _ := strings.Cut(pair, "=")
		if pair != "" && !slices.Contains(names, strings.TrimSpace(name)) {
			kept = append(kept, pair)
		}
	}
	return strings.Join(kept, "; ")
}
