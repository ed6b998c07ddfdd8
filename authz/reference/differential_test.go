package reference_test

import (
	"encoding/json"
	"testing"

	"pgregory.net/rapid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/authz/reference"
)

// TestEngineEqualsReference draws policies and requests; every answer of the
// engine must be the reference's. Each draw asks a few dozen questions, so that
// a plain run compares some thousands.
func TestEngineEqualsReference(t *testing.T) { rapid.Check(t, compare) }

// FuzzDecide is the same under Go's fuzzer, which looks for answers that reach
// code the seeds do not.
func FuzzDecide(f *testing.F) {
	f.Fuzz(rapid.MakeFuzz(compare))
}

// answer is what the two must agree on.
type answer struct {
	Allowed bool
	Action  string
}

func compare(t *rapid.T) {
	cfg := drawConfig(t)
	snapshot, _ := authz.Compile(cfg)
	enforced := newReference(t, cfg)
	pastCustom := newReference(t, without(cfg, func(d policy.Document) bool { return d.Authorization.Action == policy.ActionCustom }))
	shadow := newReference(t, tried(cfg))
	for range 3 {
		peer := drawPeer(t)
		connection := snapshot.Connect(peer)

		got := connection.AuthorizeTCP()
		same(t, "TCP", cfg, peer, nil, nil, answer{got.Allowed, got.Action}, tcpAnswer(t, enforced, peer))
		if got.Shadow != nil {
			same(t, "TCP shadow", cfg, peer, nil, nil, answer{got.Shadow.Allowed, got.Shadow.Action}, tcpAnswer(t, shadow, peer))
		}
		past := connection.AuthorizeTCPPastCustom()
		same(t, "TCP past CUSTOM", cfg, peer, nil, nil, answer{past.Allowed, past.Action}, tcpAnswer(t, pastCustom, peer))

		for range 5 {
			request, token := drawRequest(t)
			got := connection.Authorize(request)
			same(t, "HTTP", cfg, peer, request, token, answer{got.Allowed, got.Action}, httpAnswer(t, enforced, peer, request, token))
			if got.Shadow != nil {
				same(t, "HTTP shadow", cfg, peer, request, token, answer{got.Shadow.Allowed, got.Shadow.Action}, httpAnswer(t, shadow, peer, request, token))
			}
			past := connection.AuthorizePastCustom(request)
			same(t, "HTTP past CUSTOM", cfg, peer, request, token, answer{past.Allowed, past.Action}, httpAnswer(t, pastCustom, peer, request, token))
		}
	}
}

func newReference(t *rapid.T, cfg authz.Config) *reference.Enforcer {
	e, err := reference.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func without(cfg authz.Config, drop func(policy.Document) bool) authz.Config {
	var kept []policy.Document
	for _, d := range cfg.Documents {
		if !drop(d) {
			kept = append(kept, d)
		}
	}
	cfg.Documents = kept
	return cfg
}

// tried enforces what is in dry run.
func tried(cfg authz.Config) authz.Config {
	var docs []policy.Document
	for _, d := range cfg.Documents {
		if d.Metadata.Annotations["istio.io/dry-run"] == "true" {
			d.Metadata.Annotations = nil
		}
		docs = append(docs, d)
	}
	cfg.Documents = docs
	return cfg
}

func httpAnswer(t *rapid.T, e *reference.Enforcer, p authz.Peer, r *authz.Request, token *reference.Token) answer {
	allowed, action, err := e.Decide(p, r, token)
	if err != nil {
		t.Fatal(err)
	}
	return answer{allowed, action}
}

func tcpAnswer(t *rapid.T, e *reference.Enforcer, p authz.Peer) answer {
	allowed, action, err := e.DecideTCP(p)
	if err != nil {
		t.Fatal(err)
	}
	return answer{allowed, action}
}

func same(t *rapid.T, what string, cfg authz.Config, p authz.Peer, r *authz.Request, token *reference.Token, got, want answer) {
	if got == want {
		return
	}
	documents, _ := json.MarshalIndent(cfg.Documents, "", " ")
	t.Fatalf("%s: engine %+v, reference %+v\npeer %+v\nrequest %+v\ntoken %+v\nmesh %+v\n%s", what, got, want, p, r, token, cfg.Mesh, documents)
}
