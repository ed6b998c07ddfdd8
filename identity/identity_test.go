package identity_test

import (
	"crypto/x509"
	"net/url"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
)

var clusterLocal = spiffeid.RequireTrustDomainFromString("cluster.local")

// errorIs fails unless err has exactly the text, or is nil where the text is empty.
func errorIs(t *testing.T, err error, want string) {
	t.Helper()
	got := ""
	if err != nil {
		got = err.Error()
	}
	if got != want {
		t.Errorf("error %q, want %q", got, want)
	}
}

func TestNewAccount(t *testing.T) {
	label63, label64 := strings.Repeat("a", 63), strings.Repeat("a", 64)
	const noNamespace, noAccount = " is not a namespace (an RFC 1123 label is wanted)", " is not a service account (an RFC 1123 subdomain is wanted)"
	tests := map[string]struct{ namespace, name, want string }{
		"plain":                         {"shop", "orders", ""},
		"digits and hyphens":            {"0-9", "1-a", ""},
		"account with dots":             {"shop", "a.b.c", ""},
		"longest namespace":             {label63, "a", ""},
		"namespace too long":            {label64, "a", `identity: "` + label64 + `"` + noNamespace},
		"longest account":               {"shop", strings.Repeat(label63[:62]+".", 4) + "a", ""},
		"account too long":              {"shop", strings.Repeat("a", 254), `identity: "` + strings.Repeat("a", 254) + `"` + noAccount},
		"no namespace":                  {"", "a", `identity: ""` + noNamespace},
		"no account":                    {"shop", "", `identity: ""` + noAccount},
		"namespace with a dot":          {"a.b", "a", `identity: "a.b"` + noNamespace},
		"account with an empty label":   {"shop", "a..b", `identity: "a..b"` + noAccount},
		"account ends in a dot":         {"shop", "a.", `identity: "a."` + noAccount},
		"account begins with a dot":     {"shop", ".a", `identity: ".a"` + noAccount},
		"namespace begins with -":       {"-a", "a", `identity: "-a"` + noNamespace},
		"namespace ends in -":           {"a-", "a", `identity: "a-"` + noNamespace},
		"label of an account ends in -": {"shop", "a-.b", `identity: "a-.b"` + noAccount},
		"upper case":                    {"Shop", "a", `identity: "Shop"` + noNamespace},
		"slash":                         {"shop/x", "a", `identity: "shop/x"` + noNamespace},
		"traversal":                     {"shop", "..", `identity: ".."` + noAccount},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			a, err := identity.NewAccount(tt.namespace, tt.name)
			errorIs(t, err, tt.want)
			if err != nil {
				if !a.IsZero() || a.String() != "" {
					t.Errorf("an account came with the error: %v", a)
				}
				return
			}
			if a.Namespace() != tt.namespace || a.Name() != tt.name || a.String() != tt.namespace+"/"+tt.name || a.IsZero() {
				t.Errorf("%v", a)
			}
		})
	}
}

// Names are made of the bytes that Kubernetes allows, and of no other.
func TestAccountBytes(t *testing.T) {
	for b := range 256 {
		c := string([]byte{byte(b)})
		inside := strings.Contains("abcdefghijklmnopqrstuvwxyz0123456789-", c)
		if _, err := identity.NewAccount("a"+c+"z", "x"); (err == nil) != inside {
			t.Errorf("namespace with %q: %v", c, err)
		}
		if _, err := identity.NewAccount("x", "a"+c+"z"); (err == nil) != (inside || c == ".") {
			t.Errorf("account with %q: %v", c, err)
		}
		edge := inside && c != "-"
		for _, s := range []string{c, c + "a", "a" + c} {
			if _, err := identity.NewAccount(s, "x"); (err == nil) != edge {
				t.Errorf("namespace %q: %v", s, err)
			}
			if _, err := identity.NewAccount("x", s); (err == nil) != edge {
				t.Errorf("account %q: %v", s, err)
			}
		}
	}
}

func TestParseAccount(t *testing.T) {
	tests := map[string]struct{ in, want string }{
		"good":        {"shop/orders", ""},
		"no slash":    {"orders", `identity: "orders" is not of the form NAMESPACE/ACCOUNT`},
		"empty":       {"", `identity: "" is not of the form NAMESPACE/ACCOUNT`},
		"two slashes": {"a/b/c", `identity: "b/c" is not a service account (an RFC 1123 subdomain is wanted)`},
		"space":       {" shop/orders", `identity: " shop" is not a namespace (an RFC 1123 label is wanted)`},
		"half":        {"shop/", `identity: "" is not a service account (an RFC 1123 subdomain is wanted)`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			a, err := identity.ParseAccount(tt.in)
			errorIs(t, err, tt.want)
			if err == nil && a.String() != tt.in {
				t.Errorf("%q came back as %q", tt.in, a)
			}
		})
	}
}

func TestNew(t *testing.T) {
	account, err := identity.NewAccount("shop", "orders")
	if err != nil {
		t.Fatal(err)
	}
	w, err := identity.New(clusterLocal, account)
	if err != nil {
		t.Fatal(err)
	}
	if w.String() != "spiffe://cluster.local/ns/shop/sa/orders" || w.Principal() != "cluster.local/ns/shop/sa/orders" || w.TrustDomain() != clusterLocal || w.Account() != account || w.IsZero() {
		t.Errorf("%v %v", w, w.Principal())
	}
	same, err := identity.FromID(w.ID())
	if err != nil || same != w {
		t.Errorf("%v, %v: not comparable", same, err)
	}
	_, err = identity.New(spiffeid.TrustDomain{}, account)
	errorIs(t, err, "identity: no trust domain")
	_, err = identity.New(clusterLocal, identity.Account{})
	errorIs(t, err, "identity: no account")

	// The zero value names nobody.
	var nobody identity.Workload
	if !nobody.IsZero() || !nobody.ID().IsZero() || nobody.Principal() != "" || nobody.String() != "" || nobody.Account().String() != "" {
		t.Errorf("%v", nobody)
	}
}

func TestFromIDErrors(t *testing.T) {
	shape := func(id string) string {
		return `identity: "` + id + `" is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`
	}
	tests := map[string]struct{ id, want string }{
		"good":                   {"spiffe://cluster.local/ns/shop/sa/orders", ""},
		"account with dots":      {"spiffe://cluster.local/ns/shop/sa/a.b", ""},
		"trust domain only":      {"spiffe://cluster.local", shape("spiffe://cluster.local")},
		"another shape":          {"spiffe://cluster.local/vm/7", shape("spiffe://cluster.local/vm/7")},
		"more":                   {"spiffe://cluster.local/ns/shop/sa/orders/x", shape("spiffe://cluster.local/ns/shop/sa/orders/x")},
		"less":                   {"spiffe://cluster.local/ns/shop/sa", shape("spiffe://cluster.local/ns/shop/sa")},
		"namespace only":         {"spiffe://cluster.local/ns/shop", shape("spiffe://cluster.local/ns/shop")},
		"words swapped":          {"spiffe://cluster.local/sa/orders/ns/shop", shape("spiffe://cluster.local/sa/orders/ns/shop")},
		"words in upper case":    {"spiffe://cluster.local/NS/shop/SA/orders", shape("spiffe://cluster.local/NS/shop/SA/orders")},
		"a prefix before":        {"spiffe://cluster.local/x/ns/shop/sa/orders", shape("spiffe://cluster.local/x/ns/shop/sa/orders")},
		"underscore":             {"spiffe://cluster.local/ns/sh_op/sa/orders", `identity: "sh_op" is not a namespace (an RFC 1123 label is wanted)`},
		"upper case":             {"spiffe://cluster.local/ns/shop/sa/Orders", `identity: "Orders" is not a service account (an RFC 1123 subdomain is wanted)`},
		"dots in the namespace":  {"spiffe://cluster.local/ns/sh.op/sa/orders", `identity: "sh.op" is not a namespace (an RFC 1123 label is wanted)`},
		"namespace is too long":  {"spiffe://cluster.local/ns/" + strings.Repeat("a", 64) + "/sa/x", `identity: "` + strings.Repeat("a", 64) + `" is not a namespace (an RFC 1123 label is wanted)`},
		"words inside the words": {"spiffe://cluster.local/ns/ns/sa/sa", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			id, err := spiffeid.FromString(tt.id)
			if err != nil {
				t.Fatal(err)
			}
			w, err := identity.FromID(id)
			errorIs(t, err, tt.want)
			if err == nil && w.ID() != id {
				t.Errorf("%q came back as %q", id, w)
			}
			if err != nil && !w.IsZero() {
				t.Errorf("%v came with the error", w)
			}
		})
	}
	_, err := identity.FromID(spiffeid.ID{})
	errorIs(t, err, shape(""))
	if n := testing.AllocsPerRun(100, func() {
		if _, err := identity.FromID(goodID); err != nil {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

var goodID = spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/orders")

func TestParseTrustDomainErrors(t *testing.T) {
	address := func(s string) string {
		return `identity: trust domain "` + s + `" looks like an IP address; choose a name such as "cluster.local"`
	}
	emptyLabel := func(s string) string {
		return `identity: trust domain "` + s + `" has an empty label; remove the extra dot`
	}
	bare := func(s string) string {
		return `identity: trust domain "` + s + `": give the bare name, without scheme or path`
	}
	tests := map[string]struct{ in, want string }{
		"good":                          {"cluster.local", ""},
		"one label":                     {"mesh", ""},
		"spiffe-02 underscore and dash": {"my_mesh-1.example", ""},
		"spiffe-02 longest":             {strings.Repeat("a", 255), ""},
		"spiffe-02 too long":            {strings.Repeat("a", 256), "identity: trust domain of 256 bytes, at most 255 are allowed"},
		"spiffe-02 empty":               {"", `identity: trust domain "": trust domain is missing`},
		"spiffe-02 upper case":          {"Cluster.local", `identity: trust domain "Cluster.local": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores`},
		"spiffe-02 percent":             {"a%41", `identity: trust domain "a%41": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores`},
		"spiffe-01 scheme":              {"spiffe://cluster.local", bare("spiffe://cluster.local")},
		"spiffe-01 path":                {"cluster.local/ns", bare("cluster.local/ns")},
		"spiffe-01 port":                {"cluster.local:443", `identity: trust domain "cluster.local:443": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores`},
		"spiffe-01 userinfo":            {"a@b", `identity: trust domain "a@b": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores`},
		"spiffe-05 IPv4":                {"10.0.0.1", address("10.0.0.1")},
		"spiffe-05 short IPv4":          {"127.1", address("127.1")},
		"spiffe-05 a number":            {"2130706433", address("2130706433")},
		"spiffe-05 digits and letters":  {"10.0.0.x", ""},
		"empty label in the middle":     {"a..b", emptyLabel("a..b")},
		"empty label at the end":        {"cluster.local.", emptyLabel("cluster.local.")},
		"empty label at the start":      {".cluster", emptyLabel(".cluster")},
		"dots only":                     {"..", address("..")},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			td, err := identity.ParseTrustDomain(tt.in)
			errorIs(t, err, tt.want)
			if err == nil && td.Name() != tt.in {
				t.Errorf("%q came back as %q", tt.in, td.Name())
			}
			if err != nil && !td.IsZero() {
				t.Errorf("%v came with the error", td)
			}
		})
	}
}

// The longest identity there can be is one that every SPIFFE program must take.
func TestLongestID(t *testing.T) {
	t.Run("spiffe-04 never longer than 2048 bytes", func(t *testing.T) {
		longest, err := identity.NewAccount(strings.Repeat("a", 63), strings.Repeat("a.", 126)+"a")
		if err != nil {
			t.Fatal(err)
		}
		td, err := identity.ParseTrustDomain(strings.Repeat("a", 255))
		if err != nil {
			t.Fatal(err)
		}
		w, err := identity.New(td, longest)
		if err != nil || len(w.String()) > 2048 || w.String() == "" {
			t.Errorf("%d bytes, %v", len(w.String()), err)
		}
	})
}

func TestFromCertificate(t *testing.T) {
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	const id = "spiffe://cluster.local/ns/shop/sa/orders"
	leaf := func(change func(*x509.Certificate)) *x509.Certificate {
		c := &x509.Certificate{URIs: []*url.URL{uri(id)}, KeyUsage: x509.KeyUsageDigitalSignature}
		if change != nil {
			change(c)
		}
		return c
	}
	tests := map[string]struct {
		cert *x509.Certificate
		want string
	}{
		"good":                           {leaf(nil), ""},
		"more key usages":                {leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement }), ""},
		"another shape of ID":            {leaf(func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://cluster.local/vm/7") }), ""},
		"names beside the URI":           {leaf(func(c *x509.Certificate) { c.DNSNames = []string{"orders.shop"} }), ""},
		"none":                           {nil, "identity: no certificate"},
		"spiffe-06 no URI":               {leaf(func(c *x509.Certificate) { c.URIs = nil }), "identity: certificate has no URI SAN"},
		"spiffe-06 two URIs":             {leaf(func(c *x509.Certificate) { c.URIs = append(c.URIs, uri(id)) }), "identity: certificate has 2 URI SANs, one is allowed"},
		"spiffe-06 another URI beside":   {leaf(func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("https://x.example")) }), "identity: certificate has 2 URI SANs, one is allowed"},
		"spiffe-07 names a trust domain": {leaf(func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://cluster.local") }), `identity: "spiffe://cluster.local" names a trust domain, not a workload`},
		"spiffe-08 a CA":                 {leaf(func(c *x509.Certificate) { c.IsCA = true }), "identity: certificate is a CA and authenticates nobody"},
		"spiffe-10 may sign":             {leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), "identity: leaf may sign certificates or CRLs"},
		"spiffe-10 may sign CRLs":        {leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), "identity: leaf may sign certificates or CRLs"},
		"spiffe-10 no digitalSignature":  {leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), "identity: leaf lacks the key usage digitalSignature"},
		"spiffe-09 no key usage":         {leaf(func(c *x509.Certificate) { c.KeyUsage = 0 }), "identity: leaf lacks the key usage digitalSignature"},
		"spiffe-01 scheme":               {leaf(func(c *x509.Certificate) { c.URIs[0] = uri("https://cluster.local/ns/shop/sa/orders") }), `identity: URI SAN "https://cluster.local/ns/shop/sa/orders": scheme is missing or invalid`},
		"spiffe-01 query":                {leaf(func(c *x509.Certificate) { c.URIs[0] = uri(id + "?x") }), `identity: URI SAN "` + id + `?x": path segment characters are limited to letters, numbers, dots, dashes, and underscores`},
		"spiffe-03 percent":              {leaf(func(c *x509.Certificate) { c.URIs[0] = uri("spiffe://cluster.local/ns/shop/sa/a%2Fb") }), `identity: URI SAN "spiffe://cluster.local/ns/shop/sa/a%2Fb": path segment characters are limited to letters, numbers, dots, dashes, and underscores`},
		"spiffe-03 trailing slash":       {leaf(func(c *x509.Certificate) { c.URIs[0] = uri(id + "/") }), `identity: URI SAN "` + id + `/": path cannot have a trailing slash`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := identity.FromCertificate(tt.cert)
			errorIs(t, err, tt.want)
			if err == nil && got.String() != tt.cert.URIs[0].String() || err != nil && !got.IsZero() {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}
