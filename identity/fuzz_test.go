package identity_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
)

// What FromID takes is the one form, and comes back byte for byte.
func FuzzFromID(f *testing.F) {
	for _, s := range []string{"spiffe://cluster.local/ns/shop/sa/orders", "spiffe://td/ns/a/sa/b.c", "spiffe://td/ns//sa/", "spiffe://td", "spiffe://td/ns/a/sa/b/c", "spiffe://td/ns/-/sa/b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := spiffeid.FromString(s)
		if err != nil {
			return
		}
		w, err := identity.FromID(id)
		if err != nil {
			if !w.IsZero() {
				t.Fatalf("%v came with an error", w)
			}
			return
		}
		a := w.Account()
		if w.ID() != id || w.String() != s || s != "spiffe://"+w.TrustDomain().Name()+"/ns/"+a.Namespace()+"/sa/"+a.Name() {
			t.Fatalf("%q came back as %q", s, w)
		}
		if again, err := identity.ParseAccount(a.String()); err != nil || again != a {
			t.Fatalf("%q: %v, %v", a, again, err)
		}
	})
}

func FuzzParseAccount(f *testing.F) {
	for _, s := range []string{"shop/orders", "a/b.c", "/", "a/b/c", "A/b", "a/b..c", "a/-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := identity.ParseAccount(s)
		if err != nil {
			if !a.IsZero() {
				t.Fatalf("%v came with an error", a)
			}
			return
		}
		if a.String() != s || strings.ContainsAny(a.Namespace(), "./") || strings.Contains(a.Name(), "/") {
			t.Fatalf("%q came back as %q", s, a)
		}
		// Whatever is an account has an ID, and is told apart by it from every other.
		w, err := identity.New(spiffeid.RequireTrustDomainFromString("td"), a)
		if err != nil || w.ID().IsZero() {
			t.Fatalf("%q has no ID: %v", a, err)
		}
		if back, err := identity.FromID(w.ID()); err != nil || back.Account() != a {
			t.Fatalf("%q: %v, %v", a, back, err)
		}
	})
}

func FuzzParseTrustDomain(f *testing.F) {
	for _, s := range []string{"cluster.local", "10.0.0.1", "127.1", "a..b", "::1", "a_b", "A", "x/y", "[::1]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		td, err := identity.ParseTrustDomain(s)
		if err != nil {
			if !td.IsZero() {
				t.Fatalf("%v came with an error", td)
			}
			return
		}
		if _, err := netip.ParseAddr(s); err == nil || td.Name() != s || strings.Contains("."+s+".", "..") || len(s) > 255 {
			t.Fatalf("%q is accepted as %q", s, td.Name())
		}
	})
}
