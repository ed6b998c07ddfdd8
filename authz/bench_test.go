package authz_test

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// shape makes policies of n rules and requests that match the last, or nothing.
type shape struct {
	name string
	rule func(i int) policy.Rule
	// last and none are requests of the peer of rule n-1.
	last func(n int) authz.Request
	none func(n int) authz.Request
	// deny says that the rules deny, which an ALLOW of everything follows.
	deny bool
	// peer names the service account of the caller of last and none.
	peer func(n int) string
}

func onePeer(int) string    { return "caller" }
func lastPeer(n int) string { return fmt.Sprintf("sa-%d", n-1) }

func principal(sa string) string { return "cluster.local/ns/shop/sa/" + sa }

func from(s policy.Source) []policy.From { return []policy.From{{Source: &s}} }
func to(o policy.Operation) []policy.To  { return []policy.To{{Operation: &o}} }

// mixedPath is an exact, prefix, suffix or template path by turns.
func mixedPath(i int) (pattern, path string) {
	switch i % 4 {
	case 0:
		return fmt.Sprintf("/api/v1/items/%d", i), fmt.Sprintf("/api/v1/items/%d", i)
	case 1:
		return fmt.Sprintf("/api/v1/things/%d/*", i), fmt.Sprintf("/api/v1/things/%d/parts/7", i)
	case 2:
		return fmt.Sprintf("*/export-%d.json", i), fmt.Sprintf("/api/v1/any/export-%d.json", i)
	default:
		return fmt.Sprintf("/api/v1/orders/%d/{*}/lines/{**}", i), fmt.Sprintf("/api/v1/orders/%d/abc/lines/3/x", i)
	}
}

func get(path string) authz.Request {
	return authz.Request{Method: "GET", Host: "orders.shop.svc.cluster.local", Path: path, Header: header{"x-tenant": {"nobody"}}}
}

type header map[string][]string

func (h header) Values(name string) []string { return h[name] }

func shapes() []shape {
	lastPath := func(n int) authz.Request { _, p := mixedPath(n - 1); return get(p) }
	noPath := func(int) authz.Request { return get("/api/v1/none/of/these/at/all") }
	shared := from(policy.Source{Principals: []string{principal("caller")}})
	distinct := func(i int) []policy.From {
		return from(policy.Source{Principals: []string{principal(fmt.Sprintf("sa-%d", i))}})
	}
	return []shape{
		{
			name: "distinct", peer: lastPeer, last: lastPath, none: noPath,
			rule: func(i int) policy.Rule {
				p, _ := mixedPath(i)
				return policy.Rule{From: distinct(i), To: to(policy.Operation{Methods: []string{"GET", "HEAD"}, Paths: []string{p}})}
			},
		},
		{
			name: "paths", peer: onePeer, last: lastPath, none: noPath,
			rule: func(i int) policy.Rule {
				p, _ := mixedPath(i)
				return policy.Rule{From: shared, To: to(policy.Operation{Methods: []string{"GET"}, Paths: []string{p}})}
			},
		},
		{
			name: "deny-paths", peer: onePeer, last: lastPath, none: noPath, deny: true,
			rule: func(i int) policy.Rule {
				p, _ := mixedPath(i)
				return policy.Rule{From: shared, To: to(policy.Operation{Methods: []string{"GET"}, Paths: []string{p}})}
			},
		},
		{
			name: "hosts", peer: onePeer, none: noPath,
			last: func(n int) authz.Request {
				r := get("/x")
				r.Host = fmt.Sprintf("h%d.shop.svc.cluster.local", n-1)
				return r
			},
			rule: func(i int) policy.Rule {
				return policy.Rule{From: shared, To: to(policy.Operation{Hosts: []string{fmt.Sprintf("h%d.shop.svc.cluster.local", i)}})}
			},
		},
		{
			name: "headers", peer: onePeer, none: noPath,
			last: func(n int) authz.Request {
				r := get("/x")
				r.Header = header{"x-tenant": {fmt.Sprintf("tenant-%d", n-1)}}
				return r
			},
			rule: func(i int) policy.Rule {
				return policy.Rule{From: shared, When: []policy.Condition{{Key: "request.headers[X-Tenant]", Values: []string{fmt.Sprintf("tenant-%d", i)}}}}
			},
		},
		{
			name: "claims", peer: onePeer,
			none: func(int) authz.Request {
				r := get("/x")
				r.Claims = groups("nothing", "of", "it")
				return r
			},
			last: func(n int) authz.Request {
				r := get("/x")
				r.Claims = groups("a", "b", fmt.Sprintf("group-%d", n-1), "c")
				return r
			},
			rule: func(i int) policy.Rule {
				return policy.Rule{From: shared, When: []policy.Condition{{Key: "request.auth.claims[groups]", Values: []string{fmt.Sprintf("group-%d", i)}}}}
			},
		},
		{
			// Tokens that hold hundreds of groups.
			name: "groups", peer: onePeer,
			none: func(int) authz.Request { r := get("/x"); r.Claims = groups(numbered(400)...); return r },
			last: func(n int) authz.Request {
				r := get("/x")
				r.Claims = groups(append(numbered(400), fmt.Sprintf("group-%d", n-1))...)
				return r
			},
			rule: func(i int) policy.Rule {
				return policy.Rule{From: shared, When: []policy.Condition{{Key: "request.auth.claims[groups]", Values: []string{fmt.Sprintf("group-%d", i)}}}}
			},
		},
		{
			name: "principals", peer: lastPeer,
			last: func(int) authz.Request { return get("/same") },
			none: func(int) authz.Request { return get("/other") },
			rule: func(i int) policy.Rule {
				return policy.Rule{From: distinct(i), To: to(policy.Operation{Paths: []string{"/same"}})}
			},
		},
		{
			// No field by itself tells a rule from many others.
			name: "grid", peer: onePeer,
			last: func(n int) authz.Request { return gridRequest(n - 1) },
			none: func(int) authz.Request { r := gridRequest(7); r.Method = "PUT"; return r },
			rule: func(i int) policy.Rule {
				r := gridRequest(i)
				return policy.Rule{From: shared, To: to(policy.Operation{Methods: []string{"GET"}, Paths: []string{r.Path}, Hosts: []string{r.Host}})}
			},
		},
		{
			// Every rule takes one and the same path and another of its own.
			name: "common", peer: onePeer, none: noPath, last: lastPath,
			rule: func(i int) policy.Rule {
				p, _ := mixedPath(i)
				return policy.Rule{From: shared, To: to(policy.Operation{Paths: []string{"/healthz", p}})}
			},
		},
		{
			// What tells templates apart stands between their operators.
			name: "templates", peer: onePeer, none: noPath,
			last: func(n int) authz.Request { return get(fmt.Sprintf("/tenant-7/i%d/x", n-1)) },
			rule: func(i int) policy.Rule {
				return policy.Rule{From: shared, To: to(policy.Operation{Paths: []string{fmt.Sprintf("/{*}/i%d/{*}", i)}})}
			},
		},
		{
			// Behind a long common beginning and {**}.
			name: "tails", peer: onePeer, none: noPath,
			last: func(n int) authz.Request { return get(fmt.Sprintf("/api/v1/of/some/length/a/b/c/t%d", n-1)) },
			rule: func(i int) policy.Rule {
				return policy.Rule{From: shared, To: to(policy.Operation{Paths: []string{fmt.Sprintf("/api/v1/of/some/length/{**}/t%d", i)}})}
			},
		},
		{
			// Half share the path, half the principal.
			name: "halves", peer: onePeer,
			last: func(n int) authz.Request { return get(fmt.Sprintf("/own/%d", (n-1)/2*2)) },
			none: func(int) authz.Request { return get("/same") },
			rule: func(i int) policy.Rule {
				if i%2 == 1 {
					return policy.Rule{From: distinct(i), To: to(policy.Operation{Paths: []string{"/same"}})}
				}
				return policy.Rule{From: shared, To: to(policy.Operation{Paths: []string{fmt.Sprintf("/own/%d", i)}})}
			},
		},
		{
			name: "addresses", peer: onePeer,
			last: func(n int) authz.Request { return fromIP(n - 1) },
			none: func(int) authz.Request {
				r := get("/x")
				r.RemoteIP = netip.MustParseAddr("192.0.2.1")
				return r
			},
			rule: func(i int) policy.Rule {
				p := netip.PrefixFrom(fromIP(i).RemoteIP, 32-i%2)
				return policy.Rule{From: from(policy.Source{RemoteIPBlocks: []string{p.String()}})}
			},
		},
		{
			name: "users", peer: onePeer,
			none: func(int) authz.Request { r := get("/x"); r.Claims = groups("a"); return r },
			last: func(n int) authz.Request {
				r := get("/x")
				r.Claims = authz.NewClaims(map[string]any{"iss": "https://users.test", "sub": fmt.Sprintf("u%d", n-1)}, "", nil)
				return r
			},
			rule: func(i int) policy.Rule {
				return policy.Rule{From: from(policy.Source{Principals: []string{principal("caller")}, RequestPrincipals: []string{fmt.Sprintf("https://users.test/u%d", i)}})}
			},
		},
		{
			// One value of each rule takes the peer, and only by that one.
			name: "crowd", peer: onePeer, last: lastPath, none: noPath,
			rule: func(i int) policy.Rule {
				p, _ := mixedPath(i)
				f := from(policy.Source{Principals: []string{principal("caller"), principal(fmt.Sprintf("sa-%d", i))}})
				return policy.Rule{From: f, To: to(policy.Operation{Paths: []string{p}})}
			},
		},
	}
}

func fromIP(i int) authz.Request {
	r := get("/x")
	r.RemoteIP = netip.AddrFrom4([4]byte{10, byte(i >> 7), byte(i << 1), 0})
	return r
}

func numbered(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("team-%d", i)
	}
	return out
}

func gridRequest(i int) authz.Request {
	r := get(fmt.Sprintf("/p/%d", i/100))
	r.Host = fmt.Sprintf("h%d.shop", i%100)
	return r
}

func groups(g ...string) *authz.Claims {
	list := make([]any, len(g))
	for i := range g {
		list[i] = g[i]
	}
	return authz.NewClaims(map[string]any{"iss": "https://users.test", "sub": "alice", "groups": list}, "", nil)
}

// compile compiles n rules of a shape, at most 512 to a document as admission has
// it, and returns the peer that the last rule is for.
func (s shape) compile(tb testing.TB, n int) (*authz.Snapshot, authz.Peer) {
	tb.Helper()
	var docs []policy.Document
	action := policy.ActionAllow
	if s.deny {
		action = policy.ActionDeny
		docs = append(docs, document("all", policy.AuthorizationPolicy{Rules: []policy.Rule{{}}}))
	}
	for i := 0; i < n; i += 512 {
		spec := policy.AuthorizationPolicy{Action: action}
		for j := i; j < min(n, i+512); j++ {
			spec.Rules = append(spec.Rules, s.rule(j))
		}
		docs = append(docs, document(fmt.Sprintf("p-%06d", i), spec))
	}
	snapshot, problems := authz.Compile(authz.Config{Documents: docs, Workload: workload(tb)})
	if len(problems) > 0 {
		tb.Fatalf("problems: %v", problems)
	}
	return snapshot, authz.Peer{
		ID:       spiffeid.RequireFromString("spiffe://" + principal(s.peer(n))),
		SourceIP: netip.MustParseAddr("10.1.2.3"), DestinationPort: 8080,
	}
}

func (s shape) connect(tb testing.TB, n int) *authz.Connection {
	tb.Helper()
	snapshot, peer := s.compile(tb, n)
	return snapshot.Connect(peer)
}

// TestAuthorizeAllocates nothing, for any shape and size: a figure that, unlike
// time, a test may hold.
func TestAuthorizeAllocates(t *testing.T) {
	for _, s := range shapes() {
		for _, n := range []int{10, 1_000} {
			c := s.connect(t, n)
			for _, r := range []authz.Request{s.last(n), s.none(n)} {
				if got, want := c.Authorize(&r), c.AuthorizeByScan(&r); got != want {
					t.Errorf("%s of %d: %+v, want %+v", s.name, n, got, want)
				}
				if a := testing.AllocsPerRun(50, func() { c.Authorize(&r) }); a != 0 {
					t.Errorf("%s of %d: %v allocations", s.name, n, a)
				}
			}
			if got := c.Authorize(ptr(s.last(n))); got.Allowed == s.deny {
				t.Errorf("%s of %d: last rule: %+v", s.name, n, got)
			}
			if got := c.Authorize(ptr(s.none(n))); got.Allowed != s.deny {
				t.Errorf("%s of %d: no rule: %+v", s.name, n, got)
			}
		}
	}
}

// TestConcurrentUse asks one connection from many goroutines, for the race detector.
func TestConcurrentUse(t *testing.T) {
	for _, s := range shapes() {
		c := s.connect(t, 200)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 20 {
					for _, r := range []authz.Request{s.last(200), s.none(200)} {
						if got, want := c.Authorize(&r), c.AuthorizeByScan(&r); got != want {
							t.Errorf("%s: %+v, want %+v", s.name, got, want)
						}
					}
				}
			})
		}
		wg.Wait()
	}
}

func ptr[T any](v T) *T { return &v }

// TestIndexNominatesFew holds the promise of a flat figure without a clock: at
// ten times the rules no more clauses are compared.
func TestIndexNominatesFew(t *testing.T) {
	for _, s := range shapes() {
		for _, n := range []int{1_000, 10_000} {
			c := s.connect(t, n)
			for _, r := range []authz.Request{s.last(n), s.none(n)} {
				if got := c.Nominated(&r); got > 8 {
					t.Errorf("%s of %d: %d clauses compared", s.name, n, got)
				}
			}
		}
	}
}

func BenchmarkAuthorize(b *testing.B) {
	for _, s := range shapes() {
		for _, n := range []int{10, 100, 1_000, 10_000} {
			c := s.connect(b, n)
			for _, q := range []struct {
				name string
				req  authz.Request
				want bool
			}{{"match", s.last(n), !s.deny}, {"none", s.none(n), s.deny}} {
				b.Run(fmt.Sprintf("%s/rules=%d/%s", s.name, n, q.name), func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						if d := c.Authorize(&q.req); d.Allowed != q.want {
							b.Fatalf("got %+v", d)
						}
					}
				})
			}
		}
	}
}

func BenchmarkConnect(b *testing.B) {
	for _, s := range shapes() {
		for _, n := range []int{10, 10_000} {
			snapshot, peer := s.compile(b, n)
			b.Run(fmt.Sprintf("%s/rules=%d", s.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					snapshot.Connect(peer)
				}
			})
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	for _, s := range shapes()[:1] {
		for _, n := range []int{100, 10_000} {
			b.Run(fmt.Sprintf("%s/rules=%d", s.name, n), func(b *testing.B) {
				for b.Loop() {
					s.compile(b, n)
				}
			})
		}
	}
}
