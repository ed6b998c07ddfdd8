package identity_test

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
)

// The grammar of SPIFFE IDs is go-spiffe's; these hold it to the rules, since
// every identity in the product is parsed by it.
func TestSPIFFEIDGrammar(t *testing.T) {
	tests := []struct {
		name, id string
		ok       bool
	}{
		{"spiffe-01 good", "spiffe://td/ns/a/sa/b", true},
		{"spiffe-01 another scheme", "https://td/ns/a/sa/b", false},
		{"spiffe-01 no scheme", "td/ns/a/sa/b", false},
		{"spiffe-01 query", "spiffe://td/ns/a/sa/b?x=y", false},
		{"spiffe-01 fragment", "spiffe://td/ns/a/sa/b#x", false},
		{"spiffe-01 userinfo", "spiffe://u@td/ns/a/sa/b", false},
		{"spiffe-01 port", "spiffe://td:80/ns/a/sa/b", false},
		{"spiffe-02 no trust domain", "spiffe:///ns/a/sa/b", false},
		{"spiffe-02 upper case", "spiffe://Td/ns/a/sa/b", false},
		{"spiffe-02 percent-encoding", "spiffe://t%64/ns/a/sa/b", false},
		{"spiffe-02 all that is allowed", "spiffe://a-z.0_9/ns/a/sa/b", true},
		{"spiffe-02 255 bytes", "spiffe://" + strings.Repeat("a", 255) + "/x", true},
		{"spiffe-03 all that is allowed", "spiffe://td/A-z.0_9", true},
		{"spiffe-03 empty segment", "spiffe://td/ns//sa/b", false},
		{"spiffe-03 dot", "spiffe://td/ns/./sa", false},
		{"spiffe-03 dots", "spiffe://td/ns/../sa", false},
		{"spiffe-03 trailing slash", "spiffe://td/ns/a/sa/b/", false},
		{"spiffe-03 percent-encoding", "spiffe://td/ns/%61", false},
		{"spiffe-04 2048 bytes", "spiffe://td/" + strings.Repeat("a", 2048-len("spiffe://td/")), true},
		{"spiffe-05 a foreign trust domain may look like an address", "spiffe://10.0.0.1/ns/a/sa/b", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := spiffeid.FromString(tt.id); (err == nil) != tt.ok {
				t.Errorf("FromString(%q): %v, want ok=%t", tt.id, err, tt.ok)
			}
		})
	}
}

// Every byte is tried in a trust domain and in a segment.
func TestSPIFFEIDCharacters(t *testing.T) {
	const lower, upper, rest = "abcdefghijklmnopqrstuvwxyz0123456789-._", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "/"
	for c := range 256 {
		b := string([]byte{byte(c)})
		if _, err := spiffeid.TrustDomainFromString("a" + b + "a"); (err == nil) != strings.Contains(lower, b) && b != rest {
			t.Errorf("spiffe-02: byte %q in a trust domain: %v", b, err)
		}
		if _, err := spiffeid.FromString("spiffe://td/a" + b + "a"); (err == nil) != strings.Contains(lower+upper+rest, b) {
			t.Errorf("spiffe-03: byte %q in a segment: %v", b, err)
		}
	}
}

func TestParseTrustDomain(t *testing.T) {
	for _, name := range []string{"cluster.local", "td", "a_b", "1a"} {
		if _, err := identity.ParseTrustDomain(name); err != nil {
			t.Errorf("ParseTrustDomain(%q): %v", name, err)
		}
	}
	tests := []struct{ name, td, want string }{
		{"spiffe-05 ours must not look like an address", "10.0.0.1", `identity: trust domain "10.0.0.1" looks like an IP address; choose a name such as "cluster.local"`},
		{"spiffe-05 nor like a short one", "127.1", `identity: trust domain "127.1" looks like an IP address; choose a name such as "cluster.local"`},
		{"spiffe-05 nor have an empty label", "a..b", `identity: trust domain "a..b" has an empty label; remove the extra dot`},
		{"spiffe-05 nor end in a dot", "a.", `identity: trust domain "a." has an empty label; remove the extra dot`},
		{"spiffe-02 256 bytes", strings.Repeat("a", 256), `identity: trust domain of 256 bytes, at most 255 are allowed`},
		{"spiffe-02 nor be an ID", "spiffe://td", `identity: trust domain "spiffe://td": give the bare name, without scheme or path`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := identity.ParseTrustDomain(tt.td); err == nil || err.Error() != tt.want {
				t.Errorf("error\n got %v\nwant %s", err, tt.want)
			}
		})
	}
}

// An identity of another shape has no namespace and no account.
func TestFromID(t *testing.T) {
	good := spiffeid.RequireFromString("spiffe://td/ns/shop/sa/orders.v2")
	w, err := identity.FromID(good)
	if err != nil || w.Account().String() != "shop/orders.v2" || w.TrustDomain().Name() != "td" || w.ID() != good || w.Principal() != "td/ns/shop/sa/orders.v2" {
		t.Errorf("FromID(%s) = %v, %v", good, w, err)
	}
	for _, path := range []string{"", "/ns/shop", "/ns/shop/sa", "/sa/orders/ns/shop", "/ns/shop/sa/orders/x", "/x/ns/shop/sa/orders", "/ns/Shop/sa/orders", "/ns/a.b/sa/c", "/ns/shop/sa/-a"} {
		id := spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString("td"), path)
		if w, err := identity.FromID(id); err == nil || !w.IsZero() {
			t.Errorf("FromID(%s) = %v, want an error", id, w)
		}
	}
	long := spiffeid.RequireFromString("spiffe://" + strings.Repeat("a", 256) + "/ns/shop/sa/orders")
	if w, err := identity.FromID(long); err == nil {
		t.Errorf("spiffe-02: FromID of a trust domain of 256 bytes = %v, want an error", w)
	}
	if _, err := identity.FromID(spiffeid.ID{}); err == nil {
		t.Error("the zero ID names somebody")
	}
}
