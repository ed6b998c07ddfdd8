package reference_test

import (
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"sigs.k8s.io/yaml"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/authz/reference"
	"castellan.dev/identity"
)

type ruleCase struct {
	Name     string       `json:"name"`
	Mesh     policy.Mesh  `json:"mesh"`
	Policies []casePolicy `json:"policies"`
	Ask      []question   `json:"ask"`
}

type casePolicy struct {
	In     string                     `json:"in"`
	DryRun string                     `json:"dryRun"`
	Spec   policy.AuthorizationPolicy `json:"spec"`
}

type question struct {
	From           string              `json:"from"`
	Source         string              `json:"source"`
	Remote         string              `json:"remote"`
	Destination    string              `json:"destination"`
	SNI            string              `json:"sni"`
	Port           *uint16             `json:"port"`
	TCP            bool                `json:"tcp"`
	Method         string              `json:"method"`
	Host           string              `json:"host"`
	Path           string              `json:"path"`
	Headers        map[string][]string `json:"headers"`
	Token          map[string]any      `json:"token"`
	SpaceDelimited []string            `json:"spaceDelimited"`
	Want           string              `json:"want"`
	Action         *string             `json:"action"`
}

// TestRules asks both the engine and the reference what testdata/cases.yaml says.
func TestRules(t *testing.T) {
	text, err := os.ReadFile("testdata/cases.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cases []ruleCase
	if err := yaml.UnmarshalStrict(text, &cases); err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			cfg := c.config(t)
			snapshot, _ := authz.Compile(cfg)
			enforcer, err := reference.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			for i, q := range c.Ask {
				q.check(t, i, snapshot, enforcer)
			}
		})
	}
}

func (c ruleCase) config(t *testing.T) authz.Config {
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		t.Fatal(err)
	}
	cfg := authz.Config{Mesh: c.Mesh, Workload: authz.Workload{
		TrustDomain: spiffeid.RequireTrustDomainFromString("td"), Account: account, Labels: map[string]string{"app": "orders"},
	}}
	if cfg.Mesh.TrustDomain == "" {
		cfg.Mesh.TrustDomain = "td"
	}
	for i, p := range c.Policies {
		doc := policy.Document{Kind: policy.KindAuthorization, Authorization: &p.Spec, Metadata: policy.Metadata{Name: fmt.Sprint("p", i), Namespace: p.In}}
		if p.In == "" {
			doc.Metadata.Namespace = "shop"
		}
		if p.DryRun != "" {
			doc.Metadata.Annotations = map[string]string{"istio.io/dry-run": p.DryRun}
		}
		cfg.Documents = append(cfg.Documents, doc)
	}
	return cfg
}

func (q question) check(t *testing.T, i int, snapshot *authz.Snapshot, enforcer *reference.Enforcer) {
	t.Helper()
	peer, request, token := q.build(t)
	connection := snapshot.Connect(peer)
	decision := connection.Authorize(request)
	allowed, action, err := enforcer.Decide(peer, request, token)
	if q.TCP {
		decision = connection.AuthorizeTCP()
		allowed, action, err = enforcer.DecideTCP(peer)
	}
	if err != nil {
		t.Fatal(err)
	}
	if want := q.Want == "allow"; decision.Allowed != want || allowed != want {
		t.Errorf("question %d: want %s, engine allowed=%t (%s), reference allowed=%t", i, q.Want, decision.Allowed, decision.Reason, allowed)
	}
	if q.Action != nil && (decision.Action != *q.Action || action != *q.Action) {
		t.Errorf("question %d: want action %q, engine %q, reference %q", i, *q.Action, decision.Action, action)
	}
}

func (q question) build(t *testing.T) (authz.Peer, *authz.Request, *reference.Token) {
	t.Helper()
	peer := authz.Peer{DestinationPort: 8080, SNI: q.SNI, SourceIP: address(t, q.Source), RemoteIP: address(t, q.Remote), DestinationIP: address(t, q.Destination)}
	if q.Port != nil {
		peer.DestinationPort = *q.Port
	}
	if q.From != "" {
		id, err := spiffeid.FromString("spiffe://" + q.From)
		if err != nil {
			t.Fatal(err)
		}
		peer.ID = id
	}
	request := &authz.Request{Method: orElse(q.Method, "GET"), Host: orElse(q.Host, "orders"), Path: orElse(q.Path, "/"), Header: headers(q.Headers)}
	if q.Token == nil {
		return peer, request, nil
	}
	request.Claims = authz.NewClaims(q.Token, "", q.SpaceDelimited)
	return peer, request, &reference.Token{Payload: q.Token, SpaceDelimited: q.SpaceDelimited}
}

func orElse(s, or string) string {
	if s == "" {
		return or
	}
	return s
}

func address(t *testing.T, s string) netip.Addr {
	t.Helper()
	if s == "" {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
