package authz_test

import (
	"regexp"
	"strings"
	"testing"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// FuzzNormalizePath holds what callers rely on: a normal path is a fixed point,
// and nothing is left that a later reader could take for a way up.
func FuzzNormalizePath(f *testing.F) {
	for _, s := range []string{"/", "/a/../b", "/%2e%2e/a", `/a\..\b`, "//a//../b", "/a%2f..%2fb", "/%252e", "/a%5c%5cb", "/%%32e", "/a#b", "*", "/...", "/.a/..b"} {
		f.Add(s)
	}
	options := []string{policy.NormalizeNone, policy.NormalizeBase, policy.NormalizeMergeSlashes, policy.NormalizeDecodeAndMergeSlashes}
	f.Fuzz(func(t *testing.T, raw string) {
		for _, option := range options {
			got, err := authz.NormalizePath(option, raw)
			if err != nil {
				if got != "" {
					t.Fatalf("%s: %q beside %v", option, got, err)
				}
				continue
			}
			again, err := authz.NormalizePath(option, got)
			if err != nil || again != got {
				t.Fatalf("%s: %q became %q, then %q, %v", option, raw, got, again, err)
			}
			if strings.ContainsAny(got, "#?\x00") || strings.Contains(got, "%00") {
				t.Fatalf("%s: %q in %q", option, got, raw)
			}
			if option == policy.NormalizeNone || got == "*" {
				continue
			}
			if got == "" || got[0] != '/' || strings.Contains(got, `\`) {
				t.Fatalf("%s: %q became %q", option, raw, got)
			}
			for seg := range strings.SplitSeq(got, "/") {
				if s := strings.ToLower(seg); s == "." || s == ".." || strings.Contains(s, "%2e") {
					t.Fatalf("%s: %q became %q", option, raw, got)
				}
			}
			if option != policy.NormalizeBase && strings.Contains(got, "//") {
				t.Fatalf("%s: %q became %q", option, raw, got)
			}
			if s := strings.ToLower(got); option == policy.NormalizeDecodeAndMergeSlashes && (strings.Contains(s, "%2f") || strings.Contains(s, "%5c")) {
				t.Fatalf("%s: %q became %q", option, raw, got)
			}
		}
	})
}

// FuzzTemplate holds the matcher of path templates against regular expressions
// made from them, which the engine itself never uses.
func FuzzTemplate(f *testing.F) {
	for _, s := range [][2]string{
		{"/store/{**}/cart", "/store//cart"}, {"/store/{**}/cart", "/store/cart"}, {"/foo/{*}/bar/{**}", "/foo//bar/x"},
		{"/{*}", "/a"}, {"/{**}", "/"}, {"/{**}/", "/a/"}, {"/a{*}", "/ab"}, {"/{**}/{*}", "/a/b"}, {"/{*}/a/{**}/b/c", "/x/a//b/c"},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, template, path string) {
		if !strings.Contains(template, "{") {
			return
		}
		got, err := authz.MatchTemplate(template, path)
		if err != nil {
			return
		}
		var re strings.Builder
		re.WriteString(`(?s)\A`)
		for seg := range strings.SplitSeq(template[1:], "/") {
			switch seg {
			case "{*}":
				re.WriteString(`/[^/]+`)
			case "{**}":
				re.WriteString(`/.*`)
			default:
				re.WriteString("/" + regexp.QuoteMeta(seg))
			}
		}
		want := regexp.MustCompile(re.String() + `\z`).MatchString(path)
		// Regular expressions read runes; what is not UTF-8 compares by byte all
		// the same, since every class here takes it.
		if got != want {
			t.Fatalf("%q with %q: %v, want %v", template, path, got, want)
		}
	})
}

// FuzzGlob holds namespaces with stars against regular expressions.
func FuzzGlob(f *testing.F) {
	f.Add("a*b*c", "axxbyyc")
	f.Add("*a*", "a")
	f.Add("a**b", "ab")
	f.Fuzz(func(t *testing.T, glob, s string) {
		parts := strings.Split(glob, "*")
		for i := range parts {
			parts[i] = regexp.QuoteMeta(parts[i])
		}
		re, err := regexp.Compile(`(?s)\A` + strings.Join(parts, ".*") + `\z`)
		if err != nil {
			return
		}
		if got, want := authz.MatchGlob(glob, s), re.MatchString(s); got != want {
			t.Fatalf("%q with %q: %v, want %v", glob, s, got, want)
		}
	})
}
