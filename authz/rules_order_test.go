package authz_test

import (
	"testing"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// Rules 1 to 6 and 21 to 23: what applies, in which order, and what fails how.

func TestSelects(t *testing.T) {
	labels := map[string]string{"app": "orders", "version": "v1"}
	for _, tc := range []struct {
		name string
		doc  string
		mesh policy.Mesh
		want bool
	}{
		{"authz-01 same namespace", `{spec: {}}`, policy.Mesh{}, true},
		{"authz-01 other namespace", `{metadata: {namespace: other}, spec: {}}`, policy.Mesh{}, false},
		{"authz-01 root namespace by default", `{metadata: {namespace: castellan-system}, spec: {}}`, policy.Mesh{}, true},
		{"authz-01 root namespace by setting", `{metadata: {namespace: istio-system}, spec: {}}`, policy.Mesh{RootNamespace: "istio-system"}, true},
		{"authz-01 the default is no root where another is set", `{metadata: {namespace: castellan-system}, spec: {}}`, policy.Mesh{RootNamespace: "istio-system"}, false},
		{"authz-01 istio-system has no power by default", `{metadata: {namespace: istio-system}, spec: {}}`, policy.Mesh{}, false},
		{"authz-01 labels subset", `{spec: {selector: {matchLabels: {app: orders}}}}`, policy.Mesh{}, true},
		{"authz-01 labels all", `{spec: {selector: {matchLabels: {app: orders, version: v2}}}}`, policy.Mesh{}, false},
		{"authz-01 label missing", `{spec: {selector: {matchLabels: {tier: ""}}}}`, policy.Mesh{}, false},
		{"authz-01 root namespace with selector", `{metadata: {namespace: castellan-system}, spec: {selector: {matchLabels: {app: payments}}}}`, policy.Mesh{}, false},
		{"authz-01 empty selector", `{spec: {selector: {}}}`, policy.Mesh{}, true},
		{"authz-02 targetRefs", `{spec: {targetRefs: [{kind: Gateway, name: g}]}}`, policy.Mesh{}, false},
		{"authz-02 targetRef", `{spec: {targetRef: {kind: Gateway, name: g}}}`, policy.Mesh{}, false},
		{"authz-02 targetRefs of RequestAuthentication", `{kind: RequestAuthentication, spec: {targetRefs: [{kind: Gateway, name: g}]}}`, policy.Mesh{}, false},
		{"authz-02 targetRef of RequestAuthentication", `{kind: RequestAuthentication, spec: {targetRef: {kind: Gateway, name: g}}}`, policy.Mesh{}, false},
		{"authz-01 RequestAuthentication by labels", `{kind: RequestAuthentication, spec: {selector: {matchLabels: {app: orders}}}}`, policy.Mesh{}, true},
		{"authz-31 PeerAuthentication by labels", `{kind: PeerAuthentication, spec: {selector: {matchLabels: {app: x}}}}`, policy.Mesh{}, false},
		{"authz-31 selector in the root namespace", `{kind: PeerAuthentication, metadata: {namespace: castellan-system}, spec: {selector: {matchLabels: {app: orders}}}}`, policy.Mesh{}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := authz.Selects(documents(t, tc.doc)[0], "shop", labels, tc.mesh); got != tc.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestOrder(t *testing.T) {
	provider := policy.Mesh{ExtensionProviders: []policy.ExtensionProvider{{Name: "opa", Address: "127.0.0.1:9191"}}}
	everywhere := `{metadata: {namespace: castellan-system, name: all}, spec: {rules: [{}]}}`
	run(t, []row{
		{
			name: "authz-01 a policy for others is passed over",
			docs: `{spec: {selector: {matchLabels: {app: payments}}}}`,
			asks: []ask{{want: noPolicy}},
		},
		{
			name: "authz-03 DENY before ALLOW",
			docs: `{metadata: {name: a}, spec: {rules: [{}]}}` + "\n---\n" + `{metadata: {name: d}, spec: ` + deny(operation(`paths: ["/admin*"]`)) + `}`,
			asks: []ask{
				{path: "/admin/x", want: "deny: DENY shop/d[0]"},
				{path: "/", want: "allow: ALLOW shop/a[0]"},
			},
		},
		{
			name: "authz-03 no ALLOW policy allows",
			docs: deny(operation(`paths: ["/admin*"]`)),
			asks: []ask{{path: "/admin", want: denied}, {path: "/", want: noPolicy}, {tcp: true, want: denied}},
		},
		{
			name: "authz-03 an ALLOW policy denies the rest",
			docs: allow(operation(`methods: [GET]`)),
			asks: []ask{{want: allowed}, {method: "POST", want: noMatch}},
		},
		{
			name: "authz-03 scopes are pooled without precedence",
			docs: everywhere + "\n---\n" + deny(source(`namespaces: [guest]`)),
			asks: []ask{{from: guest, want: denied}, {from: frontend, want: "allow: ALLOW castellan-system/all[0]"}},
		},
		{
			name: "authz-03 CUSTOM before DENY, and past it",
			mesh: provider,
			docs: `{metadata: {name: c}, spec: {action: CUSTOM, provider: {name: opa}, rules: [{to: [{operation: {paths: ["/admin*"]}}]}]}}` +
				"\n---\n" + `{metadata: {name: d}, spec: ` + deny(operation(`paths: ["/admin/never"]`)) + `}`,
			asks: []ask{
				{path: "/admin/never", want: "deny: CUSTOM shop/c[0]"},
				{path: "/admin/never", past: true, want: "deny: DENY shop/d[0]"},
				{path: "/admin", want: "deny: CUSTOM shop/c[0]"},
				{path: "/admin", past: true, want: noPolicy},
				{path: "/", want: noPolicy},
			},
		},
		{
			name: "authz-03 AUDIT never decides",
			docs: `{action: AUDIT, rules: [{}]}`,
			asks: []ask{{want: noPolicy}, {tcp: true, want: noPolicy}},
		},
		{name: "authz-04 ALLOW without rules denies all", docs: `{spec: {}}`, asks: []ask{{from: frontend, want: noMatch}, {tcp: true, want: noMatch}}},
		{name: "authz-04 ALLOW of an empty rule allows all", docs: `{rules: [{}]}`, asks: []ask{{want: allowed}, {tcp: true, want: allowed}}},
		{name: "authz-04 DENY of an empty rule denies all", docs: `{action: DENY, rules: [{}]}`, asks: []ask{{want: denied}, {tcp: true, want: denied}}},
		{
			name: "authz-04 DENY without rules", docs: `{action: DENY}`,
			problems: []string{"spec.rules: DENY without rules; everything is denied"},
			asks:     []ask{{want: denied}, {tcp: true, want: denied}},
		},
		{
			name: "authz-04 CUSTOM without rules", docs: `{action: CUSTOM, provider: {name: opa}}`, mesh: provider,
			problems: []string{"spec.rules: CUSTOM without rules; everything is denied"},
			asks:     []ask{{want: "deny: CUSTOM shop/p[0]"}, {tcp: true, want: "deny: CUSTOM shop/p[0]"}},
		},
		{name: "authz-04 AUDIT without rules", docs: `{action: AUDIT}`, asks: []ask{{want: noPolicy}}},
		{
			name: "authz-05 or and and",
			docs: `{rules: [
  {from: [{source: {namespaces: [a, b], ipBlocks: [10.0.0.0/8]}}, {source: {principals: ["*/sa/root"]}}],
   to: [{operation: {methods: [GET, HEAD], paths: ["/a", "/b"]}}, {operation: {methods: [POST]}}],
   when: [{key: "request.headers[x]", values: ["1", "2"], notValues: ["2"]}, {key: "request.headers[y]", notValues: ["3"]}]},
  {to: [{operation: {paths: ["/free"]}}]}]}`,
			asks: []ask{
				{from: "td/ns/a/sa/x", source: "10.1.1.1", path: "/b", method: "HEAD", headers: header{"x": {"1"}}, want: allowed},
				{from: "td/ns/b/sa/x", source: "10.1.1.1", method: "POST", headers: header{"x": {"1"}, "y": {"4"}}, want: allowed},
				{from: "td/ns/z/sa/root", source: "11.1.1.1", method: "POST", headers: header{"x": {"1"}}, want: allowed},
				{from: "td/ns/a/sa/x", source: "11.1.1.1", path: "/b", headers: header{"x": {"1"}}, want: noMatch},
				{from: "td/ns/c/sa/x", source: "10.1.1.1", path: "/b", headers: header{"x": {"1"}}, want: noMatch},
				{from: "td/ns/a/sa/x", source: "10.1.1.1", path: "/c", headers: header{"x": {"1"}}, want: noMatch},
				{from: "td/ns/a/sa/x", source: "10.1.1.1", path: "/b", method: "PUT", headers: header{"x": {"1"}}, want: noMatch},
				{from: "td/ns/a/sa/x", source: "10.1.1.1", path: "/b", headers: header{"x": {"2"}}, want: noMatch},
				{from: "td/ns/a/sa/x", source: "10.1.1.1", path: "/b", headers: header{"x": {"1"}, "y": {"3"}}, want: noMatch},
				{from: "td/ns/a/sa/x", source: "10.1.1.1", path: "/b", want: noMatch},
				{path: "/free", want: "allow: ALLOW shop/p[1]"},
			},
		},
		{
			name: "authz-05 not is not one of",
			docs: allow(operation(`paths: ["/a*"], notPaths: ["/ab", "/ac"]`)),
			asks: []ask{{path: "/aa", want: allowed}, {path: "/ab", want: noMatch}, {path: "/ac", want: noMatch}},
		},
		{
			name: "authz-06 missing fails the positive", docs: allow(source(`principals: ["*"]`)),
			asks: []ask{{want: noMatch}, {from: frontend, want: allowed}},
		},
		{
			name: "authz-06 missing passes the negative", docs: allow(source(`notPrincipals: [x]`)),
			asks: []ask{{want: allowed}, {from: frontend, want: allowed}},
		},
		{
			name: "authz-06 DENY of notPrincipals * blocks plaintext", docs: deny(source(`notPrincipals: ["*"]`)),
			asks: []ask{{want: denied}, {from: frontend, want: noPolicy}, {tcp: true, want: denied}, {tcp: true, from: frontend, want: noPolicy}},
		},
		{
			name: "authz-06 no token, header, SNI or address",
			docs: deny(`{when: [{key: "request.auth.claims[a]", notValues: ["*"]}, {key: "request.headers[b]", notValues: ["*"]}, {key: connection.sni, notValues: ["*"]}, {key: source.ip, notValues: ["0.0.0.0/0", "::/0"]}, {key: request.auth.principal, notValues: ["*"]}]}`),
			asks: []ask{
				{want: denied}, {claims: `{"a":"1"}`, want: noPolicy}, {headers: header{"b": {""}}, want: noPolicy},
				{sni: "x", want: noPolicy}, {source: "1.2.3.4", want: noPolicy}, {source: "fe80::1", want: noPolicy}, {claims: aliceOnly, want: noPolicy},
			},
		},
	})
}

func TestFailsClosed(t *testing.T) {
	const get = `{operation: {methods: [GET]}}`
	for _, tc := range []struct {
		name, rule, problem string
		// request is one that the bad condition would not match, the rest does.
		request ask
	}{
		{"authz-21 unknown key", `{to: [` + get + `], when: [{key: request.color, values: [red]}]}`, "spec.rules[0].when[0].key: unknown key", ask{}},
		{"authz-21 malformed header key", `{to: [` + get + `], when: [{key: "request.headers[]", values: [red]}]}`, "spec.rules[0].when[0].key: malformed key: request.headers[NAME] is wanted", ask{}},
		{"authz-21 header key without end", `{to: [` + get + `], when: [{key: "request.headers[x", values: [red]}]}`, "spec.rules[0].when[0].key: malformed key: request.headers[NAME] is wanted", ask{}},
		{"authz-21 bad header name", `{to: [` + get + `], when: [{key: "request.headers[a b]", values: [red]}]}`, "spec.rules[0].when[0].key: malformed key: not a header name", ask{}},
		{"authz-21 pseudo-header", `{to: [` + get + `], when: [{key: "request.headers[:path]", values: [red]}]}`, "spec.rules[0].when[0].key: this pseudo-header cannot be matched", ask{}},
		{"authz-21 malformed claim key", `{to: [` + get + `], when: [{key: "request.auth.claims[a]b", values: [red]}]}`, "spec.rules[0].when[0].key: malformed key: request.auth.claims[NAME][NAME]… is wanted", ask{}},
		{"authz-21 claim key in claim key", `{to: [` + get + `], when: [{key: "request.auth.claims[a[b]]", values: [red]}]}`, "spec.rules[0].when[0].key: malformed key: request.auth.claims[NAME][NAME]… is wanted", ask{}},
		{"authz-17 Envoy filter metadata", `{to: [` + get + `], when: [{key: "experimental.envoy.filters.network.mysql_proxy[db.t]", values: ["[update]"]}]}`, "spec.rules[0].when[0].key: metadata of Envoy filters does not exist here", ask{}},
		{"authz-21 no values", `{to: [` + get + `], when: [{key: source.ip}]}`, "spec.rules[0].when[0]: neither values nor notValues", ask{}},
		{"authz-21 bad value drops the condition whole", `{to: [` + get + `], when: [{key: source.ip, values: [bad], notValues: [1.2.3.4]}]}`, "spec.rules[0].when[0].values[0]: not an IP address or CIDR", ask{source: "1.2.3.4"}},
		{"authz-21 bad CIDR", `{from: [{source: {ipBlocks: [1.2.3.4, 1.2.3.4/33]}}], to: [` + get + `]}`, "spec.rules[0].from[0].source.ipBlocks[1]: not an IP address or CIDR", ask{source: "9.9.9.9"}},
		{"authz-21 address with a zone", `{from: [{source: {ipBlocks: ["fe80::1%eth0"]}}], to: [` + get + `]}`, "spec.rules[0].from[0].source.ipBlocks[0]: not an IP address or CIDR", ask{}},
		{"authz-21 bad port", `{to: [{operation: {methods: [GET], ports: ["65536"]}}]}`, "spec.rules[0].to[0].operation.ports[0]: not a port (0-65535)", ask{}},
		{"authz-21 named port", `{to: [{operation: {methods: [GET], ports: [http]}}]}`, "spec.rules[0].to[0].operation.ports[0]: not a port (0-65535)", ask{}},
		{"authz-10 brace outside an operator", `{to: [{operation: {methods: [GET], paths: ["/a/{id}"]}}]}`, "spec.rules[0].to[0].operation.paths[0]: '{' and '}' may stand only in the operators {*} and {**}, each a whole segment", ask{}},
		{"authz-10 operator after the rest", `{to: [{operation: {methods: [GET], paths: ["/{**}/{*}"]}}]}`, "spec.rules[0].to[0].operation.paths[0]: {**} must be the last operator", ask{}},
		{"authz-10 star beside an operator", `{to: [{operation: {methods: [GET], paths: ["/{*}/a*"]}}]}`, "spec.rules[0].to[0].operation.paths[0]: a literal segment of a template holds RFC 3986 path characters only", ask{}},
		{"authz-10 template without a slash", `{to: [{operation: {methods: [GET], notPaths: ["{*}/a"]}}]}`, "spec.rules[0].to[0].operation.notPaths[0]: a path with '{' or '}' is a template and begins with '/'", ask{}},
		{"authz-13 wildcard account", `{from: [{source: {serviceAccounts: ["shop/*"]}}], to: [` + get + `]}`, "spec.rules[0].from[0].source.serviceAccounts[0]: service accounts take no wildcard", ask{}},
		{"authz-13 account with two slashes", `{from: [{source: {serviceAccounts: ["a/b/c"]}}], to: [` + get + `]}`, "spec.rules[0].from[0].source.serviceAccounts[0]: not of the form [NAMESPACE/]ACCOUNT", ask{}},
		{"authz-14 trust domain with a slash", `{from: [{source: {trustDomains: ["td/ns"]}}], to: [` + get + `]}`, "spec.rules[0].from[0].source.trustDomains[0]: a trust domain has no '/'", ask{}},
		{"authz-14 trust domain with an inner star", `{from: [{source: {trustDomains: ["a*b"]}}], to: [` + get + `]}`, "spec.rules[0].from[0].source.trustDomains[0]: one '*' is allowed, at an end", ask{}},
		{"authz-35 empty value", `{from: [{source: {namespaces: [""]}}], to: [` + get + `]}`, "spec.rules[0].from[0].source.namespaces[0]: empty value", ask{}},
		{"authz-35 empty source", `{from: [{source: {}}], to: [` + get + `]}`, "spec.rules[0].from[0].source: empty: it would match everything", ask{}},
		{"authz-35 empty from", `{from: [], to: [` + get + `]}`, "spec.rules[0].from: empty list", ask{}},
		{"authz-35 no operation", `{to: [{}]}`, "spec.rules[0].to[0].operation: empty: it would match everything", ask{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const others = "\n---\n" + `{metadata: {name: q}, spec: {rules: [{to: [{operation: {paths: ["/other"]}}]}]}}`
			a, d := tc.request, tc.request
			a.want, d.want = noMatch, denied
			run(t, []row{
				{name: "ALLOW never matches", docs: allow(tc.rule) + others, problems: []string{tc.problem}, asks: []ask{a}},
				{name: "DENY matches more", docs: deny(tc.rule), problems: []string{tc.problem}, asks: []ask{d}},
			})
		})
	}
	run(t, []row{
		{
			name: "authz-21 the other rules of an ALLOW policy go on", docs: `{rules: [{when: [{key: nonsense, values: [x]}]}, {to: [{operation: {methods: [GET]}}]}]}`,
			problems: []string{"spec.rules[0].when[0].key: unknown key"},
			asks:     []ask{{want: "allow: ALLOW shop/p[1]"}, {method: "POST", want: noMatch}},
		},
		{
			name: "authz-21 the rest of a DENY rule is enforced", docs: deny(`{to: [{operation: {methods: [GET]}}], when: [{key: nonsense, values: [x]}]}`),
			problems: []string{"spec.rules[0].when[0].key: unknown key"},
			asks:     []ask{{want: denied}, {method: "POST", want: noPolicy}},
		},
		{
			name: "authz-21 unknown action denies everything", docs: `{action: PERMIT, rules: [{to: [{operation: {methods: [GET]}}]}]}`,
			problems: []string{"spec.action: unknown action; everything is denied"},
			asks:     []ask{{want: denied}, {method: "POST", want: denied}, {tcp: true, want: denied}},
		},
	})
}

func TestNoSnapshot(t *testing.T) {
	var none *authz.Snapshot
	for name, s := range map[string]struct {
		s    *authz.Snapshot
		want string
	}{
		"authz-21 nil snapshot denies": {none, "deny: no policy received yet"},
		"authz-21 DenyAll denies": {func() *authz.Snapshot {
			s, _ := authz.Compile(authz.Config{Documents: documents(t, `{rules: [{}]}`), Workload: workload(t), DenyAll: "policy shop/p is not valid"})
			return s
		}(), "deny: policy shop/p is not valid"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, a := range []ask{{from: frontend}, {from: frontend, past: true}, {from: frontend, tcp: true}, {from: frontend, tcp: true, past: true}} {
				if got := show(a.decide(t, s.s)); got != s.want {
					t.Errorf("%s: got %s", a, got)
				}
			}
			if !s.s.HasHTTPRules() {
				t.Error("has no HTTP rules")
			}
		})
	}
	var c *authz.Connection
	if d := c.Authorize(&authz.Request{}); d.Allowed || d.Rule != -1 {
		t.Errorf("nil connection: %+v", d)
	}
	if d := c.AuthorizeTCP(); d.Allowed {
		t.Errorf("nil connection: %+v", d)
	}
	if none.MTLSMode(80) != authz.ModeStrict || none.JWTRules() != nil {
		t.Error("a nil snapshot is not strict")
	}
	open, _ := authz.Compile(authz.Config{Documents: documents(t, `{rules: [{}]}`), Workload: workload(t)})
	if d := open.Connect(authz.Peer{}).Authorize(nil); d.Allowed {
		t.Errorf("nil request: %+v", d)
	}
}

func TestCustom(t *testing.T) {
	mesh := policy.Mesh{ExtensionProviders: []policy.ExtensionProvider{{Name: "opa"}, {Name: "other"}}}
	custom := func(name, provider string) string {
		return `{metadata: {name: ` + name + `}, spec: {action: CUSTOM, provider: {name: "` + provider + `"}, rules: [{to: [{operation: {paths: ["/` + name + `"]}}]}]}}`
	}
	for _, tc := range []struct {
		name, docs, provider, reason string
		problems                     int
	}{
		{"authz-22 one provider", custom("a", "opa"), "opa", authz.ReasonCustom, 0},
		{"authz-22 one provider of two policies", custom("a", "opa") + "\n---\n" + custom("b", "opa"), "opa", authz.ReasonCustom, 0},
		{"authz-22 unknown provider", custom("a", "nobody"), "", authz.ReasonCustomUnresolved, 0},
		{"authz-22 several providers", custom("a", "opa") + "\n---\n" + custom("b", "other"), "", authz.ReasonCustomUnresolved, 1},
		{"authz-22 no provider", `{metadata: {name: a}, spec: {action: CUSTOM, rules: [{to: [{operation: {paths: ["/a"]}}]}]}}`, "", authz.ReasonCustomUnresolved, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, problems := authz.Compile(authz.Config{Documents: documents(t, tc.docs), Workload: workload(t), Mesh: mesh})
			if len(problems) != tc.problems {
				t.Errorf("problems: %v", problems)
			}
			d := ask{path: "/a"}.decide(t, s)
			if d.Allowed || d.Action != policy.ActionCustom || d.Provider != tc.provider || d.Reason != tc.reason {
				t.Errorf("got %+v", d)
			}
			if d := (ask{path: "/z"}).decide(t, s); !d.Allowed {
				t.Errorf("no rule matches: %+v", d)
			}
			// On TCP the path is dropped and the rule matches every connection.
			if d := (ask{tcp: true}).decide(t, s); d.Allowed || d.Action != policy.ActionCustom || d.Provider != tc.provider {
				t.Errorf("TCP: %+v", d)
			}
		})
	}
}

func TestDryRun(t *testing.T) {
	const dry = `annotations: {istio.io/dry-run: "true"}`
	dryAllow := `{metadata: {name: da, ` + dry + `}, spec: ` + allow(operation(`paths: ["/ok"]`)) + `}`
	dryDeny := `{metadata: {name: dd, ` + dry + `}, spec: ` + deny(operation(`paths: ["/admin"]`)) + `}`
	all := `{metadata: {name: all}, spec: {rules: [{}]}}`
	for _, tc := range []struct {
		name, docs   string
		ask          ask
		shadow       string
		shadowReason string
	}{
		{"authz-23 a dry-run ALLOW alone denies nothing", dryAllow, ask{path: "/x", want: noPolicy}, "deny: no ALLOW rule matches", authz.ReasonNoMatch},
		{"authz-23 a dry-run ALLOW matches", dryAllow, ask{path: "/ok", want: noPolicy}, "allow: ALLOW shop/da[0]", authz.ReasonAllowed},
		{"authz-23 a dry-run DENY denies nothing", dryDeny, ask{path: "/admin", want: noPolicy}, "deny: DENY shop/dd[0]", authz.ReasonDenied},
		{"authz-23 a dry-run DENY does not match", dryDeny, ask{path: "/x", want: noPolicy}, noPolicy, authz.ReasonNoAllowPolicy},
		{"authz-23 shadow beside what is enforced", all + "\n---\n" + dryDeny, ask{path: "/admin", want: "allow: ALLOW shop/all[0]"}, "deny: DENY shop/dd[0]", authz.ReasonDenied},
		{"authz-23 what is enforced counts in the shadow", all + "\n---\n" + dryAllow, ask{path: "/x", want: "allow: ALLOW shop/all[0]"}, "allow: ALLOW shop/all[0]", authz.ReasonAllowed},
		{"authz-23 on TCP", dryAllow, ask{tcp: true, want: noPolicy}, "deny: no ALLOW rule matches", authz.ReasonNoMatch},
		{"authz-23 DENY enforced casts its own shadow", deny(`{}`) + "\n---\n" + dryAllow, ask{want: denied}, denied, authz.ReasonDenied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, problems := authz.Compile(authz.Config{Documents: documents(t, tc.docs), Workload: workload(t)})
			if len(problems) > 0 {
				t.Error(problems)
			}
			d := tc.ask.decide(t, s)
			if got := show(d); got != tc.ask.want {
				t.Errorf("got %s, want %s", got, tc.ask.want)
			}
			if d.Shadow == nil {
				t.Fatal("no shadow")
			}
			got := show(authz.Decision{Allowed: d.Shadow.Allowed, Action: d.Shadow.Action, Policy: d.Shadow.Policy, Rule: d.Shadow.Rule, Reason: d.Shadow.Reason})
			if got != tc.shadow || d.Shadow.Reason != tc.shadowReason {
				t.Errorf("shadow %s (%s), want %s", got, d.Shadow.Reason, tc.shadow)
			}
		})
	}
	s, _ := authz.Compile(authz.Config{Documents: documents(t, all), Workload: workload(t)})
	if d := (ask{}).decide(t, s); d.Shadow != nil {
		t.Errorf("a shadow of nothing: %+v", d.Shadow)
	}

	const problem = `metadata.annotations[istio.io/dry-run]: dry-run is "true", on ALLOW and DENY only`
	run(t, []row{
		{
			name: "authz-23 another value on DENY is enforced", problems: []string{problem},
			docs: `{metadata: {annotations: {istio.io/dry-run: "yes"}}, spec: {action: DENY, rules: [{}]}}`,
			asks: []ask{{want: denied}},
		},
		{
			name: "authz-23 another value on ALLOW allows nothing", problems: []string{problem},
			docs: `{metadata: {annotations: {istio.io/dry-run: "false"}}, spec: {rules: [{}]}}`,
			asks: []ask{{want: noMatch}, {tcp: true, want: noMatch}},
		},
		{
			name: "authz-23 on CUSTOM is enforced", problems: []string{problem},
			mesh: policy.Mesh{ExtensionProviders: []policy.ExtensionProvider{{Name: "opa"}}},
			docs: `{metadata: {` + dry + `}, spec: {action: CUSTOM, provider: {name: opa}, rules: [{}]}}`,
			asks: []ask{{want: "deny: CUSTOM shop/p[0]"}},
		},
		{
			name: "authz-23 on AUDIT", problems: []string{problem},
			docs: `{metadata: {` + dry + `}, spec: {action: AUDIT, rules: [{}]}}`,
			asks: []ask{{want: noPolicy}},
		},
	})
}
