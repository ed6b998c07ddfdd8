package authz_test

import (
	"math/rand/v2"
	"testing"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// FuzzAdmitted holds that what Validate admits Compile can represent (rule 21):
// admission, not the proxy, is where a policy is refused.
func FuzzAdmitted(f *testing.F) {
	for seed := range uint64(400) {
		f.Add(seed, "x")
	}
	for _, v := range odd() {
		f.Add(uint64(len(v)), v)
	}
	mesh := policy.Mesh{TrustDomain: "td1", TrustDomainAliases: []string{"td2"}, ExtensionProviders: []policy.ExtensionProvider{{Name: "opa"}}}
	f.Fuzz(func(t *testing.T, seed uint64, value string) {
		g := &oddGenerator{Rand: rand.New(rand.NewPCG(seed, 3)), values: append(odd(), value)}
		doc := g.document()
		for _, finding := range authz.Validate(doc, mesh) {
			if finding.Severity == authz.SeverityError {
				return
			}
		}
		w := workload(t)
		if _, problems := authz.Compile(authz.Config{Documents: []policy.Document{doc}, Workload: w, Mesh: mesh}); len(problems) > 0 {
			t.Fatalf("admitted, but: %+v\n%+v", problems, *doc.Authorization)
		}
	})
}

// odd are values at the edges of what fields take.
func odd() []string {
	return []string{
		"", "*", "**", "a", "a*", "*a", "a*b", "/", "/a", "/{*}", "/{**}", "/{*}/{**}", "/{**}/{*}", "/a{*}", "{*}", "/{*}/a b", "/{a}", "a{", "}",
		"1.2.3.4", "1.2.3.4/8", "1.2.3.4/33", "::1", "::ffff:1.2.3.4/120", "::ffff:1.2.3.4/90", "fe80::1%eth0", "1.2.3", "1.2.3.4/", "0.0.0.0/0", "::/0",
		"80", "0", "65535", "65536", "080", "-1", "+80", " 80", "000080", "http",
		"ns/sa", "ns/*", "a/b/c", "/sa", "ns/", "td/ns/a/sa/b", "*-td1/ns/a/sa/b", "td*/ns/a/sa/b", "cluster.local/ns/a/sa/b", "/ns/a/sa/b", "*/ns/a/sa/*",
		"td1", "TD", "*.td", "td.*", "t*d", "a/b", "https://x/y", "*/y", "x/*", "GET", "get",
	}
}

func oddKeys() []string {
	return []string{
		"source.ip", "remote.ip", "source.namespace", "source.principal", "source.serviceAccount", "source.trustDomain",
		"request.auth.principal", "request.auth.audiences", "request.auth.presenter", "destination.ip", "destination.port", "connection.sni",
		"request.headers[x]", "request.headers[X-Y]", "request.headers[:authority]", "request.headers[:method]", "request.headers[:path]", "request.headers[:scheme]",
		"request.headers[host]", "request.headers[]", "request.headers[", "request.headers[a]b", "request.headers[a][b]", "request.headers[a b]", "request.headers", "request.headers[:]",
		"request.auth.claims[a]", "request.auth.claims[a][b]", "request.auth.claims[]", "request.auth.claims[a]b", "request.auth.claims[a[b]", "request.auth.claims", "request.auth.claims[a]]",
		"request.auth.claims[a][b][c][d][e][f][g][h][i][j][k][l][m][n][o][p][q]", "request.auth.claims[a\x00b]",
		"experimental.envoy.filters.network.mysql_proxy[db.t]", "source", "", "Source.ip",
	}
}

type oddGenerator struct {
	*rand.Rand
	values []string
}

func (g *oddGenerator) list() []string {
	out := []string{g.values[g.IntN(len(g.values))]}
	for g.IntN(4) == 0 {
		out = append(out, g.values[g.IntN(len(g.values))])
	}
	return out
}

func (g *oddGenerator) document() policy.Document {
	spec := policy.AuthorizationPolicy{Action: []string{"", "ALLOW", "DENY", "CUSTOM"}[g.IntN(4)]}
	if spec.Action == policy.ActionCustom {
		spec.Provider = &policy.Provider{Name: []string{"opa", "nobody"}[g.IntN(2)]}
	}
	var r policy.Rule
	switch g.IntN(4) {
	case 0:
		var s policy.Source
		fields := []*[]string{
			&s.Principals, &s.NotPrincipals, &s.RequestPrincipals, &s.NotRequestPrincipals, &s.Namespaces, &s.NotNamespaces, &s.ServiceAccounts,
			&s.NotServiceAccounts, &s.TrustDomains, &s.NotTrustDomains, &s.IPBlocks, &s.NotIPBlocks, &s.RemoteIPBlocks, &s.NotRemoteIPBlocks,
		}
		*fields[g.IntN(len(fields))] = g.list()
		r.From = from(s)
	case 1:
		var o policy.Operation
		fields := []*[]string{&o.Hosts, &o.NotHosts, &o.Ports, &o.NotPorts, &o.Methods, &o.NotMethods, &o.Paths, &o.NotPaths}
		*fields[g.IntN(len(fields))] = g.list()
		r.To = to(o)
	default:
		c := policy.Condition{Key: oddKeys()[g.IntN(len(oddKeys()))]}
		if g.IntN(3) > 0 {
			c.Values = g.list()
		}
		if g.IntN(3) == 0 {
			c.NotValues = g.list()
		}
		r.When = []policy.Condition{c}
	}
	if g.IntN(8) > 0 {
		spec.Rules = []policy.Rule{r}
	}
	d := document("p", spec)
	if g.IntN(8) == 0 {
		d.Metadata.Annotations = map[string]string{"istio.io/dry-run": []string{"true", "false"}[g.IntN(2)]}
	}
	return d
}
