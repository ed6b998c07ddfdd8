package reference_test

import (
	"encoding/json"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/authz/reference"
)

// TestEngineEqualsReference draws policies and requests; every answer of the
// engine must be the reference's. Each draw asks a few dozen questions, so that
// a plain run compares some thousands.
func TestEngineEqualsReference(t *testing.T) {
	for range rounds {
		rapid.Check(t, compare)
	}
}

// FuzzDecide is the same under Go's fuzzer, which looks for answers that reach
// code the seeds do not.
func FuzzDecide(f *testing.F) {
	// The generator reads its choices from the input, some thousands of words of
	// it; shorter inputs than these say too little.
	for seed := range uint64(16) {
		choices := make([]byte, 1<<15)
		rand.NewChaCha8([32]byte{byte(seed)}).Read(choices)
		f.Add(choices)
	}
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
	q := questions{T: t, cfg: cfg, enforced: newReference(t, cfg)}
	q.pastCustom, q.shadow = q.enforced, q.enforced
	if past := without(cfg, isCustom); len(past.Documents) < len(cfg.Documents) {
		q.pastCustom = newReference(t, past)
	}
	if slices.ContainsFunc(cfg.Documents, isDryRun) {
		q.shadow = newReference(t, tried(cfg))
	}
	for range 3 {
		peer := drawPeer(t)
		connection := snapshot.Connect(peer)
		q.tcp(connection, peer)
		for range 5 {
			request, token := drawRequest(t)
			q.http(connection, peer, request, token)
		}
	}
	for range 3 {
		peer, request := drawFromCrowd(t)
		q.http(snapshot.Connect(peer), peer, request, nil)
	}
}

// questions asks both.
type questions struct {
	*rapid.T
	cfg                          authz.Config
	enforced, pastCustom, shadow *reference.Enforcer
}

func (q *questions) tcp(c *authz.Connection, p authz.Peer) {
	got := c.AuthorizeTCP()
	q.same("TCP", p, nil, nil, answer{got.Allowed, got.Action}, tcpAnswer(q.T, q.enforced, p))
	if got.Shadow != nil {
		q.same("TCP shadow", p, nil, nil, answer{got.Shadow.Allowed, got.Shadow.Action}, tcpAnswer(q.T, q.shadow, p))
	}
	past := c.AuthorizeTCPPastCustom()
	q.same("TCP past CUSTOM", p, nil, nil, answer{past.Allowed, past.Action}, tcpAnswer(q.T, q.pastCustom, p))
}

func (q *questions) http(c *authz.Connection, p authz.Peer, r *authz.Request, token *reference.Token) {
	got := c.Authorize(r)
	q.same("HTTP", p, r, token, answer{got.Allowed, got.Action}, httpAnswer(q.T, q.enforced, p, r, token))
	if got.Shadow != nil {
		q.same("HTTP shadow", p, r, token, answer{got.Shadow.Allowed, got.Shadow.Action}, httpAnswer(q.T, q.shadow, p, r, token))
	}
	past := c.AuthorizePastCustom(r)
	q.same("HTTP past CUSTOM", p, r, token, answer{past.Allowed, past.Action}, httpAnswer(q.T, q.pastCustom, p, r, token))
}

func newReference(t *rapid.T, cfg authz.Config) *reference.Enforcer {
	e, err := reference.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func isCustom(d policy.Document) bool { return d.Authorization.Action == policy.ActionCustom }

func isDryRun(d policy.Document) bool { return d.Metadata.Annotations["istio.io/dry-run"] == "true" }

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
		if isDryRun(d) {
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

func (q *questions) same(what string, p authz.Peer, r *authz.Request, token *reference.Token, got, want answer) {
	if got == want {
		return
	}
	documents, _ := json.MarshalIndent(q.cfg.Documents, "", " ")
	q.Fatalf("%s: engine %+v, reference %+v\npeer %+v\nrequest %+v\ntoken %+v\nmesh %+v\n%s", what, got, want, p, r, token, q.cfg.Mesh, documents)
}
