package authz_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// FuzzIndex holds the index to a scan of all clauses: same answer, same rule,
// same shadow, for policies and requests made of few words, so that they meet.
func FuzzIndex(f *testing.F) {
	for seed := range uint64(60) {
		f.Add(seed, uint16(1<<(seed%10)))
	}
	f.Fuzz(func(t *testing.T, seed uint64, rules uint16) {
		g := &generator{Rand: rand.New(rand.NewPCG(seed, 7))}
		g.words = 2 + g.IntN(1+int(rules%64))
		var docs []policy.Document
		for left := int(rules % 600); left >= 0; left -= 40 {
			docs = append(docs, g.document(len(docs), min(left+1, 40)))
		}
		s, problems := authz.Compile(authz.Config{
			Documents: docs, Workload: workload(t),
			Mesh: policy.Mesh{TrustDomainAliases: []string{"td1"}, ExtensionProviders: []policy.ExtensionProvider{{Name: "opa"}}},
		})
		if len(problems) > 0 {
			t.Fatalf("problems: %v", problems)
		}
		for range 8 {
			c := s.Connect(g.peer())
			if got, want := c.AuthorizeTCP(), c.AuthorizeTCPByScan(); got != want {
				t.Fatalf("TCP: %+v, want %+v", got, want)
			}
			for range 16 {
				r := g.request()
				if got, want := c.Authorize(&r), c.AuthorizeByScan(&r); got != want {
					t.Fatalf("%+v: %+v, want %+v", r, got, want)
				}
			}
		}
	})
}

// generator makes policies and requests from the same small vocabulary.
type generator struct {
	*rand.Rand
	words int
}

func (g *generator) one(in int) bool { return g.IntN(in) == 0 }

func (g *generator) word() string { return fmt.Sprintf("w%d", g.IntN(g.words)) }

func (g *generator) value(make func() string) string {
	v := make()
	switch g.IntN(8) {
	case 0:
		return v[:1+g.IntN(len(v))] + "*"
	case 1:
		return "*" + v[g.IntN(len(v)):]
	case 2:
		if g.one(4) {
			return "*"
		}
	}
	return v
}

func (g *generator) list(make func() string) []string {
	var out []string
	for range 1 + g.IntN(3) {
		out = append(out, make())
	}
	if g.one(20) {
		for range 20 {
			out = append(out, make())
		}
	}
	return out
}

func (g *generator) domain() string { return []string{"cluster.local", "td1", "td2"}[g.IntN(3)] }

func (g *generator) principal() string {
	if g.one(10) {
		return g.domain() + "/vm/" + g.word()
	}
	return g.domain() + "/ns/" + g.word() + "/sa/" + g.word()
}

func (g *generator) path() string {
	p := ""
	for range 1 + g.IntN(3) {
		p += "/" + g.word()
	}
	return p
}

func (g *generator) pathValue() string {
	switch g.IntN(6) {
	case 0:
		return g.path() + "/{*}" + g.path()
	case 1:
		return "/{*}" + g.path() + "/{**}"
	case 2:
		return g.path() + "/{**}/" + g.word()
	case 3:
		return "/{**}" + g.path()
	default:
		return g.value(g.path)
	}
}

func (g *generator) ip() string {
	if g.one(4) {
		return fmt.Sprintf("fd00::%x:%x", g.IntN(4), g.IntN(g.words))
	}
	return fmt.Sprintf("10.%d.0.%d", g.IntN(4), g.IntN(min(g.words, 250)))
}

func (g *generator) cidr() string {
	a := netip.MustParseAddr(g.ip())
	if g.one(2) {
		return a.String()
	}
	p, _ := a.Prefix(g.IntN(a.BitLen() + 1))
	return p.String()
}

func (g *generator) user() string {
	v := g.word() + "/" + g.word()
	switch g.IntN(6) {
	case 0:
		return g.word() + "/*"
	case 1:
		return "*/" + g.word()
	case 2:
		return "*" + v[1:]
	case 3:
		return v[:len(v)-1] + "*"
	}
	return v
}

func (g *generator) namespace() string {
	if g.one(6) {
		return "w*" + g.word()[1:]
	}
	return g.value(g.word)
}

func (g *generator) port() string { return fmt.Sprint(8000 + g.IntN(4)) }

func (g *generator) document(i, rules int) policy.Document {
	spec := policy.AuthorizationPolicy{Action: []string{"", "ALLOW", "ALLOW", "DENY", "CUSTOM", "AUDIT"}[g.IntN(6)]}
	if spec.Action == policy.ActionCustom {
		spec.Provider = &policy.Provider{Name: "opa"}
	}
	for range rules {
		spec.Rules = append(spec.Rules, g.rule())
	}
	d := document(fmt.Sprintf("p%02d", i), spec)
	if (spec.Action == "ALLOW" || spec.Action == "DENY") && g.one(4) {
		d.Metadata.Annotations = map[string]string{"istio.io/dry-run": "true"}
	}
	return d
}

func (g *generator) rule() policy.Rule {
	var r policy.Rule
	for range g.IntN(3) {
		s := g.source()
		r.From = append(r.From, policy.From{Source: &s})
	}
	for range g.IntN(3) {
		o := g.operation()
		r.To = append(r.To, policy.To{Operation: &o})
	}
	if r.From == nil && r.To == nil || g.one(3) {
		r.When = append(r.When, g.condition())
	}
	return r
}

func (g *generator) source() policy.Source {
	var s policy.Source
	for empty := true; empty; {
		for _, f := range []struct {
			in   int
			pos  *[]string
			neg  *[]string
			make func() string
		}{
			{3, &s.Principals, &s.NotPrincipals, func() string { return g.value(g.principal) }},
			{6, &s.Namespaces, &s.NotNamespaces, g.namespace},
			{8, &s.ServiceAccounts, &s.NotServiceAccounts, func() string { return g.word() + "/" + g.word() }},
			{12, &s.TrustDomains, &s.NotTrustDomains, g.domain},
			{8, &s.IPBlocks, &s.NotIPBlocks, g.cidr},
			{8, &s.RemoteIPBlocks, &s.NotRemoteIPBlocks, g.cidr},
			{8, &s.RequestPrincipals, &s.NotRequestPrincipals, g.user},
		} {
			if g.one(f.in) {
				*f.pos, empty = g.list(f.make), false
			}
			if g.one(f.in * 4) {
				*f.neg, empty = g.list(f.make), false
			}
		}
	}
	return s
}

func (g *generator) operation() policy.Operation {
	var o policy.Operation
	for empty := true; empty; {
		for _, f := range []struct {
			in   int
			pos  *[]string
			neg  *[]string
			make func() string
		}{
			{2, &o.Paths, &o.NotPaths, g.pathValue},
			{4, &o.Hosts, &o.NotHosts, func() string { return g.value(g.word) }},
			{6, &o.Ports, &o.NotPorts, g.port},
			{4, &o.Methods, &o.NotMethods, g.method},
		} {
			if g.one(f.in) {
				*f.pos, empty = g.list(f.make), false
			}
			if g.one(f.in * 4) {
				*f.neg, empty = g.list(f.make), false
			}
		}
	}
	return o
}

func (g *generator) method() string { return []string{"GET", "POST", "PUT"}[g.IntN(3)] }

func (g *generator) condition() policy.Condition {
	keys := []struct {
		key  string
		make func() string
	}{
		{"request.headers[x]", func() string { return g.value(g.word) }},
		{"request.headers[y]", func() string { return g.value(func() string { return g.word() + "," + g.word() }) }},
		{"request.headers[:authority]", g.word},
		{"request.auth.claims[g]", func() string { return g.value(g.word) }},
		{"request.auth.claims[a][b]", g.word},
		{"request.auth.claims[scope]", g.word},
		{"request.auth.audiences", g.word},
		{"request.auth.presenter", g.word},
		{"request.auth.principal", g.user},
		{"source.ip", g.cidr},
		{"remote.ip", g.cidr},
		{"source.namespace", g.namespace},
		{"destination.port", g.port},
		{"destination.ip", g.cidr},
		{"connection.sni", func() string { return g.value(g.word) }},
	}
	k := keys[g.IntN(len(keys))]
	c := policy.Condition{Key: k.key}
	if !g.one(4) {
		c.Values = g.list(k.make)
	}
	if c.Values == nil || g.one(6) {
		c.NotValues = g.list(k.make)
	}
	return c
}

func (g *generator) peer() authz.Peer {
	p := authz.Peer{DestinationPort: uint16(8000 + g.IntN(4))}
	if !g.one(8) {
		p.ID = spiffeid.RequireFromString("spiffe://" + g.principal())
	}
	if !g.one(8) {
		p.SourceIP = netip.MustParseAddr(g.ip())
	}
	if g.one(2) {
		p.RemoteIP = netip.MustParseAddr(g.ip())
	}
	if g.one(2) {
		p.DestinationIP = netip.MustParseAddr(g.ip())
	}
	if g.one(2) {
		p.SNI = g.word()
	}
	return p
}

func (g *generator) request() authz.Request {
	r := authz.Request{Method: g.method(), Host: g.word(), Path: g.path()}
	h := header{}
	for _, name := range []string{"x", "y"} {
		for range g.IntN(3) {
			h[name] = append(h[name], g.word())
		}
	}
	r.Header = h
	if g.one(3) {
		r.RemoteIP = netip.MustParseAddr(g.ip())
	}
	if g.one(2) {
		list := func() []any {
			var out []any
			for range g.IntN(12) {
				out = append(out, g.word())
			}
			return out
		}
		r.Claims = authz.NewClaims(map[string]any{
			"iss": g.word(), "sub": g.word(), "g": list(), "aud": list(), "azp": g.word(),
			"scope": g.word() + " " + g.word(), "a": map[string]any{"b": g.word()},
		}, "", nil)
	}
	return r
}
