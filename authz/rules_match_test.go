package authz_test

import (
	"testing"

	"castellan.dev/api/policy"
)

// Rules 7 to 20: how values are compared, and what of them holds on TCP.

func TestStrings(t *testing.T) {
	run(t, []row{
		{
			name: "authz-07 exact, prefix, suffix", docs: allow(operation(`paths: ["/exact", "/pre*", "*.suf"]`)),
			asks: []ask{
				{path: "/exact", want: allowed}, {path: "/exactly", want: noMatch}, {path: "/Exact", want: noMatch},
				{path: "/pre", want: allowed}, {path: "/prefix/x", want: allowed}, {path: "/x/pre", want: noMatch},
				{path: "/a/b.suf", want: allowed}, {path: "/b.suf/", want: noMatch},
			},
		},
		{
			name: "authz-07 a leading star wins, an inner one is literal", docs: allow(operation(`paths: ["*/admin*", "/a*b"]`)),
			asks: []ask{
				{path: "/x/admin", want: noMatch}, {path: "/x/admin*", want: allowed},
				{path: "/axb", want: noMatch}, {path: "/a*b", want: allowed},
			},
		},
		{
			name: "authz-07 star of a path is not empty", docs: allow(operation(`paths: ["*"]`)),
			asks: []ask{{path: "/", want: allowed}},
		},
		{
			name: "authz-07 star of a header takes an empty one", docs: allow(when("request.headers[X-A]", `values: ["*"]`)),
			asks: []ask{{want: noMatch}, {headers: header{"x-a": {""}}, want: allowed}, {headers: header{"x-a": {"1"}}, want: allowed}},
		},
		{
			name: "authz-07 star of hosts and methods is present", docs: allow(operation(`hosts: ["*"], methods: ["*"]`)),
			asks: []ask{{host: "", want: allowed}, {host: "a", want: allowed}, {tcp: true, want: noMatch}},
		},
		{
			name: "authz-08 hosts ignore case and keep the port", docs: allow(operation(`hosts: ["Orders.Shop", "*.example.COM:8443", "api.*"]`)),
			asks: []ask{
				{host: "orders.shop", want: allowed}, {host: "ORDERS.shop", want: allowed}, {host: "orders.shop:80", want: noMatch},
				{host: "x.Example.com:8443", want: allowed}, {host: "x.example.com", want: noMatch}, {host: "API.x", want: allowed},
			},
		},
		{
			name: "authz-08 :authority minds case", docs: allow(when("request.headers[:authority]", `values: ["Orders.shop"]`)),
			asks: []ask{{host: "Orders.shop", want: allowed}, {host: "orders.shop", want: noMatch}},
		},
		{
			name: "authz-08 the host header is :authority", docs: allow(when("request.headers[Host]", `values: ["orders.*"]`)),
			asks: []ask{{host: "orders.shop", want: allowed}, {host: "x", headers: header{"host": {"orders.shop"}}, want: noMatch}},
		},
		{
			name: "authz-09 methods", docs: allow(operation(`methods: [GET, "PO*"]`)),
			asks: []ask{{method: "GET", want: allowed}, {method: "get", want: noMatch}, {method: "POST", want: allowed}, {method: "PUT", want: noMatch}},
		},
		{
			name: "authz-09 :method", docs: deny(when("request.headers[:method]", `notValues: [POST]`)),
			asks: []ask{{method: "GET", want: denied}, {method: "POST", want: noPolicy}},
		},
		{
			name: "authz-09 ports are the workload's, 0 to 65535", docs: allow(operation(`ports: ["8080", "0", "65535"]`)),
			asks: []ask{{port: 8080, want: allowed}, {port: 65535, want: allowed}, {port: 80, want: noMatch}, {port: 8080, tcp: true, want: allowed}},
		},
		{
			name: "authz-09 notPorts", docs: deny(operation(`notPorts: ["8080"]`)),
			asks: []ask{{port: 8080, want: noPolicy}, {port: 9090, want: denied}, {port: 9090, tcp: true, want: denied}},
		},
		{
			name: "authz-12 namespaces", docs: allow(source(`namespaces: ["prod", "team-*", "*-ops", "a*c", "x*y*z"]`)),
			asks: []ask{
				{from: "td/ns/prod/sa/a", want: allowed}, {from: "other/ns/prod/sa/a", want: allowed}, {from: "td/ns/prod2/sa/a", want: noMatch},
				{from: "td/ns/team-a/sa/a", want: allowed}, {from: "td/ns/x-ops/sa/a", want: allowed},
				{from: "td/ns/abc/sa/a", want: allowed}, {from: "td/ns/ac/sa/a", want: allowed}, {from: "td/ns/abcd/sa/a", want: noMatch},
				{from: "td/ns/x1y2z/sa/a", want: allowed}, {from: "td/ns/x1z/sa/a", want: noMatch},
				{want: noMatch},
			},
		},
		{
			name: "authz-12 never across the slash", docs: allow(source(`namespaces: ["a*b", "*"]`)),
			asks: []ask{
				{from: "td/ns/a/sa/b", want: allowed},
				// Of another shape: no namespace, whatever a pattern might find in it.
				{from: "td/x/ns/a/sa/b", want: noMatch}, {from: "td/ns/a/sa/x/b", want: noMatch}, {from: "td/ns/a/b", want: noMatch},
			},
		},
		{
			name: "authz-12 a star does not reach into the account", docs: allow(source(`namespaces: ["a*b"]`)),
			asks: []ask{{from: "td/ns/a/sa/b", want: noMatch}, {from: "td/ns/a1/sa/1b", want: noMatch}},
		},
		{
			name: "authz-16 packet peer and told client", docs: `{rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, 192.168.1.7, "fd00::/8"]}}]}, {from: [{source: {remoteIpBlocks: ["203.0.113.0/24"]}}]}]}`,
			asks: []ask{
				{source: "10.9.9.9", want: allowed}, {source: "::ffff:10.9.9.9", want: allowed}, {source: "fd00::1", want: allowed}, {source: "192.168.1.7", want: allowed},
				{source: "192.168.1.8", want: noMatch}, {want: noMatch},
				{source: "11.1.1.1", remote: "203.0.113.9", want: "allow: ALLOW shop/p[1]"},
				{source: "203.0.113.9", remote: "11.1.1.1", want: noMatch},
				{source: "203.0.113.9", want: "allow: ALLOW shop/p[1]"},
				{source: "11.1.1.1", remote: "203.0.113.9", tcp: true, want: "allow: ALLOW shop/p[1]"},
			},
		},
		{
			name: "authz-16 negations, host bits and mapped CIDRs", docs: deny(source(`notIpBlocks: ["10.1.2.3/8"], notRemoteIpBlocks: ["::ffff:203.0.113.0/120"]`)),
			asks: []ask{
				{source: "10.200.0.1", want: noPolicy}, {source: "9.1.1.1", remote: "203.0.113.3", want: noPolicy},
				{source: "9.1.1.1", remote: "203.0.114.3", want: denied}, {want: denied},
			},
		},
	})
}

func TestPathTemplates(t *testing.T) {
	for _, tc := range []struct {
		pattern string
		match   []string
		not     []string
	}{
		{"/store/{**}/cart", []string{"/store//cart", "/store/a/cart", "/store/a/b/cart", "/store/cart/cart", "/store///cart"}, []string{"/store/cart", "/store/a/cart/", "/store/a/carts", "/x/store/a/cart", "/store/a/xcart"}},
		{"/foo/{*}/bar/{**}", []string{"/foo/x/bar/", "/foo/x/bar/y/z", "/foo/x/bar//"}, []string{"/foo//bar/x", "/foo/x/bar", "/foo/x/y/bar/z", "/foo/bar/x"}},
		{"/{*}", []string{"/a", "/a%20b", "/a\x80{}", "/*"}, []string{"/", "/a/", "/a/b"}},
		{"/{**}", []string{"/", "/a", "/a/b/"}, []string{""}},
		{"/a/{*}/", []string{"/a/b/"}, []string{"/a/b", "/a//"}},
		{"/{*}/{*}", []string{"/a/b"}, []string{"/a", "/a/", "//b", "/a/b/c"}},
		{"/v1/{*}/x%2Fy/{**}", []string{"/v1/q/x%2Fy/"}, []string{"/v1/q/x%2fy/", "/v1/q/x/y/"}},
		{"/{**}/a/b", []string{"//a/b", "/x/a/b", "/a/b/a/b"}, []string{"/a/b", "/xa/b"}},
	} {
		rows := row{name: "authz-10 " + tc.pattern, docs: allow(operation(`paths: ["` + tc.pattern + `"]`))}
		not := row{name: "authz-10 not " + tc.pattern, docs: deny(operation(`notPaths: ["` + tc.pattern + `"]`))}
		for _, p := range tc.match {
			rows.asks = append(rows.asks, ask{path: p, want: allowed})
			not.asks = append(not.asks, ask{path: p, want: noPolicy})
		}
		for _, p := range tc.not {
			if p != "" {
				rows.asks = append(rows.asks, ask{path: p, want: noMatch})
				not.asks = append(not.asks, ask{path: p, want: denied})
			}
		}
		run(t, []row{rows, not})
	}
}

func TestSource(t *testing.T) {
	aliases := policy.Mesh{TrustDomain: "td1", TrustDomainAliases: []string{"old-td1", "td2"}}
	const sa = "/ns/shop/sa/frontend"
	asks := func(yes, no []string) []ask {
		var out []ask
		for _, from := range yes {
			out = append(out, ask{from: from, want: allowed}, ask{from: from, tcp: true, want: allowed})
		}
		for _, from := range no {
			out = append(out, ask{from: from, want: noMatch}, ask{from: from, tcp: true, want: noMatch})
		}
		return out
	}
	run(t, []row{
		{name: "authz-11 exact", docs: allow(source(`principals: ["` + frontend + `"]`)), asks: asks([]string{frontend}, []string{guest, "other/ns/shop/sa/frontend", frontend + "x", ""})},
		{name: "authz-11 with the scheme it is literal", docs: allow(source(`principals: ["spiffe://` + frontend + `"]`)), asks: asks(nil, []string{frontend})},
		{name: "authz-11 prefix and suffix", docs: allow(source(`principals: ["cluster.local/ns/shop/*", "*/sa/root"]`)), asks: asks([]string{frontend, "td/ns/x/sa/root"}, []string{guest})},
		{
			name: "authz-11 cluster.local stands for the mesh's domains, not itself", mesh: aliases, docs: allow(source(`principals: ["cluster.local` + sa + `"]`)),
			asks: asks([]string{"td1" + sa, "td2" + sa, "old-td1" + sa}, []string{"cluster.local" + sa, "td3" + sa}),
		},
		{
			name: "authz-11 cluster.local where it is an alias", mesh: policy.Mesh{TrustDomain: "td1", TrustDomainAliases: []string{"cluster.local"}}, docs: allow(source(`principals: ["cluster.local` + sa + `"]`)),
			asks: asks([]string{"td1" + sa, "cluster.local" + sa}, nil),
		},
		{name: "authz-11 a known domain expands", mesh: aliases, docs: allow(source(`principals: ["td2` + sa + `"]`)), asks: asks([]string{"td1" + sa, "td2" + sa, "old-td1" + sa}, []string{"cluster.local" + sa})},
		{name: "authz-11 an unknown domain is literal", mesh: aliases, docs: allow(source(`principals: ["td9` + sa + `"]`)), asks: asks([]string{"td9" + sa}, []string{"td1" + sa})},
		{name: "authz-11 four segments are not expanded", mesh: aliases, docs: allow(source(`principals: ["cluster.local/ns/shop/*"]`)), asks: asks([]string{"cluster.local" + sa}, []string{"td1" + sa})},
		{name: "authz-11 five segments with a star are", mesh: aliases, docs: allow(source(`principals: ["cluster.local/ns/shop/sa/*"]`)), asks: asks([]string{"td1" + sa, "td2" + sa}, []string{"cluster.local" + sa})},
		{name: "authz-11 any domain", mesh: aliases, docs: allow(source(`principals: ["*` + sa + `"]`)), asks: asks([]string{"td1" + sa, "x" + sa}, []string{"x/ns/shop/sa/other"})},
		{
			name: "authz-11 a partial wildcard adds the other domains", mesh: aliases, docs: allow(source(`principals: ["*-td1` + sa + `"]`)),
			asks: asks([]string{"old-td1" + sa, "very-td1" + sa, "td1" + sa, "td2" + sa}, []string{"td3" + sa}),
		},
		{name: "authz-11 a partial wildcard that takes none is literal", mesh: aliases, docs: allow(source(`principals: ["*-td9` + sa + `"]`)), asks: asks([]string{"x-td9" + sa}, []string{"td1" + sa})},
		{
			name: "authz-11 negations expand too", mesh: aliases, docs: allow(source(`notPrincipals: ["td1` + sa + `"]`)),
			asks: asks([]string{"td3" + sa, ""}, []string{"td1" + sa, "td2" + sa}),
		},
		{name: "authz-11 only principals name an identity of another shape", docs: allow(source(`principals: ["cluster.local/vm/7"]`)), asks: asks([]string{"cluster.local/vm/7"}, []string{"cluster.local/vm/8"})},
		{name: "authz-13 with and without namespace", docs: allow(source(`serviceAccounts: ["frontend", "other/robot.v1"]`)), asks: asks(
			[]string{frontend, "td9" + sa, "td/ns/other/sa/robot.v1"},
			[]string{"td/ns/other/sa/frontend", "td/ns/shop/sa/robot.v1", "td/ns/other/sa/robot-v1", "td/ns/other/sa/robotxv1", "td/x/ns/shop/sa/frontend", "td/ns/shop/x/sa/frontend", ""})},
		{
			name: "authz-13 the default namespace of a root policy is the root one",
			docs: `{metadata: {namespace: castellan-system, name: r}, spec: ` + allow(source(`serviceAccounts: [frontend]`)) + `}`,
			asks: []ask{{from: frontend, want: noMatch}, {from: "td/ns/castellan-system/sa/frontend", want: "allow: ALLOW castellan-system/r[0]"}},
		},
		{name: "authz-13 with trust domains", docs: allow(source(`serviceAccounts: [frontend], trustDomains: [td5]`)), asks: asks([]string{"td5" + sa}, []string{frontend})},
		{name: "authz-13 negation", docs: deny(source(`notServiceAccounts: [frontend]`)), asks: []ask{{from: frontend, want: noPolicy}, {from: guest, want: denied}, {want: denied}}},
		{name: "authz-14 exact values of known domains expand", mesh: aliases, docs: allow(source(`trustDomains: [td2]`)), asks: asks([]string{"td1" + sa, "td2" + sa, "old-td1" + sa}, []string{"td3" + sa, "cluster.local" + sa, ""})},
		{name: "authz-14 cluster.local is literal", mesh: aliases, docs: allow(source(`trustDomains: [cluster.local]`)), asks: asks([]string{"cluster.local" + sa}, []string{"td1" + sa})},
		{name: "authz-14 patterns", mesh: aliases, docs: allow(source(`trustDomains: ["td*", "*.example.org"]`)), asks: asks([]string{"td1" + sa, "td9" + sa, "a.example.org" + sa}, []string{"old-td1" + sa, "example.org" + sa})},
		{name: "authz-14 presence", docs: allow(source(`trustDomains: ["*"]`)), asks: asks([]string{"x" + sa, "x/vm/1"}, []string{""})},
		{name: "authz-14 negation", mesh: aliases, docs: deny(source(`notTrustDomains: [td1]`)), asks: []ask{{from: "td2" + sa, want: noPolicy}, {from: "td3" + sa, want: denied}, {want: denied}}},
	})
}

func TestRequestPrincipals(t *testing.T) {
	const iss, other = `{"iss":"https://idp.test","sub":"alice"}`, `{"iss":"https://other.test","sub":"bob"}`
	row1 := func(name, value string, yes, no []string) row {
		r := row{name: "authz-15 " + name, docs: allow(source(`requestPrincipals: ["` + value + `"]`))}
		for _, c := range yes {
			r.asks = append(r.asks, ask{claims: c, want: allowed})
		}
		for _, c := range no {
			r.asks = append(r.asks, ask{claims: c, want: noMatch})
		}
		return r
	}
	run(t, []row{
		row1("exact", "https://idp.test/alice", []string{iss}, []string{other, "", `{"sub":"alice"}`, `{"iss":"https://idp.test"}`, `{"iss":"https://idp.test","sub":7}`}),
		row1("a slash in the subject is not one in the issuer", "https://idp.test/a/b", []string{`{"iss":"https://idp.test/a","sub":"b"}`}, []string{`{"iss":"https://idp.test","sub":"a/b"}`}),
		row1("star", "*", []string{iss, other}, []string{"", `{"iss":"","sub":"a"}`, `{"iss":"a","sub":""}`, `{"iss":"a"}`, `{"sub":"a"}`}),
		row1("issuer, any subject", "https://idp.test/*", []string{iss}, []string{other, `{"iss":"https://idp.test"}`}),
		row1("issuer, subjects by prefix", "https://idp.test/al*", []string{iss}, []string{`{"iss":"https://idp.test","sub":"bob"}`, other}),
		row1("any issuer, subject", "*/alice", []string{iss, `{"iss":"x","sub":"alice"}`}, []string{other, `{"sub":"alice"}`}),
		row1("issuers by suffix, subject", "*idp.test/alice", []string{iss}, []string{`{"iss":"https://idp.test","sub":"bob"}`, `{"iss":"x","sub":"alice"}`}),
		row1("subjects by suffix", "*ce", []string{iss, `{"iss":"x","sub":"grace"}`}, []string{other}),
		row1("issuers by prefix", "idp*", []string{`{"iss":"idp-7","sub":"x"}`}, []string{iss, `{"iss":"idp-7"}`}),
		row1("star slash star is a subject of one star", "*/*", []string{`{"iss":"x","sub":"*"}`}, []string{iss}),
		row1("no slash, no star", "alice", nil, []string{iss, `{"iss":"alice"}`}),
		{
			name: "authz-15 negation", docs: deny(source(`notRequestPrincipals: ["https://idp.test/*"]`)),
			asks: []ask{{claims: iss, want: noPolicy}, {claims: other, want: denied}, {want: denied}},
		},
		{
			name: "authz-15 many of all kinds", docs: allow(source(`requestPrincipals: ["a/1", "a/2", "b/*", "c/x*", "*/y", "*z/y2", "*end", "pre*"]`)),
			asks: []ask{
				{claims: `{"iss":"a","sub":"2"}`, want: allowed}, {claims: `{"iss":"a","sub":"3"}`, want: noMatch}, {claims: `{"iss":"b","sub":"3"}`, want: allowed},
				{claims: `{"iss":"c","sub":"x3"}`, want: allowed}, {claims: `{"iss":"q","sub":"y"}`, want: allowed}, {claims: `{"iss":"qz","sub":"y2"}`, want: allowed},
				{claims: `{"iss":"q","sub":"theend"}`, want: allowed}, {claims: `{"iss":"prefixed","sub":"q"}`, want: allowed}, {claims: `{"iss":"q","sub":"q"}`, want: noMatch},
			},
		},
	})
}

func TestWhenKeys(t *testing.T) {
	key := func(name, key, values string, yes, no ask) row {
		yes.want, no.want = allowed, noMatch
		return row{name: "authz-17 " + name, docs: allow(when(key, `values: [`+values+`]`)), asks: []ask{yes, no}}
	}
	run(t, []row{
		key("request.headers", "request.headers[User-Agent]", `"curl/*"`, ask{headers: header{"user-agent": {"curl/8"}}}, ask{headers: header{"user-agent": {"x"}}}),
		key("source.ip", "source.ip", `"10.0.0.0/8"`, ask{source: "10.1.1.1"}, ask{source: "11.1.1.1", remote: "10.1.1.1"}),
		key("remote.ip", "remote.ip", `"10.0.0.0/8"`, ask{source: "11.1.1.1", remote: "10.1.1.1"}, ask{source: "10.1.1.1", remote: "11.1.1.1"}),
		key("source.namespace", "source.namespace", `"shop"`, ask{from: frontend}, ask{from: guest}),
		key("source.principal", "source.principal", `"`+frontend+`"`, ask{from: frontend}, ask{from: guest}),
		key("source.serviceAccount", "source.serviceAccount", `"frontend"`, ask{from: frontend}, ask{from: "cluster.local/ns/other/sa/frontend"}),
		key("source.trustDomain", "source.trustDomain", `"cluster.local"`, ask{from: frontend}, ask{from: "td/ns/shop/sa/frontend"}),
		key("request.auth.principal", "request.auth.principal", `"https://idp.test/alice"`, ask{claims: aliceOnly}, ask{claims: `{"iss":"https://idp.test","sub":"bob"}`}),
		key("request.auth.audiences", "request.auth.audiences", `"pay"`, ask{claims: `{"aud":["x","pay"]}`}, ask{claims: `{"aud":["x"]}`}),
		key("request.auth.audiences as text", "request.auth.audiences", `"pay"`, ask{claims: `{"aud":"pay"}`}, ask{claims: `{"aud":"x"}`}),
		key("request.auth.presenter", "request.auth.presenter", `"app"`, ask{claims: `{"azp":"app"}`}, ask{claims: `{"azp":"x"}`}),
		key("request.auth.claims", "request.auth.claims[groups]", `"finance"`, ask{claims: `{"groups":["a","finance"]}`}, ask{claims: `{"groups":["a"]}`}),
		key("request.auth.claims nested", "request.auth.claims[realm_access][roles]", `"admin"`, ask{claims: `{"realm_access":{"roles":["admin"]}}`}, ask{claims: `{"realm_access":["admin"],"roles":["admin"]}`}),
		key("request.auth.claims with dots and slashes", "request.auth.claims[https://x.test/role]", `"admin"`, ask{claims: `{"https://x.test/role":"admin"}`}, ask{claims: `{}`}),
		key("destination.ip", "destination.ip", `"10.0.0.0/8"`, ask{dest: "10.1.1.1"}, ask{dest: "11.1.1.1"}),
		key("destination.port", "destination.port", `"8080"`, ask{port: 8080}, ask{port: 8081}),
		key("connection.sni", "connection.sni", `"*.Example.com"`, ask{sni: "www.example.COM"}, ask{sni: ""}),
		{
			name: "authz-18 header names ignore case", docs: allow(when("request.headers[X-CamelCase]", `values: ["1"]`)),
			asks: []ask{{headers: header{"x-camelcase": {"1"}}, want: allowed}},
		},
		{
			name: "authz-18 an ALLOW takes the joined value only", docs: allow(when("request.headers[x]", `values: ["a", "b,c"]`)),
			asks: []ask{
				{headers: header{"x": {"a"}}, want: allowed}, {headers: header{"x": {"a", "b"}}, want: noMatch}, {headers: header{"x": {"b", "a"}}, want: noMatch},
				{headers: header{"x": {"b", "c"}}, want: allowed}, {headers: header{"x": {"b,c"}}, want: allowed},
			},
		},
		{
			name: "authz-18 a DENY takes any value too", docs: deny(when("request.headers[x]", `values: ["a", "b,c"]`)),
			asks: []ask{
				{headers: header{"x": {"z", "a"}}, want: denied}, {headers: header{"x": {"a", "z"}}, want: denied}, {headers: header{"x": {"b", "c"}}, want: denied},
				{headers: header{"x": {"b", "z"}}, want: noPolicy}, {headers: header{"x": {"a,z"}}, want: noPolicy},
			},
		},
		{
			name: "authz-18 a DENY of notValues takes any value too", docs: deny(when("request.headers[x]", `notValues: ["good"]`)),
			asks: []ask{
				{headers: header{"x": {"good"}}, want: noPolicy}, {headers: header{"x": {"good", "bad"}}, want: denied}, {headers: header{"x": {"good", "good"}}, want: denied}, {want: denied},
			},
		},
		{
			name: "authz-18 numbers and booleans never match", docs: allow(when("request.auth.claims[n]", `values: ["7", "true", "*"]`)),
			asks: []ask{
				{claims: `{"n":7}`, want: noMatch}, {claims: `{"n":true}`, want: noMatch}, {claims: `{"n":null}`, want: noMatch}, {claims: `{"n":[7,true]}`, want: noMatch},
				{claims: `{"n":{"n":"7"}}`, want: noMatch}, {claims: `{"n":""}`, want: noMatch}, {claims: `{"n":"7"}`, want: allowed}, {claims: `{"n":[7,"7"]}`, want: allowed},
			},
		},
		{
			name: "authz-18 scope and permission are split, and no longer whole", docs: `{rules: [{when: [{key: "request.auth.claims[scope]", values: [read]}]}, {when: [{key: "request.auth.claims[permission]", values: ["read write"]}]}]}`,
			asks: []ask{
				{claims: `{"scope":"write read"}`, want: allowed}, {claims: `{"scope":["read"]}`, want: allowed}, {claims: `{"scope":"readonly"}`, want: noMatch},
				{claims: `{"permission":"read write"}`, want: noMatch}, {claims: `{"permission":["read write"]}`, want: "allow: ALLOW shop/p[1]"},
			},
		},
		{
			name: "authz-18 spaceDelimitedClaims of the rule", docs: allow(when("request.auth.claims[roles]", `values: [admin]`)),
			asks: []ask{{claims: `{"roles":"user  admin"}`, want: noMatch}, {claims: `{"roles":"user  admin"}`, split: []string{"roles"}, want: allowed}},
		},
		{
			name: "authz-18 notValues of a list", docs: allow(when("request.auth.claims[g]", `notValues: [banned]`)),
			asks: []ask{{claims: `{"g":["a","banned"]}`, want: noMatch}, {claims: `{"g":["a"]}`, want: allowed}, {want: allowed}},
		},
		{
			name: "authz-18 a long list in the token", docs: allow(when("request.auth.claims[g]", `values: [h, z], notValues: [k]`)),
			asks: []ask{{claims: `{"g":["a","b","c","d","e","f","g","h"]}`, want: allowed}, {claims: `{"g":["a","b","c","d","e","f","g"]}`, want: noMatch}, {claims: `{"g":["h","b","c","d","e","f","g","k"]}`, want: noMatch}},
		},
	})
}

func TestTCP(t *testing.T) {
	httpOnly := map[string]string{
		"hosts":                   `{to: [{operation: {hosts: [x], ports: ["3306"]}}]}`,
		"notHosts":                `{to: [{operation: {notHosts: [x], ports: ["3306"]}}]}`,
		"methods":                 `{to: [{operation: {methods: [GET], ports: ["3306"]}}]}`,
		"notMethods":              `{to: [{operation: {notMethods: [GET], ports: ["3306"]}}]}`,
		"paths":                   `{to: [{operation: {paths: ["/x"], ports: ["3306"]}}]}`,
		"notPaths":                `{to: [{operation: {notPaths: ["/x"], ports: ["3306"]}}]}`,
		"requestPrincipals":       `{from: [{source: {requestPrincipals: [x/y]}}], to: [{operation: {ports: ["3306"]}}]}`,
		"notRequestPrincipals":    `{from: [{source: {notRequestPrincipals: [x/y]}}], to: [{operation: {ports: ["3306"]}}]}`,
		"request.headers":         `{to: [{operation: {ports: ["3306"]}}], when: [{key: "request.headers[x]", values: [y]}]}`,
		"request.headers not":     `{to: [{operation: {ports: ["3306"]}}], when: [{key: "request.headers[x]", notValues: [y]}]}`,
		"request.auth.principal":  `{to: [{operation: {ports: ["3306"]}}], when: [{key: request.auth.principal, notValues: [y/z]}]}`,
		"request.auth.audiences":  `{to: [{operation: {ports: ["3306"]}}], when: [{key: request.auth.audiences, notValues: [y]}]}`,
		"request.auth.presenter":  `{to: [{operation: {ports: ["3306"]}}], when: [{key: request.auth.presenter, notValues: [y]}]}`,
		"request.auth.claims":     `{to: [{operation: {ports: ["3306"]}}], when: [{key: "request.auth.claims[x]", notValues: [y]}]}`,
		"in one of several":       `{to: [{operation: {ports: ["3306"]}}, {operation: {ports: ["3306"], methods: [GET]}}]}`,
		"beside a source of none": `{from: [{source: {namespaces: ["*"]}}, {source: {notNamespaces: ["*"]}}], to: [{operation: {ports: ["3306"], methods: [GET]}}]}`,
	}
	for name, rule := range httpOnly {
		run(t, []row{
			{name: "authz-19 ALLOW " + name + " never matches", docs: allow(rule), asks: []ask{{tcp: true, port: 3306, want: noMatch}, {tcp: true, from: frontend, port: 3306, want: noMatch}}},
			{
				name: "authz-20 DENY " + name + " denies what the rest matches", docs: deny(rule),
				asks: []ask{{tcp: true, port: 3306, want: denied}, {tcp: true, from: frontend, port: 3306, want: denied}, {tcp: true, port: 3307, want: noPolicy}},
			},
		})
	}
	run(t, []row{
		{
			name: "authz-20 DENY of a namespace and methods denies its TCP", docs: deny(`{from: [{source: {namespaces: [dev]}}], to: [{operation: {methods: [POST]}}]}`),
			asks: []ask{{tcp: true, from: "td/ns/dev/sa/a", want: denied}, {tcp: true, from: frontend, want: noPolicy}, {from: "td/ns/dev/sa/a", want: noPolicy}, {from: "td/ns/dev/sa/a", method: "POST", want: denied}},
		},
		{
			name: "authz-19 the other rules of an ALLOW go on", docs: `{rules: [{to: [{operation: {methods: [GET]}}]}, {from: [{source: {namespaces: [shop]}}]}]}`,
			asks: []ask{{tcp: true, from: frontend, want: "allow: ALLOW shop/p[1]"}, {tcp: true, from: guest, want: noMatch}},
		},
		{
			name: "authz-19 what is evaluated on TCP",
			docs: allow(`{from: [{source: {remoteIpBlocks: [203.0.113.0/24], trustDomains: [cluster.local], serviceAccounts: [frontend]}}], when: [{key: remote.ip, values: [203.0.113.0/25]}, {key: source.serviceAccount, values: [frontend]}, {key: source.trustDomain, notValues: [td9]}, {key: connection.sni, values: [db.shop]}, {key: destination.ip, values: [10.0.0.1]}]}`),
			asks: []ask{
				{tcp: true, from: frontend, source: "10.0.0.9", remote: "203.0.113.5", sni: "db.shop", dest: "10.0.0.1", want: allowed},
				{tcp: true, from: frontend, source: "203.0.113.5", sni: "db.shop", dest: "10.0.0.1", want: allowed},
				{tcp: true, from: frontend, source: "203.0.113.5", remote: "203.0.113.200", sni: "db.shop", dest: "10.0.0.1", want: noMatch},
				{tcp: true, from: guest, source: "10.0.0.9", remote: "203.0.113.5", sni: "db.shop", dest: "10.0.0.1", want: noMatch},
				{tcp: true, from: frontend, source: "10.0.0.9", remote: "203.0.113.5", sni: "db", dest: "10.0.0.1", want: noMatch},
				{tcp: true, from: frontend, source: "10.0.0.9", remote: "203.0.113.5", sni: "db.shop", dest: "10.0.0.2", want: noMatch},
			},
		},
	})
}
