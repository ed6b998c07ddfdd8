package reference_test

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/authz/reference"
	"castellan.dev/identity"
)

// The generator draws policies and requests from the same few words, so that
// they meet: of random strings none would ever match.
var (
	domainWords    = []string{"td1", "td1", "td2", "old-td", "new-td", "cluster.local", "evil"}
	namespaceWords = []string{"shop", "shop", "shop", "shop-a", "dev", "castellan-system"}
	accountWords   = []string{"orders", "orders", "orders", "pay", "a.b", "axb"}
	hostWords      = []string{"orders", "orders.shop", "Orders.Shop:8080", "orders.shop:8080", "pay.shop"}
	methodWords    = []string{"GET", "POST", "DELETE", "get"}
	pathWords      = []string{
		"/", "/a", "/A", "/a/", "/a/b", "/a//b", "/a/b/c", "/a/b/c/d", "/store/cart", "/store//cart", "/store/x/cart",
		"/store/x/y/cart", "/admin", "/x/admin*", "/foo/x/bar/", "/foo/x/bar/y", "/foo//bar/x", "/a/\n", "/a/b%20c", "/a/b%20c/d",
	}
	templateWords = []string{
		"/{*}", "/a/{*}", "/a/{**}", "/{**}", "/{*}/b/{**}", "/store/{**}/cart", "/foo/{*}/bar/{**}", "/a/{*}/c", "/a/{*}/", "/{**}/",
		// not representable
		"/a/b%20c/{*}", "/a/b c/{*}", "/a/%2/{*}", "/a{b", "{*}", "/{**}/x/{*}", "/a/{*}.txt", "/a/{*}/é", "/a/{x}", "/*/{*}", "/a/{*}/b*",
	}
	addressWords = []string{"10.0.0.1", "10.0.1.2", "10.255.255.255", "11.0.0.0", "192.168.0.1", "2001:db8::1", "::ffff:10.0.0.1", "fe80::1%eth0"}
	blockWords   = []string{
		"10.0.0.1", "10.0.0.0/8", "10.0.0.7/24", "10.0.1.0/24", "192.168.0.0/16", "0.0.0.0/0", "2001:db8::/32", "::/0",
		"::ffff:10.0.0.0/104", "::ffff:10.0.0.1",
		// not representable
		"10.0.0/8", "300.0.0.1", "fe80::1%eth0", "10.0.0.0/33", "localhost",
	}
	portWords   = []string{"80", "8080", "9090", "0", "65535", "08080", "x", "70000", "-1", "+80"}
	sniWords    = []string{"orders.shop", "Orders.Shop", "outbound_.80_._.orders", "pay"}
	headerNames = []string{"x-a", "x-b", "X-A", ":authority", "host", "Host", ":method"}
	headerWords = []string{"", "v1", "v2", "v1,v2", "V1", "v1, v2", "orders.shop", "GET"}
	claimWords  = []string{"read", "write", "read write", " read  write ", "finance", "shop", "", "*"}
	issuerWords = []string{"https://issuer.example", "https://issuer.example/a", "iss"}
	subWords    = []string{"alice", "bob", "*", "svc-alice"}
	audWords    = []string{"shop", "pay", "shop pay"}
	badKeys     = []string{
		"", "source.name", "request.headers", "request.headers[]", "request.headers[x a]", "request.headers[:path]",
		"request.auth.claims", "request.auth.claims[a", "request.auth.claims[a]b", "request.auth.claims[]",
		"destination.labels[app]", "experimental.envoy.filters.x[y]", "Source.IP", "request.path",
	}
)

func pick[T any](t *rapid.T, name string, from []T) T { return rapid.SampledFrom(from).Draw(t, name) }

// chance is true in about one of n draws.
func chance(t *rapid.T, name string, n int) bool { return rapid.IntRange(0, n-1).Draw(t, name) == n-1 }

// pattern writes a word in one of the ways values of policy are written.
func pattern(t *rapid.T, words []string) string {
	word := pick(t, "word", words)
	cut := 0
	if len(word) > 0 {
		cut = rapid.IntRange(0, len(word)-1).Draw(t, "cut")
	}
	switch rapid.IntRange(0, 11).Draw(t, "style") {
	case 0:
		return word[:cut] + "*"
	case 1:
		return "*" + word[cut:]
	case 2:
		return "*"
	case 3:
		return "*" + word[cut:] + "*"
	case 4:
		return word[:cut] + "*" + word[cut:]
	default:
		return word
	}
}

// values draws a list, most often short; one in about forty holds an empty
// string, which is not representable.
func values(t *rapid.T, name string, one func() string) []string {
	n := pick(t, name, []int{1, 1, 1, 2, 3, 9})
	list := make([]string, n)
	for i := range list {
		if list[i] = one(); chance(t, "empty", 40) {
			list[i] = ""
		}
	}
	return list
}

func words(t *rapid.T, from []string) func() string {
	return func() string { return pattern(t, from) }
}

func plainWords(t *rapid.T, name string, from []string) func() string {
	return func() string { return pick(t, name, from) }
}

func principalDomain(t *rapid.T) string {
	return pick(t, "td", append([]string{"*", "*-td", "*-td", "td*", "*d1", "*.local", "", "cluster.local", "cluster.local"}, domainWords...))
}

func principal(t *rapid.T) string {
	td := principalDomain(t)
	full := td + "/ns/" + pick(t, "ns", namespaceWords) + "/sa/" + pick(t, "sa", accountWords)
	other := td + "/foo/bar"
	if chance(t, "as it is", 2) {
		return full
	}
	return pattern(t, []string{full, full, full, other, td + "/ns/shop/*", "spiffe://" + full, full + "/x"})
}

func requestPrincipal(t *rapid.T) string {
	iss, sub := pick(t, "iss", issuerWords), pick(t, "sub", subWords)
	return pattern(t, []string{iss + "/" + sub, iss + "/" + sub, iss + "/*", "*/" + sub, "*/*", iss, sub, "*le/" + sub, iss + "/al*"})
}

func account(t *rapid.T) string {
	sa, ns := pick(t, "sa", accountWords), pick(t, "ns", namespaceWords)
	switch rapid.IntRange(0, 12).Draw(t, "account form") {
	case 0:
		return pick(t, "bad account", []string{"*", ns + "/*", ns + "/", "/" + sa, ns + "/" + sa + "/x", strings.Repeat("a", 321)})
	case 1, 2, 3, 4:
		return sa
	default:
		return ns + "/" + sa
	}
}

func trustDomain(t *rapid.T) string {
	if chance(t, "bad domain", 15) {
		return pick(t, "domain", []string{"t*1", "**", "td1/x", "*d*"})
	}
	word := pick(t, "domain", domainWords)
	return pick(t, "domain form", []string{word, word, word, "*", word[:2] + "*", "*" + word[2:]})
}

func namespace(t *rapid.T) string {
	return pattern(t, append([]string{"s*p", "*-*", "s*-a", "sh*p*", "**", "a.b"}, namespaceWords...))
}

func pathValue(t *rapid.T) string {
	if chance(t, "template", 3) {
		return pick(t, "template word", templateWords)
	}
	return pattern(t, pathWords)
}

// maybe fills a list in one of n draws.
func maybe(t *rapid.T, name string, n int, into *[]string, one func() string) {
	if chance(t, name, n) {
		*into = values(t, name+" values", one)
	}
}

func drawSource(t *rapid.T) *policy.Source {
	if chance(t, "nil source", 60) {
		return nil
	}
	s := &policy.Source{}
	for range pick(t, "source fields", []int{0, 1, 1, 1, 1, 2, 2, 3}) {
		principals := func() string { return principal(t) }
		subjects := func() string { return requestPrincipal(t) }
		accounts := func() string { return account(t) }
		domains := func() string { return trustDomain(t) }
		namespaces := func() string { return namespace(t) }
		blocks := plainWords(t, "block", blockWords)
		switch rapid.IntRange(0, 13).Draw(t, "source field") {
		case 0:
			s.Principals = values(t, "principals", principals)
		case 1:
			s.NotPrincipals = values(t, "notPrincipals", principals)
		case 2:
			s.RequestPrincipals = values(t, "requestPrincipals", subjects)
		case 3:
			s.NotRequestPrincipals = values(t, "notRequestPrincipals", subjects)
		case 4:
			s.Namespaces = values(t, "namespaces", namespaces)
		case 5:
			s.NotNamespaces = values(t, "notNamespaces", namespaces)
		case 6:
			s.ServiceAccounts = values(t, "serviceAccounts", accounts)
		case 7:
			s.NotServiceAccounts = values(t, "notServiceAccounts", accounts)
		case 8:
			s.TrustDomains = values(t, "trustDomains", domains)
		case 9:
			s.NotTrustDomains = values(t, "notTrustDomains", domains)
		case 10:
			s.IPBlocks = values(t, "ipBlocks", blocks)
		case 11:
			s.NotIPBlocks = values(t, "notIpBlocks", blocks)
		case 12:
			s.RemoteIPBlocks = values(t, "remoteIpBlocks", blocks)
		case 13:
			s.NotRemoteIPBlocks = values(t, "notRemoteIpBlocks", blocks)
		}
	}
	return s
}

func drawOperation(t *rapid.T) *policy.Operation {
	if chance(t, "nil operation", 60) {
		return nil
	}
	o := &policy.Operation{}
	for range pick(t, "operation fields", []int{0, 1, 1, 1, 1, 2, 2, 3}) {
		ports := plainWords(t, "port", append(slices.Clone(portWords), "8080", "80", "8080"))
		paths := func() string { return pathValue(t) }
		switch rapid.IntRange(0, 7).Draw(t, "operation field") {
		case 0:
			o.Hosts = values(t, "hosts", words(t, hostWords))
		case 1:
			o.NotHosts = values(t, "notHosts", words(t, hostWords))
		case 2:
			o.Ports = values(t, "ports", ports)
		case 3:
			o.NotPorts = values(t, "notPorts", ports)
		case 4:
			o.Methods = values(t, "methods", words(t, methodWords))
		case 5:
			o.NotMethods = values(t, "notMethods", words(t, methodWords))
		case 6:
			o.Paths = values(t, "paths", paths)
		case 7:
			o.NotPaths = values(t, "notPaths", paths)
		}
	}
	return o
}

func drawCondition(t *rapid.T) policy.Condition {
	var c policy.Condition
	var one func() string
	switch rapid.IntRange(0, 17).Draw(t, "key") {
	case 0, 1, 2:
		c.Key = "request.headers[" + pick(t, "header", headerNames) + "]"
		one = words(t, headerWords[1:])
	case 3:
		c.Key, one = "source.ip", plainWords(t, "block", blockWords)
	case 4:
		c.Key, one = "remote.ip", plainWords(t, "block", blockWords)
	case 5:
		c.Key, one = "source.namespace", func() string { return namespace(t) }
	case 6:
		c.Key, one = "source.principal", func() string { return principal(t) }
	case 7:
		c.Key, one = "source.serviceAccount", func() string { return account(t) }
	case 8:
		c.Key, one = "source.trustDomain", func() string { return trustDomain(t) }
	case 9:
		c.Key, one = "request.auth.principal", func() string { return requestPrincipal(t) }
	case 10:
		c.Key, one = pick(t, "token key", []string{"request.auth.audiences", "request.auth.presenter"}), words(t, audWords)
	case 11, 12:
		c.Key = "request.auth.claims[" + pick(t, "claim", []string{"scope", "permission", "groups", "roles", "team", "a][b", "a", "a][b][c", "level", "iss"}) + "]"
		one = words(t, append([]string{"https://issuer.example"}, claimWords...))
	case 13:
		c.Key, one = pick(t, "destination key", []string{"destination.ip", "destination.port"}), plainWords(t, "destination", []string{"10.0.0.1", "10.0.0.0/8"})
		if c.Key == "destination.port" {
			one = plainWords(t, "port", portWords)
		}
	case 14:
		c.Key, one = "connection.sni", words(t, sniWords)
	case 15, 16:
		c.Key, one = "request.auth.claims["+pick(t, "split claim", []string{"scope", "permission", "roles"})+"]", words(t, []string{"read", "read write"})
	default:
		c.Key, one = pick(t, "bad key", badKeys), words(t, headerWords[1:])
	}
	maybe(t, "values", 2, &c.Values, one)
	maybe(t, "notValues", 3, &c.NotValues, one)
	if c.Values == nil && c.NotValues == nil && !chance(t, "no values", 20) {
		c.Values = values(t, "values", one)
	}
	return c
}

func drawRule(t *rapid.T) policy.Rule {
	var r policy.Rule
	for range pick(t, "from", []int{0, 0, 1, 1, 2}) {
		r.From = append(r.From, policy.From{Source: drawSource(t)})
	}
	for range pick(t, "to", []int{0, 0, 1, 1, 2}) {
		r.To = append(r.To, policy.To{Operation: drawOperation(t)})
	}
	for range pick(t, "when", []int{0, 0, 0, 1, 1, 2}) {
		r.When = append(r.When, drawCondition(t))
	}
	if chance(t, "empty from", 60) {
		r.From = []policy.From{}
	}
	if chance(t, "empty to", 60) {
		r.To = []policy.To{}
	}
	return r
}

func drawDocument(t *rapid.T, name string) policy.Document {
	p := &policy.AuthorizationPolicy{
		Action: pick(t, "action", []string{"", "ALLOW", "ALLOW", "ALLOW", "DENY", "DENY", "CUSTOM", "AUDIT", "LOG"}),
	}
	if p.Action == "LOG" && !chance(t, "unknown action", 4) {
		p.Action = "DENY"
	}
	for range pick(t, "rules", []int{0, 1, 1, 1, 2, 3}) {
		p.Rules = append(p.Rules, drawRule(t))
	}
	if p.Action != "" && p.Action != "ALLOW" && len(p.Rules) == 0 && !chance(t, "no rules", 6) {
		p.Rules = []policy.Rule{drawRule(t)}
	}
	if p.Action == "CUSTOM" && !chance(t, "no provider", 5) {
		p.Provider = &policy.Provider{Name: pick(t, "provider", []string{"one", "one", "two", "unknown"})}
	}
	p.Selector = pick(t, "selector", []*policy.Selector{
		nil, nil, nil, {}, {MatchLabels: map[string]string{"app": "orders"}}, {MatchLabels: map[string]string{"app": "pay"}},
	})
	if chance(t, "target", 30) {
		p.TargetRef = &policy.TargetRef{Kind: "Gateway", Name: "g"}
	}
	doc := policy.Document{
		Kind: policy.KindAuthorization, Authorization: p,
		Metadata: policy.Metadata{Name: name, Namespace: pick(t, "namespace", []string{"shop", "shop", "shop", "castellan-system", "dev"})},
	}
	if chance(t, "dry run", 10) {
		doc.Metadata.Annotations = map[string]string{"istio.io/dry-run": pick(t, "dry-run", []string{"true", "true", "false"})}
	}
	return doc
}

func drawConfig(t *rapid.T) authz.Config {
	cfg := authz.Config{Mesh: policy.Mesh{
		TrustDomain:        pick(t, "mesh domain", []string{"td1", "td1", "cluster.local", ""}),
		TrustDomainAliases: pick(t, "aliases", [][]string{nil, {"td2"}, {"old-td", "td2"}, {"cluster.local"}}),
		ExtensionProviders: []policy.ExtensionProvider{{Name: "one"}, {Name: "two"}},
	}}
	if chance(t, "deny all", 40) {
		cfg.DenyAll = "no policy could be read"
	}
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Workload = authz.Workload{
		TrustDomain: spiffeid.RequireTrustDomainFromString("td1"), Account: account,
		Labels: map[string]string{"app": "orders", "version": "v1"},
	}
	if chance(t, "narrow", 2) {
		cfg.Documents = []policy.Document{drawNarrow(t)}
		return cfg
	}
	for i := range rapid.IntRange(0, 5).Draw(t, "documents") {
		cfg.Documents = append(cfg.Documents, drawDocument(t, "p"+strconv.Itoa(i)))
	}
	if chance(t, "crowd", 5) {
		cfg.Documents = append(cfg.Documents, drawCrowd(t))
	}
	return cfg
}

// drawNarrow draws a policy with little but one field in it, so that this field
// alone decides: among several a wrong one is seldom seen.
func drawNarrow(t *rapid.T) policy.Document {
	var r policy.Rule
	switch rapid.IntRange(0, 4).Draw(t, "narrow part") {
	case 0:
		r.From = []policy.From{{Source: &policy.Source{Principals: []string{principalDomain(t) + "/ns/shop/sa/orders"}}}}
	case 1:
		r.From = []policy.From{{Source: drawSource(t)}}
	case 2:
		r.To = []policy.To{{Operation: drawOperation(t)}}
	default:
		r.When = []policy.Condition{drawCondition(t)}
	}
	return policy.Document{
		Kind:          policy.KindAuthorization,
		Metadata:      policy.Metadata{Name: "narrow", Namespace: "shop"},
		Authorization: &policy.AuthorizationPolicy{Action: pick(t, "narrow action", []string{"ALLOW", "DENY"}), Rules: []policy.Rule{r}},
	}
}

func drawAddress(t *rapid.T, name string) netip.Addr {
	if chance(t, name+" missing", 6) {
		return netip.Addr{}
	}
	return netip.MustParseAddr(pick(t, name, addressWords))
}

func drawPeer(t *rapid.T) authz.Peer {
	p := authz.Peer{
		SourceIP: drawAddress(t, "source"), DestinationIP: drawAddress(t, "destination"), RemoteIP: drawAddress(t, "remote"),
		DestinationPort: pick(t, "port", []uint16{80, 8080, 9090, 0, 65535}),
		SNI:             pick(t, "sni", append([]string{""}, sniWords...)),
	}
	td := spiffeid.RequireTrustDomainFromString(pick(t, "td", domainWords))
	path := "/ns/" + pick(t, "ns", namespaceWords) + "/sa/" + pick(t, "sa", accountWords)
	if chance(t, "usual", 2) {
		path = "/ns/shop/sa/orders"
	}
	switch rapid.IntRange(0, 9).Draw(t, "peer") {
	case 0:
	case 1:
		p.ID = spiffeid.RequireFromPath(td, pick(t, "odd path", []string{"/foo/bar", "/ns/shop", path + "/x", "/ns/Shop/sa/orders", "/x" + path}))
	default:
		p.ID = spiffeid.RequireFromPath(td, path)
	}
	return p
}

// headers is a request's headers by lower-case name.
type headers map[string][]string

func (h headers) Values(name string) []string { return h[name] }

func drawRequest(t *rapid.T) (*authz.Request, *reference.Token) {
	r := &authz.Request{
		Method: pick(t, "method", methodWords), Host: pick(t, "host", hostWords), Path: pick(t, "path", pathWords),
		RemoteIP: drawAddress(t, "remote"),
	}
	h := headers{}
	for _, name := range []string{"x-a", "x-b"} {
		for range pick(t, name, []int{0, 0, 1, 1, 2, 3}) {
			h[name] = append(h[name], pick(t, name+" value", headerWords))
		}
	}
	r.Header = h
	if chance(t, "no token", 3) {
		return r, nil
	}
	token := drawToken(t)
	r.Claims = authz.NewClaims(token.Payload, token.Issuer, token.SpaceDelimited)
	return r, token
}

func drawToken(t *rapid.T) *reference.Token {
	token := &reference.Token{Payload: map[string]any{}, Issuer: pick(t, "issuer", append([]string{""}, issuerWords...))}
	set := func(name string, from []any) {
		if v := pick(t, name, from); v != nil {
			token.Payload[name] = v
		}
	}
	set("iss", []any{"https://issuer.example", "https://issuer.example/a", "iss", "", nil, 7.0})
	set("sub", []any{"alice", "bob", "svc-alice", "*", "", nil})
	set("aud", []any{"shop", []any{"shop", "pay"}, []any{}, "shop pay", nil})
	set("azp", []any{"shop", "pay", nil, []any{"pay"}})
	set("scope", []any{"read", "read write", " read  write ", []any{"read write", "write"}, nil})
	set("permission", []any{"read write", nil})
	set("roles", []any{"read write", []any{"finance"}, nil})
	many := []any{"a", "b", "c", "d", "e", "f", "g", "finance"}
	set("groups", []any{many, "finance", []any{"finance", "shop", 7.0, true}, []any{[]any{"finance"}}, nil, 7.0})
	set("team", []any{"shop", "", nil})
	set("level", []any{7.0, true, "7"})
	set("a", []any{map[string]any{"b": "shop"}, map[string]any{"b": map[string]any{"c": []any{"read"}}}, "shop", nil, map[string]any{"scope": "read write"}})
	token.SpaceDelimited = pick(t, "spaceDelimited", [][]string{nil, {"roles"}, {"groups", "roles"}, {"aud"}})
	return token
}
