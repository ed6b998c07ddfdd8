package authz_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// validateMesh has an alias, so that expansion can be told from its absence, and
// two providers.
var validateMesh = policy.Mesh{
	TrustDomain: "td1", TrustDomainAliases: []string{"td2"},
	ExtensionProviders: []policy.ExtensionProvider{{Name: "opa"}, {Name: "own"}},
}

// decoded reads one YAML document; where it has no kind it is the spec of an
// AuthorizationPolicy shop/p.
func decoded(t *testing.T, text string) policy.Document {
	t.Helper()
	if !strings.HasPrefix(text, "kind:") {
		text = "kind: AuthorizationPolicy\nspec:\n  " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n  ")
	}
	if !strings.Contains(text, "metadata:") {
		text += "\nmetadata: {name: p, namespace: shop}"
	}
	object, err := yaml.YAMLToJSONStrict([]byte("apiVersion: security.istio.io/v1\n" + text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	doc, err := authz.Decode(object)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return doc
}

type validateTest struct {
	name string
	text string
	want []string // Finding.String() of each
}

func runValidate(t *testing.T, tests []validateTest) {
	t.Helper()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, f := range authz.Validate(decoded(t, tt.text), validateMesh) {
				got = append(got, f.String())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("findings (-want +got):\n%s", diff)
			}
		})
	}
}

// withSource is an ALLOW policy of one rule with one source of these fields.
func withSource(fields string) string {
	return "rules: [{from: [{source: {" + fields + "}}]}]"
}

func withOperation(fields string) string {
	return "rules: [{to: [{operation: {" + fields + "}}]}]"
}

func withCondition(fields string) string { return "rules: [{when: [{" + fields + "}]}]" }

const (
	inSource    = "spec.rules[0].from[0].source"
	inOperation = "spec.rules[0].to[0].operation"
	inWhen      = "spec.rules[0].when[0]"
)

func TestValidateSelection(t *testing.T) {
	runValidate(t, []validateTest{
		{"authz-02 selector or targetRefs", "selector: {matchLabels: {a: b}}\ntargetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: g}]\nrules: [{from: [{source: {namespaces: [a]}}]}]", []string{
			`error: spec: only one of selector, targetRef and targetRefs may be given`,
			`warning: spec: sidecars ignore a policy with a target reference: no castellan-proxy enforces this one`,
		}},
		{"authz-02 targetRef counts too", "targetRef: {kind: Service, name: s}\ntargetRefs: [{kind: Service, group: core, name: s}]\nrules: [{from: [{source: {namespaces: [a]}}]}]", []string{
			`error: spec: only one of selector, targetRef and targetRefs may be given`,
			`warning: spec: sidecars ignore a policy with a target reference: no castellan-proxy enforces this one`,
		}},
		{"authz-02 sixteen at most", "rules: [{from: [{source: {namespaces: [a]}}]}]\ntargetRefs: [" + strings.Repeat("{kind: Service, name: s},", 17) + "]", []string{
			`error: spec.targetRefs: 17 references, at most 16 are allowed`,
			`warning: spec: sidecars ignore a policy with a target reference: no castellan-proxy enforces this one`,
		}},
		{"authz-02 kinds, names and namespaces", "rules: [{from: [{source: {namespaces: [a]}}]}]\ntargetRefs: [{kind: Pod, name: p}, {kind: Service, namespace: other, name: \"\"}, {kind: GatewayClass, group: gateway.networking.k8s.io, name: c}, {kind: ServiceEntry, group: networking.istio.io, name: e, namespace: shop}]", []string{
			`error: spec.targetRefs[0]: "/Pod": allowed: gateway.networking.k8s.io/Gateway, gateway.networking.k8s.io/GatewayClass, core/Service, networking.istio.io/ServiceEntry`,
			`error: spec.targetRefs[1].name: required`,
			`error: spec.targetRefs[1].namespace: "other": a reference across namespaces is not allowed; leave it out or give "shop"`,
			`error: spec.targetRefs[2]: "GatewayClass": a GatewayClass may be targeted from the root namespace "castellan-system" only`,
			`warning: spec: sidecars ignore a policy with a target reference: no castellan-proxy enforces this one`,
		}},
		{"authz-35 wildcards and empty keys in selectors", "rules: [{from: [{source: {namespaces: [a]}}]}]\nselector: {matchLabels: {\"\": x, \"a*\": x, app: \"o*\", long: " + strings.Repeat("a", 64) + "}}", []string{
			`error: spec.selector.matchLabels: a label key must not be empty`,
			`error: spec.selector.matchLabels["a*"]: "a*": no wildcard is allowed in a label key`,
			`error: spec.selector.matchLabels.app: "o*": no wildcard is allowed in a label value`,
			`error: spec.selector.matchLabels.long: "` + strings.Repeat("a", 64) + `": 64 bytes long, a label value has at most 63`,
		}},
		{"authz-35 an empty selector is legal and warned about", "rules: [{from: [{source: {namespaces: [a]}}]}]\nselector: {}", []string{
			`warning: spec.selector: an empty selector selects every workload of its scope; leave selector out if that is meant`,
		}},
		{"metadata", "kind: AuthorizationPolicy\nmetadata: {name: \"\"}\nspec: {rules: [{from: [{source: {namespaces: [a]}}]}]}", []string{
			`error: metadata.name: an RFC 1123 subdomain is wanted`,
			`error: metadata.namespace: required: a policy without a namespace would select nobody knows what`,
		}},
		{"metadata that is no name", "kind: AuthorizationPolicy\nmetadata: {name: a/b, namespace: A}\nspec: {rules: [{from: [{source: {namespaces: [a]}}]}]}", []string{
			`error: metadata.name: "a/b": an RFC 1123 subdomain is wanted`,
			`error: metadata.namespace: "A": an RFC 1123 label is wanted`,
		}},
		{"authz-23 dry-run", "kind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop, annotations: {istio.io/dry-run: \"true\"}}\nspec: {rules: [{from: [{source: {namespaces: [a]}}]}]}", nil},
		{"authz-23 dry-run of another value", "kind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop, annotations: {istio.io/dry-run: \"false\"}}\nspec: {rules: [{from: [{source: {namespaces: [a]}}]}]}", []string{
			`error: metadata.annotations["istio.io/dry-run"]: "false": allowed: "true"; remove the annotation to enforce the policy`,
		}},
		{"authz-23 dry-run of CUSTOM", "kind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop, annotations: {istio.io/dry-run: \"true\"}}\nspec: {action: CUSTOM, provider: {name: opa}, rules: [{}]}", []string{
			`error: metadata.annotations["istio.io/dry-run"]: "true": not with action CUSTOM; allowed with: ALLOW, DENY`,
		}},
		{"authz-23 dry-run of RequestAuthentication", "kind: RequestAuthentication\nmetadata: {name: p, namespace: shop, annotations: {istio.io/dry-run: \"true\"}}\nspec: {jwtRules: [{issuer: i, jwksUri: https://i/keys, audiences: [a]}]}", []string{
			`error: metadata.annotations["istio.io/dry-run"]: "true": only an AuthorizationPolicy can be tried out; a RequestAuthentication would be enforced all the same`,
		}},
	})
}

func TestValidateActions(t *testing.T) {
	runValidate(t, []validateTest{
		{"authz-03 unknown action", "action: LOG\nrules: [{}]", []string{`error: spec.action: "LOG": allowed: ALLOW, DENY, AUDIT, CUSTOM`}},
		{"authz-03 AUDIT never decides", "action: AUDIT", []string{`warning: spec.action: "AUDIT": AUDIT never decides, and castellan-proxy writes every request to its access log already`}},
		{"authz-04 ALLOW without rules", "{}", []string{`warning: spec.rules: an ALLOW policy without rules denies every request; add the rule {} if all are to be allowed`}},
		{"authz-04 ALLOW all", "rules: [{}]", []string{`warning: spec.rules[0]: an empty rule allows every request, callers without identity included`}},
		{"authz-04 DENY without rules", "action: DENY", []string{`error: spec.rules: a DENY policy without rules never denies; add the rule {} if all are to be denied`}},
		{"authz-04 DENY all", "action: DENY\nrules: [{}]", []string{`warning: spec.rules[0]: an empty rule denies every request`}},
		{"authz-04 CUSTOM without rules", "action: CUSTOM\nprovider: {name: opa}", []string{`error: spec.rules: a CUSTOM policy without rules never asks its provider; add the rule {} if it is to be asked about all`}},
		{"authz-06 ALLOW that only excludes identities", withSource("notPrincipals: [td1/ns/a/sa/b]"), []string{
			`warning: ` + inSource + `: only excludes identities, so it allows callers that have none; add principals: ["*"] to ask for one`,
		}},
		{"authz-06 ALLOW that excludes some of those it names", withSource("namespaces: [a], notPrincipals: [td1/ns/a/sa/b]"), nil},
		{"authz-06 ALLOW that only excludes tokens", withSource(`namespaces: [a], notRequestPrincipals: ["iss/sub"]`), []string{
			`warning: ` + inSource + `: only excludes tokens, so it allows requests that carry none; add requestPrincipals: ["*"] to ask for one`,
		}},
		{"authz-06 the same in when", withCondition("key: source.principal, notValues: [td1/ns/a/sa/b]"), []string{
			`warning: ` + inWhen + `.notValues: only excludes identities, so it allows callers that have none; add a source with principals: ["*"] to ask for one`,
		}},
		{"authz-06 DENY of all but one blocks plaintext, which is the safe side", "action: DENY\n" + withSource("notPrincipals: [td1/ns/a/sa/b]"), nil},
		{"authz-22 CUSTOM", "action: CUSTOM\nprovider: {name: opa}\nrules: [{to: [{operation: {ports: [\"8080\"], paths: [/a]}}]}]", nil},
		{"authz-22 no provider", "action: CUSTOM\nrules: [{}]", []string{`error: spec.provider.name: required with action CUSTOM`}},
		{"authz-22 unknown provider", "action: CUSTOM\nprovider: {name: other}\nrules: [{}]", []string{
			`warning: spec.provider.name: "other": unknown provider: every request that matches is denied (declared: opa, own)`,
		}},
		{"authz-22 provider with another action", "provider: {name: opa}\nrules: [{}]", []string{
			`error: spec.provider: "opa": allowed with action CUSTOM only, not ALLOW`,
			`warning: spec.rules[0]: an empty rule allows every request, callers without identity included`,
		}},
		{"authz-22 fields of mTLS and JWT", "action: CUSTOM\nprovider: {name: opa}\nrules: [{from: [{source: {principals: [\"*\"]}}, {source: {notTrustDomains: [a]}}, {source: {remoteIpBlocks: [10.0.0.1]}}], when: [{key: source.namespace, values: [a]}, {key: \"request.auth.claims[a]\", values: [b]}, {key: source.ip, values: [10.0.0.1]}, {key: destination.port, values: [\"80\"]}]}]", []string{
			`error: ` + inSource + `.principals: "*": not with action CUSTOM: the provider is asked before identities are judged; allowed: ipBlocks, remoteIpBlocks`,
			`error: spec.rules[0].from[1].source.notTrustDomains: "a": not with action CUSTOM: the provider is asked before identities are judged; allowed: ipBlocks, remoteIpBlocks`,
			`error: spec.rules[0].when[0].key: "source.namespace": not with action CUSTOM: its provider is asked before identities and tokens are judged`,
			`error: spec.rules[0].when[1].key: "request.auth.claims[a]": not with action CUSTOM: its provider is asked before identities and tokens are judged`,
		}},
	})
}

func TestValidateStructure(t *testing.T) {
	runValidate(t, []validateTest{
		{"authz-35 512 rules", "rules: [" + strings.Repeat("{from: [{source: {namespaces: [a]}}]},", 512) + "]", nil},
		{"authz-35 513 rules", "rules: [" + strings.Repeat("{from: [{source: {namespaces: [a]}}]},", 513) + "]", []string{`error: spec.rules: 513 rules, at most 512 are allowed`}},
		{"authz-35 empty from and to", "rules: [{from: [], to: []}]", []string{
			`error: spec.rules[0].from: must not be empty; leave it out to match every source`,
			`error: spec.rules[0].to: must not be empty; leave it out to match every operation`,
			`warning: spec.rules[0]: an empty rule allows every request, callers without identity included`,
		}},
		{"authz-35 no source", "rules: [{from: [{}]}]", []string{`error: ` + inSource + ": required and must not be empty; leave `from` out to match every source"}},
		{"authz-35 empty source", withSource(""), []string{`error: ` + inSource + ": must not be empty; leave `from` out to match every source"}},
		{"authz-35 source of empty lists", withSource("namespaces: []"), []string{`error: ` + inSource + ": must not be empty; leave `from` out to match every source"}},
		{"authz-35 an empty list beside others", withSource("namespaces: [a], ipBlocks: []"), []string{`warning: ` + inSource + `.ipBlocks: an empty list is read as an absent one and restricts nothing`}},
		{"authz-35 no operation", "rules: [{to: [{}]}]", []string{`error: ` + inOperation + ": must not be empty; leave `to` out to match every operation"}},
		{"authz-35 empty operation", withOperation(""), []string{`error: ` + inOperation + ": must not be empty; leave `to` out to match every operation"}},
		{"authz-35 empty strings", "rules: [{from: [{source: {namespaces: [a, \"\"]}}], to: [{operation: {notHosts: [\"\"]}}], when: [{key: connection.sni, notValues: [\"\"]}]}]", []string{
			`error: ` + inSource + `.namespaces[1]: an empty string is not allowed`,
			`error: ` + inOperation + `.notHosts[0]: an empty string is not allowed`,
			`error: ` + inWhen + `.notValues[0]: an empty string is not allowed`,
		}},
		{"authz-17 a condition without values", withCondition("key: source.ip"), []string{`error: ` + inWhen + `: "source.ip": at least one of values and notValues is required`}},
		{"authz-17 a condition with one empty list", withCondition("key: source.ip, values: [10.0.0.1], notValues: []"), []string{`warning: ` + inWhen + `.notValues: an empty list is read as an absent one and restricts nothing`}},
	})
}

func TestValidateValues(t *testing.T) {
	const middle = "a * in the middle is literal; allowed as wildcard: *, prefix*, *suffix"
	const leading = "the leading * makes this a suffix match and every further * literal"
	runValidate(t, []validateTest{
		{"authz-07 wildcards at an end", withOperation(`hosts: ["*", "a*", "*a", a]`), nil},
		{"authz-07 wildcards elsewhere", withOperation(`hosts: ["a*b"], paths: ["/a/*/b", "*/admin*"], methods: ["G*T"]`), []string{
			`warning: ` + inOperation + `.hosts[0]: "a*b": ` + middle,
			`warning: ` + inOperation + `.methods[0]: "G*T": ` + middle,
			`warning: ` + inOperation + `.paths[0]: "/a/*/b": ` + middle,
			`warning: ` + inOperation + `.paths[1]: "*/admin*": ` + leading,
		}},
		{"authz-09 methods in lower case", withOperation("methods: [get]"), []string{`warning: ` + inOperation + `.methods[0]: "get": never matches: methods are upper case, and gRPC is POST`}},
		{"authz-09 ports", withOperation(`ports: ["0", "65535"], notPorts: ["65536", http, "-1", "8080-8090"]`), []string{
			`error: ` + inOperation + `.notPorts[0]: "65536": not a port; allowed: 0 to 65535, of the workload, not of its service`,
			`error: ` + inOperation + `.notPorts[1]: "http": not a port; allowed: 0 to 65535, of the workload, not of its service`,
			`error: ` + inOperation + `.notPorts[2]: "-1": not a port; allowed: 0 to 65535, of the workload, not of its service`,
			`error: ` + inOperation + `.notPorts[3]: "8080-8090": not a port; allowed: 0 to 65535, of the workload, not of its service`,
		}},
		{"authz-10 templates", withOperation(`paths: ["/a/{*}", "/{**}", "/store/{**}/cart", "/foo/{*}/bar/{**}", "/a/{*}/", "/a%20b/{*}"]`), nil},
		{"authz-10 a path that never matches", withOperation(`paths: [admin, "/a?b=c", "/a#b", "/a/*"]`), []string{
			`warning: ` + inOperation + `.paths[0]: "admin": never matches: a path starts with "/"`,
			`warning: ` + inOperation + `.paths[1]: "/a?b=c": never matches: query and fragment are not part of the path`,
			`warning: ` + inOperation + `.paths[2]: "/a#b": never matches: query and fragment are not part of the path`,
		}},
		{"authz-24 a path that no request has once normalised", withOperation(`paths: ["/a/../b", "/%41", "/a//b"]`), []string{
			`warning: ` + inOperation + `.paths[0]: "/a/../b": never matches: under the mesh's pathNormalization BASE no request has this path; write "/b"`,
			`warning: ` + inOperation + `.paths[1]: "/%41": never matches: under the mesh's pathNormalization BASE no request has this path; write "/A"`,
		}},
		{"authz-11 principals", withSource(`principals: ["*", "td1/ns/a/sa/b", "*/ns/a/sa/b", "other/ns/a/*", "td1/ns/*", "*-td/ns/a/sa/b", "td*"]`), []string{
			`warning: ` + inSource + `.principals[4]: "td1/ns/*": trust domain "td1" is taken literally here: only a principal of the form TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT stands for the mesh's domain and its aliases`,
		}},
		{"authz-11 principals that never match", withSource(`principals: ["spiffe://td1/ns/a/sa/b", td1, "cluster.local/ns/foo/*", "td1/ns/*/sa/b"]`), []string{
			`warning: ` + inSource + `.principals[0]: "spiffe://td1/ns/a/sa/b": never matches: a principal is written without the scheme, as in "cluster.local/ns/NAMESPACE/sa/ACCOUNT"`,
			`warning: ` + inSource + `.principals[1]: "td1": never matches: a trust domain alone names no workload; write TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`,
			`warning: ` + inSource + `.principals[2]: "cluster.local/ns/foo/*": trust domain "cluster.local" is taken literally here: only a principal of the form TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT stands for the mesh's domain and its aliases`,
			`warning: ` + inSource + `.principals[3]: "td1/ns/*/sa/b": ` + middle,
		}},
		{"authz-12 namespaces take a wildcard anywhere", withSource(`namespaces: ["a*b*c", "*"], notNamespaces: [A]`), []string{
			`warning: ` + inSource + `.notNamespaces[0]: "A": never matches: not the name of a namespace (lower-case letters, digits, - and * are allowed)`,
		}},
		{"authz-13 service accounts", withSource(`serviceAccounts: [a, ns/a, a.b], trustDomains: [td1]`), nil},
		{"authz-13 no wildcard, no third segment", withSource(`serviceAccounts: ["ns/*", "a/b/c", "/a", "ns/"], notServiceAccounts: [Orders, ` + strings.Repeat("a", 321) + `]`), []string{
			`error: ` + inSource + `.serviceAccounts[0]: "ns/*": service accounts take no wildcard; allowed: ACCOUNT or NAMESPACE/ACCOUNT (for patterns use namespaces or principals)`,
			`error: ` + inSource + `.serviceAccounts[1]: "a/b/c": not of the form [NAMESPACE/]ACCOUNT; allowed: ACCOUNT or NAMESPACE/ACCOUNT (for patterns use namespaces or principals)`,
			`error: ` + inSource + `.serviceAccounts[2]: "/a": not of the form [NAMESPACE/]ACCOUNT; allowed: ACCOUNT or NAMESPACE/ACCOUNT (for patterns use namespaces or principals)`,
			`error: ` + inSource + `.serviceAccounts[3]: "ns/": not of the form [NAMESPACE/]ACCOUNT; allowed: ACCOUNT or NAMESPACE/ACCOUNT (for patterns use namespaces or principals)`,
			`warning: ` + inSource + `.notServiceAccounts[0]: "shop/Orders": never matches: no service account can have this name`,
			`error: ` + inSource + `.notServiceAccounts[1]: "` + strings.Repeat("a", 120) + `…": longer than 320 characters; allowed: ACCOUNT or NAMESPACE/ACCOUNT (for patterns use namespaces or principals)`,
		}},
		{"authz-13 sixteen at most", withSource("serviceAccounts: [" + strings.Repeat("a,", 17) + "]"), []string{`error: ` + inSource + `.serviceAccounts: 17 accounts, at most 16 are allowed`}},
		{"authz-13 not with principals or namespaces", withSource("serviceAccounts: [a], notNamespaces: [b]"), []string{
			`error: ` + inSource + `: serviceAccounts cannot stand with principals or namespaces; say it all with one of them`,
		}},
		{"authz-14 trust domains", withSource(`trustDomains: [td1, "td*", "*1", "*"]`), nil},
		{"authz-14 one star at an end, no slash", withSource(`trustDomains: ["t*1", "**", "td1/ns", "*d*", TD1, cluster.local]`), []string{
			`error: ` + inSource + `.trustDomains[0]: "t*1": one '*' is allowed, at an end; allowed: NAME, prefix*, *suffix, *`,
			`error: ` + inSource + `.trustDomains[1]: "**": one '*' is allowed, at an end; allowed: NAME, prefix*, *suffix, *`,
			`error: ` + inSource + `.trustDomains[2]: "td1/ns": a trust domain has no '/'; allowed: NAME, prefix*, *suffix, *`,
			`error: ` + inSource + `.trustDomains[3]: "*d*": one '*' is allowed, at an end; allowed: NAME, prefix*, *suffix, *`,
			`warning: ` + inSource + `.trustDomains[4]: "TD1": never matches: not a trust domain (lower-case letters, digits, -, . and _ are allowed)`,
			`warning: ` + inSource + `.trustDomains[5]: "cluster.local": literal here: it does not stand for the mesh's trust domain "td1" as it does in principals`,
		}},
		{"authz-15 request principals", withSource(`requestPrincipals: ["*", "iss/sub", "https://iss/*", "iss/pre*", "*/sub", "*suf/sub", "*suf", "pre*"]`), nil},
		{"authz-15 request principals that mislead", withSource(`requestPrincipals: ["*/*", iss, "i*s/sub", "*s/s*"]`), []string{
			`warning: ` + inSource + `.requestPrincipals[0]: "*/*": matches a subject of exactly "*" only; write * for any token`,
			`warning: ` + inSource + `.requestPrincipals[1]: "iss": never matches: a request principal is ISSUER/SUBJECT`,
			`warning: ` + inSource + `.requestPrincipals[2]: "i*s/sub": a * in the middle is literal; allowed as wildcard: *, ISSUER/*, ISSUER/prefix*, */SUBJECT, *suffix/SUBJECT, *suffix, prefix*`,
			`warning: ` + inSource + `.requestPrincipals[3]: "*s/s*": the leading * wins and the last one is literal`,
		}},
		{"authz-16 addresses", withSource(`ipBlocks: [10.0.0.1, 10.0.0.0/8, "2001:db8::/32", "::1"], notIpBlocks: [10.0.0.1/8]`), nil},
		{"authz-16 what is no address", withSource(`remoteIpBlocks: [10.0.0, 10.0.0.0/33, localhost, "fe80::1%eth0"], notIpBlocks: ["*"]`), []string{
			`error: ` + inSource + `.notIpBlocks[0]: "*": not an IP address or CIDR; allowed as in 203.0.113.4, 203.0.113.0/24, 2001:db8::/32`,
			`error: ` + inSource + `.remoteIpBlocks[0]: "10.0.0": not an IP address or CIDR; allowed as in 203.0.113.4, 203.0.113.0/24, 2001:db8::/32`,
			`error: ` + inSource + `.remoteIpBlocks[1]: "10.0.0.0/33": not an IP address or CIDR; allowed as in 203.0.113.4, 203.0.113.0/24, 2001:db8::/32`,
			`error: ` + inSource + `.remoteIpBlocks[2]: "localhost": not an IP address or CIDR; allowed as in 203.0.113.4, 203.0.113.0/24, 2001:db8::/32`,
			`error: ` + inSource + `.remoteIpBlocks[3]: "fe80::1%eth0": not an IP address or CIDR; allowed as in 203.0.113.4, 203.0.113.0/24, 2001:db8::/32`,
		}},
	})
}

func TestValidateTemplates(t *testing.T) {
	for _, path := range []string{
		"/a{b", "/a}b", "/{x}", "/{}", "/{***}", "{*}", "a/{*}", "/{**}/x/{*}", "/{**}/{**}", "/a/{*}.txt", "/x{*}", "/a/{*}/b*", "/*/{*}",
		"/a/{*}/é", "/a b/{*}", "/a/{*}/%2", "/a/{*}?b", "*{*}", "/{name=*}",
	} {
		t.Run("authz-10 "+path, func(t *testing.T) {
			doc := document("p", policy.AuthorizationPolicy{Rules: []policy.Rule{{To: []policy.To{{Operation: &policy.Operation{NotPaths: []string{path}}}}}}})
			findings := authz.Validate(doc, validateMesh)
			if len(findings) != 1 || findings[0].Severity != authz.SeverityError || findings[0].Field != inOperation+".notPaths[0]" || findings[0].Value != path ||
				!strings.HasSuffix(findings[0].Reason, "; allowed: {*} for one segment, {**} for any number, each as a whole segment, {**} last") {
				t.Errorf("findings %v, want one error", findings)
			}
		})
	}
}

func TestValidateConditions(t *testing.T) {
	var good []string
	for _, key := range []string{
		"request.headers[x-a]", "request.headers[:authority]", "request.headers[:method]", "source.namespace", "source.principal",
		"source.serviceAccount", "source.trustDomain", "request.auth.principal", "request.auth.audiences", "request.auth.presenter",
		"request.auth.claims[a]", "request.auth.claims[a][b]", "connection.sni",
	} {
		good = append(good, "{key: \""+key+"\", values: [td1/ns/a/sa/b]}")
	}
	doc := decoded(t, "rules: [{when: ["+strings.Join(good, ", ")+", {key: source.ip, values: [10.0.0.1]}, {key: remote.ip, values: [10.0.0.1]}, {key: destination.ip, values: [10.0.0.1]}, {key: destination.port, values: [\"80\"]}]}]")
	t.Run("authz-17 every key", func(t *testing.T) {
		for _, f := range authz.Validate(doc, validateMesh) {
			if strings.HasSuffix(f.Field, ".key") {
				t.Errorf("%s", f)
			}
		}
	})
	bad := map[string]string{
		"source.name":                  "unknown key",
		"Source.IP":                    "unknown key",
		"request.headers":              "unknown key",
		"request.headers[]":            "malformed key: request.headers[NAME] is wanted",
		"request.headers[x a]":         "malformed key: not a header name",
		"request.headers[:path]":       "this pseudo-header cannot be matched: use operation.paths, which are compared with the normalised path",
		"request.auth.claims":          "unknown key",
		"request.auth.claims[a":        "malformed key: request.auth.claims[NAME][NAME]… is wanted",
		"request.auth.claims[a]b":      "malformed key: request.auth.claims[NAME][NAME]… is wanted",
		"destination.labels[app]":      "unknown key: use selector.matchLabels",
		"destination.namespace":        "unknown key: use metadata.namespace",
		"experimental.envoy.filters.a": "metadata of Envoy filters does not exist here: castellan-proxy has no Envoy filters whose metadata could be matched",
		"":                             "unknown key",
	}
	for key, reason := range bad {
		for _, action := range []string{policy.ActionAllow, policy.ActionDeny} {
			t.Run("authz-21 "+action+" "+key, func(t *testing.T) {
				findings := authz.Validate(document("p", policy.AuthorizationPolicy{Action: action, Rules: []policy.Rule{{When: []policy.Condition{{Key: key, Values: []string{"v"}}}}}}), validateMesh)
				if len(findings) == 0 {
					t.Fatal("no findings, want an error")
				}
				if f := findings[0]; f.Severity != authz.SeverityError || f.Field != inWhen+".key" || f.Value != key || !strings.HasPrefix(f.Reason, reason+"; allowed: request.headers[NAME], ") {
					t.Errorf("finding %v, want the reason %q and the allowed keys", f, reason)
				}
			})
		}
	}
	runValidate(t, []validateTest{
		{"authz-21 values the compiler cannot represent", "rules: [{when: [{key: source.ip, values: [x]}, {key: destination.port, notValues: [http]}, {key: source.serviceAccount, values: [\"*\"]}, {key: source.trustDomain, values: [a/b]}]}]", []string{
			`error: spec.rules[0].when[0].values[0]: "x": not an IP address or CIDR; allowed as in 203.0.113.4, 203.0.113.0/24, 2001:db8::/32`,
			`error: spec.rules[0].when[1].notValues[0]: "http": not a port; allowed: 0 to 65535, of the workload, not of its service`,
			`error: spec.rules[0].when[2].values[0]: "*": service accounts take no wildcard; allowed: ACCOUNT or NAMESPACE/ACCOUNT (for patterns use namespaces or principals)`,
			`error: spec.rules[0].when[3].values[0]: "a/b": a trust domain has no '/'; allowed: NAME, prefix*, *suffix, *`,
		}},
	})
}

func TestValidateTCP(t *testing.T) {
	const wider = "HTTP only: on a TCP port this field is dropped and the rule applies to all that the rest of it matches; name the HTTP ports in `ports`"
	const never = "HTTP only: on a TCP port this whole rule never allows; give TCP ports a rule of their own"
	mixed := "rules: [{from: [{source: {namespaces: [dev], requestPrincipals: [\"*\"]}}], to: [{operation: {methods: [POST]}}], when: [{key: \"request.headers[x]\", values: [a]}]}]"
	fields := []string{inSource + ".requestPrincipals", inOperation + ".methods", inWhen + ".key"}
	all := func(reason string) []string {
		var s []string
		for _, f := range fields {
			s = append(s, "warning: "+f+": "+reason)
		}
		return s
	}
	tcp, http := map[uint16]string{3306: "mysql", 8080: "http"}, map[uint16]string{8080: "http", 9090: "grpc", 7070: ""}
	tests := []struct {
		name, text string
		ports      map[uint16]string
		want       []string
	}{
		{"authz-19 DENY on a port known to be TCP", "action: DENY\n" + mixed, tcp, all(wider)},
		{"authz-19 DENY where nobody declared ports", "action: DENY\n" + mixed, nil, all(wider)},
		{"authz-19 DENY where no port is TCP", "action: DENY\n" + mixed, http, nil},
		{"authz-19 ALLOW on a port known to be TCP", mixed, tcp, all(never)},
		{"authz-19 ALLOW where nobody declared ports", mixed, nil, nil},
		{"authz-19 DENY for HTTP ports", "action: DENY\n" + strings.Replace(mixed, "methods: [POST]", "methods: [POST], ports: [\"8080\"]", 1), tcp, nil},
		{"authz-19 DENY that names its ports", "action: DENY\n" + strings.Replace(mixed, "methods: [POST]", "methods: [POST], ports: [\"8080\"]", 1), nil, nil},
		{"authz-19 DENY that excludes the TCP port", "action: DENY\n" + strings.Replace(mixed, "methods: [POST]", "methods: [POST], notPorts: [\"3306\"]", 1), tcp, nil},
		{"authz-19 DENY for a TCP port", "action: DENY\n" + strings.Replace(mixed, "methods: [POST]", "methods: [POST], ports: [\"3306\"]", 1), tcp, all(wider)},
		{"authz-19 DENY for HTTP ports in when", "action: DENY\n" + strings.Replace(mixed, "when: [", "when: [{key: destination.port, values: [\"8080\"]}, ", 1), tcp, nil},
		{"authz-19 fields that TCP has", "action: DENY\nrules: [{from: [{source: {serviceAccounts: [a], trustDomains: [td1], remoteIpBlocks: [10.0.0.1]}}], when: [{key: connection.sni, values: [a]}, {key: remote.ip, values: [10.0.0.1]}]}]", tcp, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, f := range authz.ValidateFor(decoded(t, tt.text), validateMesh, tt.ports) {
				got = append(got, f.String())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("findings (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidateRequestAuthentication(t *testing.T) {
	rules := func(s string) string { return "kind: RequestAuthentication\nspec: {jwtRules: [" + s + "]}" }
	const rule = "spec.jwtRules[0]"
	runValidate(t, []validateTest{
		{"authz-28 a whole rule", rules(`{issuer: "https://iss", audiences: [a], jwksUri: "https://iss/keys", fromHeaders: [{name: x-jwt, prefix: "Bearer "}], fromParams: [t], fromCookies: [c], outputPayloadToHeader: x-payload, outputClaimToHeaders: [{header: x-sub, claim: a.sub}], timeout: 5s, spaceDelimitedClaims: [roles]}`), nil},
		{"authz-28 discovery", rules(`{issuer: "https://iss", audiences: [a]}`), nil},
		{"authz-28 discovery needs a URL", rules(`{issuer: me@example.com, audiences: [a]}`), []string{
			`warning: ` + rule + `.issuer: "me@example.com": with neither jwks nor jwksUri its keys are looked up by OpenID discovery, and it is no URL: every token will be refused`,
		}},
		{"authz-28 no issuer with jwksUri", rules(`{jwksUri: "https://iss/keys", audiences: [a]}`), []string{
			`warning: ` + rule + `.issuer: without an issuer every token that these keys signed is accepted, whoever it says issued it`,
		}},
		{"authz-28 no issuer at all", rules(`{audiences: [a]}`), []string{`error: ` + rule + `.issuer: required unless jwksUri says whose keys are meant`}},
		{"authz-28 jwks and jwksUri", rules(`{issuer: i, audiences: [a], jwksUri: "https://iss/keys", jwks: '{"keys":[{"kty":"EC","x":"a"}]}'}`), []string{
			`error: ` + rule + `: only one of jwks and jwksUri may be given`,
		}},
		{"authz-29 no audiences", rules(`{issuer: i, jwksUri: "https://iss/keys"}`), []string{
			`warning: ` + rule + `.audiences: without audiences a token meant for any other service of this issuer is accepted`,
		}},
		{"authz-35 empty strings", rules(`{issuer: i, jwksUri: "https://iss/keys", audiences: [""], fromParams: [""], spaceDelimitedClaims: [""]}`), []string{
			`error: ` + rule + `.audiences[0]: an empty string is not allowed`,
			`error: ` + rule + `.fromParams[0]: an empty string is not allowed`,
			`error: ` + rule + `.spaceDelimitedClaims[0]: an empty string is not allowed`,
		}},
		{"authz-35 a bad jwksUri", rules(`{issuer: i, audiences: [a], jwksUri: "ftp://iss/keys"}, {issuer: j, audiences: [a], jwksUri: "https://user:word@iss/keys"}, {issuer: k, audiences: [a], jwksUri: "https:///keys"}`), []string{
			`error: ` + rule + `.jwksUri: "ftp://iss/keys": not a URL; allowed: https://HOST/PATH, or http:// where mesh.jwks.allow has "http"`,
			`error: spec.jwtRules[1].jwksUri: "https://user:xxxxx@iss/keys": must not hold a user name or password`,
			`error: spec.jwtRules[2].jwksUri: "https:///keys": not a URL; allowed: https://HOST/PATH, or http:// where mesh.jwks.allow has "http"`,
		}},
		{"authz-28 plain http is not fetched", rules(`{issuer: i, audiences: [a], jwksUri: "http://iss/keys"}`), []string{
			`warning: ` + rule + `.jwksUri: "http://iss/keys": plain http is refused unless mesh.jwks.allow has "http": the keys will not be fetched and every token will be refused`,
		}},
		{"authz-35 a bad jwks", rules(`{issuer: i, audiences: [a], jwks: "no"}, {issuer: j, audiences: [a], jwks: '{"keys":[]}'}, {issuer: k, audiences: [a], jwks: '{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}'}, {issuer: l, audiences: [a], jwks: '{"keys":[{"kty":"EC","x":"a","d":"c2VjcmV0"}]}'}`), []string{
			`error: ` + rule + `.jwks: not a JSON Web Key Set; allowed: {"keys": [...]}`,
			`error: spec.jwtRules[1].jwks: key set has no usable key; allowed: RSA and EC public keys`,
			`error: spec.jwtRules[2].jwks: holds a private or symmetric key; give public keys only, and replace that key, since it has been disclosed`,
			`error: spec.jwtRules[3].jwks: holds a private or symmetric key; give public keys only, and replace that key, since it has been disclosed`,
		}},
		{"authz-35 a bad timeout", rules(`{issuer: i, audiences: [a], jwksUri: "https://i/keys", timeout: "5"}, {issuer: j, audiences: [a], jwksUri: "https://i/keys", timeout: 0s}, {issuer: k, audiences: [a], jwksUri: "https://i/keys", timeout: 2m}`), []string{
			`error: ` + rule + `.timeout: "5": not a timeout; allowed: 1ms to 1m0s, as in "5s"`,
			`error: spec.jwtRules[1].timeout: "0s": not a timeout; allowed: 1ms to 1m0s, as in "5s"`,
			`error: spec.jwtRules[2].timeout: "2m": not a timeout; allowed: 1ms to 1m0s, as in "5s"`,
		}},
		{"authz-35 names of headers and cookies", rules(`{issuer: i, audiences: [a], jwksUri: "https://i/keys", fromHeaders: [{name: ""}, {name: "x y"}], fromCookies: ["a=b"], outputPayloadToHeader: "x:y", outputClaimToHeaders: [{header: "x y", claim: a}, {header: X-A, claim: ""}, {header: x-a, claim: b}, {header: Host, claim: c}, {header: x-forwarded-client-cert, claim: c}]}`), []string{
			`error: ` + rule + `.fromHeaders[0].name: not the name of a header`,
			`error: ` + rule + `.fromHeaders[1].name: "x y": not the name of a header`,
			`error: ` + rule + `.fromCookies[0]: "a=b": not the name of a cookie`,
			`error: ` + rule + `.outputPayloadToHeader: "x:y": not the name of a header; allowed: letters, digits, - and _`,
			`error: ` + rule + `.outputClaimToHeaders[0].header: "x y": not the name of a header; allowed: letters, digits, - and _`,
			`error: ` + rule + `.outputClaimToHeaders[1].claim: required`,
			`error: ` + rule + `.outputClaimToHeaders[2].header: "x-a": given twice; each claim needs a header of its own`,
			`error: ` + rule + `.outputClaimToHeaders[3].header: "Host": reserved: no claim may be written to it`,
			`error: ` + rule + `.outputClaimToHeaders[4].header: "x-forwarded-client-cert": reserved: no claim may be written to it`,
		}},
		{"authz-25 no rules", "kind: RequestAuthentication\nspec: {}", []string{`warning: spec.jwtRules: without rules no token is looked at, so no request has a request principal`}},
		{"authz-25 two rules for one issuer", rules(`{issuer: i, audiences: [a], jwksUri: "https://i/keys"}, {issuer: i, audiences: [b], jwksUri: "https://i/keys"}`), []string{
			`warning: spec.jwtRules[1].issuer: "i": also the issuer of rule 0: a token of it must satisfy both or the first that accepts it decides its principal`,
		}},
	})
}

func TestValidatePeerAuthentication(t *testing.T) {
	peer := func(namespace, spec string) string {
		return "kind: PeerAuthentication\nmetadata: {name: p, namespace: " + namespace + "}\nspec: {" + spec + "}"
	}
	runValidate(t, []validateTest{
		{"authz-31 a whole document", peer("shop", `selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}, 9090: {mode: UNSET}}`), nil},
		{"authz-31 unknown mode", peer("shop", "mtls: {mode: strict}"), []string{`error: spec.mtls.mode: "strict": allowed: UNSET, DISABLE, PERMISSIVE, STRICT`}},
		{"authz-31 DISABLE", peer("shop", "mtls: {mode: DISABLE}"), []string{`warning: spec.mtls.mode: "DISABLE": no caller has an identity where mutual TLS is off, so no rule that names one matches`}},
		{"authz-31 portLevelMtls needs a selector", peer("shop", "portLevelMtls: {8080: {mode: STRICT}}"), []string{`error: spec.portLevelMtls: needs a selector with labels: ports are those of a workload`}},
		{"authz-35 an empty portLevelMtls", peer("shop", "selector: {matchLabels: {app: a}}, portLevelMtls: {}"), []string{`error: spec.portLevelMtls: must not be empty; leave it out`}},
		{"authz-35 ports", peer("shop", `selector: {matchLabels: {app: a}}, portLevelMtls: {"0": {mode: STRICT}, "08080": {}, "65536": {mode: X}, http: {}}`), []string{
			`error: spec.portLevelMtls["0"]: "0": not a port; allowed: 1 to 65535, of the workload, not of its service`,
			`error: spec.portLevelMtls["08080"]: "08080": not a port; allowed: 1 to 65535, of the workload, not of its service`,
			`error: spec.portLevelMtls["65536"]: "65536": not a port; allowed: 1 to 65535, of the workload, not of its service`,
			`error: spec.portLevelMtls["65536"].mode: "X": allowed: UNSET, DISABLE, PERMISSIVE, STRICT`,
			`error: spec.portLevelMtls.http: "http": not a port; allowed: 1 to 65535, of the workload, not of its service`,
		}},
		{"authz-31 selectors in the root namespace", peer("castellan-system", "selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}"), []string{
			`warning: spec.selector: ignored: in the root namespace "castellan-system" a PeerAuthentication is for the whole mesh or for nobody`,
		}},
	})
}

func TestValidateDocumentWithoutSpec(t *testing.T) {
	got := authz.Validate(policy.Document{Kind: "Pod", Metadata: policy.Metadata{Name: "p", Namespace: "shop"}}, policy.Mesh{})
	want := []authz.Finding{{
		Severity: authz.SeverityError, Field: "kind", Value: "Pod",
		Reason: "no spec of this kind; allowed: AuthorizationPolicy, RequestAuthentication, PeerAuthentication",
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("findings (-want +got):\n%s", diff)
	}
}
