package judge_test

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/authz"
	"castellan.dev/identity"
	"castellan.dev/internal/judge"
)

func TestPortsWithHTTP(t *testing.T) {
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		spec      string
		on, other bool // port 8080, port 9090
	}{
		"no rules":                    {`{}`, false, false},
		"who only":                    {`{"rules":[{"from":[{"source":{"principals":["*"]}}]}]}`, false, false},
		"a method":                    {`{"rules":[{"to":[{"operation":{"methods":["GET"]}}]}]}`, true, true},
		"a method on a port":          {`{"rules":[{"to":[{"operation":{"methods":["GET"],"ports":["8080"]}}]}]}`, true, false},
		"not a path":                  {`{"action":"DENY","rules":[{"to":[{"operation":{"notPaths":["/"]}}]}]}`, true, true},
		"a host":                      {`{"rules":[{"to":[{"operation":{"hosts":["x"]}}]}]}`, true, true},
		"a token":                     {`{"rules":[{"from":[{"source":{"requestPrincipals":["*"]}}]}]}`, true, true},
		"a token on a port":           {`{"rules":[{"from":[{"source":{"requestPrincipals":["*"]}}],"to":[{"operation":{"ports":["8080"]}}]}]}`, true, false},
		"a header":                    {`{"rules":[{"when":[{"key":"request.headers[x]","values":["y"]}]}]}`, true, true},
		"another condition":           {`{"rules":[{"when":[{"key":"source.ip","values":["10.0.0.1"]}]}]}`, false, false},
		"a method, and bytes by port": {`{"rules":[{"to":[{"operation":{"methods":["GET"]}}]},{"to":[{"operation":{"ports":["9090"]}}]}]}`, true, false},
		"both on one port":            {`{"rules":[{"to":[{"operation":{"methods":["GET"],"ports":["8080"]}}]},{"to":[{"operation":{"ports":["8080"]}}]}]}`, true, false},
		"of another workload":         {`{"selector":{"matchLabels":{"app":"x"}},"rules":[{"to":[{"operation":{"methods":["GET"]}}]}]}`, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := authz.Decode([]byte(`{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"a","namespace":"shop"},"spec":` + c.spec + `}`))
			if err != nil {
				t.Fatal(err)
			}
			cfg := authz.Config{Workload: authz.Workload{
				TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), Account: account, Labels: map[string]string{"app": "orders"},
			}}
			cfg.Documents = append(cfg.Documents, d)
			h := judge.PortsWithHTTP(cfg)
			if h.On(8080) != c.on || h.On(9090) != c.other {
				t.Fatalf("8080 %v, 9090 %v", h.On(8080), h.On(9090))
			}
		})
	}
}
