package cli

import "testing"

// TestVisible: names of others cannot act on the terminal or forge a line.
func TestVisible(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"spiffe://cluster.local/ns/shop/sa/orders", "spiffe://cluster.local/ns/shop/sa/orders"},
		{"größe 日本", "größe 日本"},
		{"a\x1b[2Jb", `a\x1b[2Jb`},
		{"a\nforged  valid", `a\nforged  valid`},
		{"a\u202eb", `a\u202eb`},
		{"bad \xff", `bad \ufffd`},
	} {
		if got := visible(c.in); got != c.want {
			t.Errorf("%q: %q, want %q", c.in, got, c.want)
		}
	}
}
