package authz_test

import (
	"strings"
	"testing"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// Rules 24, 25 and 31: paths, token rules and modes.

func TestNormalizePath(t *testing.T) {
	const none, base, merge, decode = policy.NormalizeNone, policy.NormalizeBase, policy.NormalizeMergeSlashes, policy.NormalizeDecodeAndMergeSlashes
	for _, tc := range []struct{ name, option, in, want string }{
		{"authz-24 NONE changes nothing", none, `/a/../b//c\d%2e%41`, `/a/../b//c\d%2e%41`},
		{"authz-24 NONE drops fragments", none, "/a#b", "/a"},
		{"authz-24 BASE is the default", "", "/a/./b", "/a/b"},
		{"authz-24 BASE drops fragments", base, "/a#/../b", "/a"},
		{"authz-24 BASE dots", base, "/a/./b/../c", "/a/c"},
		{"authz-24 BASE dots above the root", base, "/../../a", "/a"},
		{"authz-24 BASE last dot", base, "/a/.", "/a/"},
		{"authz-24 BASE last two dots", base, "/a/b/..", "/a/"},
		{"authz-24 BASE only dots", base, "/..", "/"},
		{"authz-24 BASE three dots are a name", base, "/.../a", "/.../a"},
		{"authz-24 BASE hidden file", base, "/.well-known/x", "/.well-known/x"},
		{"authz-24 BASE backslash", base, `/a\..\b`, "/b"},
		{"authz-24 BASE unreserved", base, "/%41%7e%2D%5f%30", "/A~-_0"},
		{"authz-24 BASE encoded dots", base, "/a/%2e%2E/b", "/b"},
		{"authz-24 BASE keeps other escapes", base, "/a%2Fb%5cc%20d%3fe", "/a%2Fb%5cc%20d%3fe"},
		{"authz-24 BASE keeps slashes", base, "//a///b", "//a///b"},
		{"authz-24 BASE empty segments are segments", base, "/app//../admin", "/app/admin"},
		{"authz-24 one pass", base, "/%252e%252e/a", "/%252e%252e/a"},
		{"authz-24 MERGE_SLASHES", merge, "//a///b/", "/a/b/"},
		{"authz-24 MERGE_SLASHES dots before merging", merge, "/app//../admin", "/app/admin"},
		{"authz-24 MERGE_SLASHES keeps escaped slashes", merge, "/a%2f%2fb", "/a%2f%2fb"},
		{"authz-24 MERGE_SLASHES backslashes", merge, `/a\\b`, "/a/b"},
		{"authz-24 DECODE_AND_MERGE_SLASHES", decode, "/a%2f%2Fb%5Cc%5c%5cd", "/a/b/c/d"},
		{"authz-24 DECODE_AND_MERGE_SLASHES dots after decoding", decode, "/a%2f..%2fb", "/b"},
		{"authz-24 DECODE_AND_MERGE_SLASHES one pass", decode, "/a%252fb", "/a%252fb"},
		{"authz-24 asterisk form", base, "*", "*"},
		{"authz-24 root", decode, "/", "/"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := authz.NormalizePath(tc.option, tc.in)
			if err != nil || got != tc.want {
				t.Errorf("got %q, %v, want %q", got, err, tc.want)
			}
		})
	}
	for _, tc := range []struct{ name, option, in, want string }{
		{"authz-24 zero", base, "/a%00", "path holds %00"},
		{"authz-24 zero under NONE", none, "/a%00b", "path holds %00"},
		{"authz-24 raw zero", none, "/a\x00", "path holds a control character or space"},
		{"authz-24 control character", none, "/a\r\nb", "path holds a control character or space"},
		{"authz-24 space", none, "/a b", "path holds a control character or space"},
		{"authz-24 delete", none, "/a\x7f", "path holds a control character or space"},
		{"authz-24 query", none, "/a?b", "path holds a query"},
		{"authz-24 relative", none, "a/b", "path does not begin with '/'"},
		{"authz-24 empty", none, "", "path does not begin with '/'"},
		{"authz-24 only a fragment", none, "#a", "path does not begin with '/'"},
		{"authz-24 short escape", base, "/a%2", "path holds a malformed percent-encoding"},
		{"authz-24 bad escape", base, "/a%zz", "path holds a malformed percent-encoding"},
		{"authz-24 escape that would become another", base, "/%%32e", "path holds a malformed percent-encoding"},
		{"authz-24 unknown option", "STRICT", "/a", `unknown path normalization "STRICT"`},
		{"authz-24 long", none, "/" + strings.Repeat("a", 64<<10), "path is longer than 65536 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := authz.NormalizePath(tc.option, tc.in)
			if err == nil || err.Error() != tc.want || got != "" {
				t.Errorf("got %q, %v, want error %q", got, err, tc.want)
			}
		})
	}
	for _, p := range []string{"/", "/api/v1/items/7", "/a%20b/c%2Fd", "/.well-known/x"} {
		if n := testing.AllocsPerRun(100, func() { _, _ = authz.NormalizePath(decodeUnless(p), p) }); n != 0 {
			t.Errorf("authz-24 %q is normal and costs %v allocations", p, n)
		}
	}
}

// decodeUnless returns the strongest option that leaves p alone.
func decodeUnless(p string) string {
	if strings.Contains(p, "%2F") {
		return policy.NormalizeMergeSlashes
	}
	return policy.NormalizeDecodeAndMergeSlashes
}

func TestJWTRules(t *testing.T) {
	docs := documents(t, `{kind: RequestAuthentication, metadata: {name: b}, spec: {jwtRules: [{issuer: two}, {issuer: three}]}}
---
{kind: RequestAuthentication, metadata: {name: a}, spec: {selector: {matchLabels: {app: orders}}, jwtRules: [{issuer: one}]}}
---
{kind: RequestAuthentication, metadata: {name: c}, spec: {selector: {matchLabels: {app: other}}, jwtRules: [{issuer: not}]}}
---
{kind: RequestAuthentication, metadata: {namespace: castellan-system, name: z}, spec: {jwtRules: [{issuer: root}]}}`)
	t.Run("authz-25 rules of all matching documents pool", func(t *testing.T) {
		s, _ := authz.Compile(authz.Config{Documents: docs, Workload: workload(t)})
		var got []string
		for _, r := range s.JWTRules() {
			got = append(got, r.Issuer)
		}
		if want := "root one two three"; strings.Join(got, " ") != want {
			t.Errorf("got %v, want %s", got, want)
		}
		if s.HasHTTPRules() {
			t.Error("claims to have authorization rules")
		}
	})
	run(t, []row{{
		name: "authz-25 without a token a policy that wants one denies",
		docs: `{kind: RequestAuthentication, spec: {jwtRules: [{issuer: "https://idp.test"}]}}` + "\n---\n" + allow(source(`requestPrincipals: ["*"]`)),
		asks: []ask{{want: noMatch}, {claims: aliceOnly, want: allowed}},
	}})
}

func TestMTLSMode(t *testing.T) {
	const strict, permissive, disable = authz.ModeStrict, authz.ModePermissive, authz.ModeDisable
	const mesh = `{kind: PeerAuthentication, metadata: {namespace: castellan-system, name: mesh}, spec: {mtls: {mode: STRICT}}}`
	ns := func(mode string) string {
		return `{kind: PeerAuthentication, metadata: {name: ns}, spec: {mtls: {mode: ` + mode + `}}}`
	}
	own := func(name, created, rest string) string {
		return `{kind: PeerAuthentication, metadata: {name: ` + name + `, creationTimestamp: "` + created + `"}, spec: {selector: {matchLabels: {app: orders}}, ` + rest + `}}`
	}
	for _, tc := range []struct {
		name, docs string
		port80     authz.Mode
		other      authz.Mode
		problems   int
	}{
		{"authz-31 PERMISSIVE by default", `{kind: RequestAuthentication, spec: {}}`, permissive, permissive, 0},
		{"authz-31 mesh", mesh, strict, strict, 0},
		{"authz-31 namespace over mesh", mesh + "\n---\n" + ns("DISABLE"), disable, disable, 0},
		{"authz-31 UNSET inherits", mesh + "\n---\n" + ns("UNSET"), strict, strict, 0},
		{"authz-31 no mtls inherits", mesh + "\n---\n" + `{kind: PeerAuthentication, metadata: {name: ns}, spec: {}}`, strict, strict, 0},
		{"authz-31 workload over namespace", ns("DISABLE") + "\n---\n" + own("a", "2026-01-01T00:00:00Z", "mtls: {mode: STRICT}"), strict, strict, 0},
		{"authz-31 port over workload", own("a", "2026-01-01T00:00:00Z", `mtls: {mode: STRICT}, portLevelMtls: {"80": {mode: DISABLE}}`), disable, strict, 0},
		{"authz-31 port UNSET inherits", mesh + "\n---\n" + own("a", "2026-01-01T00:00:00Z", `portLevelMtls: {"80": {mode: UNSET}, "81": {mode: DISABLE}}`), strict, strict, 0},
		{"authz-31 ports need a selector", mesh + "\n---\n" + `{kind: PeerAuthentication, metadata: {name: ns}, spec: {portLevelMtls: {"80": {mode: DISABLE}}}}`, strict, strict, 0},
		{"authz-31 the oldest counts", own("b", "2025-01-01T00:00:00Z", "mtls: {mode: DISABLE}") + "\n---\n" + own("a", "2026-01-01T00:00:00Z", "mtls: {mode: STRICT}"), disable, disable, 0},
		{"authz-31 the oldest hides the younger whole", own("b", "2025-01-01T00:00:00Z", "mtls: {mode: UNSET}") + "\n---\n" + own("a", "2026-01-01T00:00:00Z", "mtls: {mode: STRICT}"), permissive, permissive, 0},
		{"authz-31 among equals the name decides", own("b", "2025-01-01T00:00:00Z", "mtls: {mode: DISABLE}") + "\n---\n" + own("a", "2025-01-01T00:00:00Z", "mtls: {mode: STRICT}"), strict, strict, 0},
		{"authz-31 a selector in the root namespace is ignored", `{kind: PeerAuthentication, metadata: {namespace: castellan-system}, spec: {selector: {matchLabels: {app: orders}}, mtls: {mode: STRICT}}}`, permissive, permissive, 0},
		{"authz-31 an unknown mode is STRICT", ns("SOMETIMES"), strict, strict, 1},
		{"authz-31 an unknown port makes all STRICT", own("a", "2026-01-01T00:00:00Z", `mtls: {mode: DISABLE}, portLevelMtls: {"http": {mode: DISABLE}, "80": {mode: DISABLE}}`), strict, strict, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, problems := authz.Compile(authz.Config{Documents: documents(t, tc.docs), Workload: workload(t)})
			if len(problems) != tc.problems {
				t.Errorf("problems: %v", problems)
			}
			if a, b := s.MTLSMode(80), s.MTLSMode(8080); a != tc.port80 || b != tc.other {
				t.Errorf("port 80 %s, other %s; want %s, %s", a, b, tc.port80, tc.other)
			}
		})
	}
}
