package authz_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"sigs.k8s.io/yaml"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
)

// workload is shop/orders in cluster.local with the label app: orders.
func workload(tb testing.TB) authz.Workload {
	tb.Helper()
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		tb.Fatal(err)
	}
	return authz.Workload{
		TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
		Account:     account,
		Labels:      map[string]string{"app": "orders", "version": "v1"},
	}
}

func document(name string, spec policy.AuthorizationPolicy) policy.Document {
	return policy.Document{
		Kind:          policy.KindAuthorization,
		Metadata:      policy.Metadata{Namespace: "shop", Name: name},
		Authorization: &spec,
	}
}

// documents reads YAML documents; of an AuthorizationPolicy named shop/p the spec
// alone may stand there.
func documents(tb testing.TB, text string) []policy.Document {
	tb.Helper()
	var docs []policy.Document
	for part := range strings.SplitSeq(text, "\n---\n") {
		var d struct {
			Kind     string          `json:"kind"`
			Metadata policy.Metadata `json:"metadata"`
			Spec     json.RawMessage `json:"spec"`
		}
		if err := yaml.Unmarshal([]byte(part), &d); err != nil {
			tb.Fatalf("%v in %s", err, part)
		}
		if d.Spec == nil {
			d.Spec, _ = yaml.YAMLToJSON([]byte(part))
		}
		if d.Metadata.Name == "" {
			d.Metadata.Name = "p"
		}
		if d.Metadata.Namespace == "" {
			d.Metadata.Namespace = "shop"
		}
		doc := policy.Document{Kind: d.Kind, Metadata: d.Metadata}
		var into any
		switch d.Kind {
		case policy.KindRequestAuthentication:
			doc.RequestAuthentication = new(policy.RequestAuthentication)
			into = doc.RequestAuthentication
		case policy.KindPeerAuthentication:
			doc.PeerAuthentication = new(policy.PeerAuthentication)
			into = doc.PeerAuthentication
		default:
			doc.Kind = policy.KindAuthorization
			doc.Authorization = new(policy.AuthorizationPolicy)
			into = doc.Authorization
		}
		if err := yaml.UnmarshalStrict(d.Spec, into); err != nil {
			tb.Fatalf("%v in %s", err, part)
		}
		docs = append(docs, doc)
	}
	return docs
}

// ask is a request, or a connection where tcp is set.
type ask struct {
	from    string // principal; empty is plaintext
	method  string
	path    string
	host    string
	headers header
	claims  string // JSON; empty is no token
	split   []string
	source  string
	dest    string
	remote  string
	port    uint16
	sni     string
	tcp     bool
	past    bool // CUSTOM has agreed

	want string
}

func (a ask) String() string {
	var b strings.Builder
	for _, p := range []struct{ name, value string }{
		{"", a.method}, {"", a.path}, {"from", a.from}, {"host", a.host}, {"claims", a.claims}, {"source", a.source},
		{"dest", a.dest}, {"remote", a.remote}, {"sni", a.sni}, {"headers", fmt.Sprint(map[string][]string(a.headers))},
	} {
		if p.value != "" && p.value != "map[]" {
			b.WriteString(" " + p.name + " " + p.value)
		}
	}
	if a.tcp {
		b.WriteString(" tcp")
	}
	return strings.TrimSpace(b.String())
}

func addr(tb testing.TB, s string) netip.Addr {
	tb.Helper()
	if s == "" {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

// decide puts the question to a snapshot.
func (a ask) decide(tb testing.TB, s *authz.Snapshot) authz.Decision {
	tb.Helper()
	peer := authz.Peer{SourceIP: addr(tb, a.source), DestinationIP: addr(tb, a.dest), DestinationPort: a.port, SNI: a.sni}
	if peer.DestinationPort == 0 {
		peer.DestinationPort = 8080
	}
	if a.from != "" {
		id, err := spiffeid.FromString("spiffe://" + a.from)
		if err != nil {
			tb.Fatal(err)
		}
		peer.ID = id
	}
	if a.tcp {
		peer.RemoteIP = addr(tb, a.remote)
		if a.past {
			return s.Connect(peer).AuthorizeTCPPastCustom()
		}
		return s.Connect(peer).AuthorizeTCP()
	}
	r := authz.Request{Method: a.method, Path: a.path, Host: a.host, RemoteIP: addr(tb, a.remote)}
	if r.Method == "" {
		r.Method = "GET"
	}
	if r.Path == "" {
		r.Path = "/"
	}
	if a.headers != nil {
		r.Header = a.headers
	}
	if a.claims != "" {
		var payload map[string]any
		if err := json.Unmarshal([]byte(a.claims), &payload); err != nil {
			tb.Fatal(err)
		}
		r.Claims = authz.NewClaims(payload, "", a.split)
	}
	if a.past {
		return s.Connect(peer).AuthorizePastCustom(&r)
	}
	return s.Connect(peer).Authorize(&r)
}

// show puts a decision in one line: "allow" or "deny", and what decided.
func show(d authz.Decision) string {
	word := "deny"
	if d.Allowed {
		word = "allow"
	}
	if d.Policy == "" {
		return word + ": " + d.Reason
	}
	return fmt.Sprintf("%s: %s %s[%d]", word, d.Action, d.Policy, d.Rule)
}

// Shorter forms of wants.
const (
	allowed   = "allow: ALLOW shop/p[0]"
	denied    = "deny: DENY shop/p[0]"
	noMatch   = "deny: no ALLOW rule matches"
	noPolicy  = "allow: no ALLOW policy"
	frontend  = "cluster.local/ns/shop/sa/frontend"
	guest     = "cluster.local/ns/guest/sa/intruder"
	aliceIs   = `{"iss":"https://idp.test","sub":"alice"`
	aliceOnly = aliceIs + `}`
)

// rule is one row: policies, and what they answer.
type row struct {
	name     string
	docs     string
	mesh     policy.Mesh
	problems []string // "field: reason" of what fails closed
	asks     []ask
}

func run(t *testing.T, rows []row) {
	t.Helper()
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			s, problems := authz.Compile(authz.Config{Documents: documents(t, r.docs), Workload: workload(t), Mesh: r.mesh})
			var got []string
			for _, p := range problems {
				got = append(got, p.Field+": "+p.Reason)
			}
			if strings.Join(got, "\n") != strings.Join(r.problems, "\n") {
				t.Errorf("problems:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(r.problems, "\n"))
			}
			for _, a := range r.asks {
				if got := show(a.decide(t, s)); got != a.want {
					t.Errorf("%s: %s, want %s", a, got, a.want)
				}
			}
		})
	}
}

// allow and deny wrap one rule in a policy.
func allow(rule string) string { return "{action: ALLOW, rules: [" + rule + "]}" }
func deny(rule string) string  { return "{action: DENY, rules: [" + rule + "]}" }

// source, operation and when are rules of one field.
func source(fields string) string    { return "{from: [{source: {" + fields + "}}]}" }
func operation(fields string) string { return "{to: [{operation: {" + fields + "}}]}" }
func when(key, values string) string {
	return fmt.Sprintf("{when: [{key: %q, %s}]}", key, values)
}
