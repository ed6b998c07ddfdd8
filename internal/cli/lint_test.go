package cli_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

type lintFinding struct {
	Certificate string `json:"certificate"`
	Source      string `json:"source"`
	Rule        string `json:"rule"`
	Severity    string `json:"severity"`
	Message     string `json:"message"`
}

func TestLint(t *testing.T) {
	root := tlsconftest.NewRoot(t, inDomain("cluster.local"))
	issuer := root.SVIDIssuer(t)
	// keyID is what the test builder leaves to chance.
	leaf := func(changes ...tlsconftest.Change) *x509.Certificate {
		return issuer.Leaf(t, ordersID, changes...).Leaf
	}
	usage := func(der ...byte) tlsconftest.Change {
		return func(c *x509.Certificate) {
			c.KeyUsage = 0
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: der})
		}
	}
	tests := map[string]struct {
		cert *x509.Certificate
		rule string // "" is no finding
		want string
	}{
		"good leaf":         {leaf(), "", ""},
		"good intermediate": {issuer.Cert, "", ""},
		"good root":         {root.Cert, "", ""},
		"spiffe-01 other scheme": {
			leaf(func(c *x509.Certificate) { c.URIs = []*url.URL{parseURL(t, "https://x.example/a")} }), "spiffe-01", `URI SAN "https://x.example/a": scheme is missing or invalid`},
		"spiffe-04 too long": {
			leaf(func(c *x509.Certificate) {
				c.URIs = []*url.URL{parseURL(t, "spiffe://cluster.local/"+strings.Repeat("a", 2040))}
			}), "spiffe-04", "longer than 2048 bytes"},
		"spiffe-06 two URIs": {
			leaf(func(c *x509.Certificate) { c.URIs = append(c.URIs, parseURL(t, frontendID)) }), "spiffe-06", "2 URI SANs; an SVID has exactly one"},
		"spiffe-06 no URI": {
			leaf(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"x.example"} }), "spiffe-06", "0 URI SANs"},
		"spiffe-07 names a trust domain": {
			leaf(func(c *x509.Certificate) { c.URIs = []*url.URL{parseURL(t, "spiffe://cluster.local")} }), "spiffe-07", "names a trust domain; a leaf names a workload"},
		"spiffe-09 no key usage": {
			leaf(func(c *x509.Certificate) { c.KeyUsage = 0 }), "spiffe-09", "key usage must be set and critical"},
		"spiffe-09 key usage not critical": {
			leaf(usage(3, 2, 7, 0x80)), "spiffe-09", "key usage must be set and critical"},
		"spiffe-10 no digitalSignature": {
			leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), "spiffe-10", "a leaf must have digitalSignature"},
		"spiffe-10 leaf may sign": {
			leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), "spiffe-10", "must not have keyCertSign or cRLSign"},
		"spiffe-11 one usage only": {
			leaf(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), "spiffe-11", "must hold serverAuth and clientAuth both"},
		"spiffe-11 none": {
			leaf(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), "spiffe-11", "should have extended key usages"},
		"spiffe-12 authority may not sign": {
			tlsconftest.NewRoot(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }).Cert, "spiffe-12", "an authority must have keyCertSign"},
		"spiffe-12 authority with a path": {
			tlsconftest.NewRoot(t, func(c *x509.Certificate) { c.URIs = []*url.URL{parseURL(t, ordersID)} }).Cert, "spiffe-12", "must have no path"},
		"an RFC rule": {
			leaf(func(c *x509.Certificate) { c.SerialNumber = c.SerialNumber.Lsh(c.SerialNumber, 80) }), "e_serial_number_longer_than_20_octets", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			file := writeFile(t, "c.pem", pemOf(tt.cert))
			code := 2
			if tt.rule == "" {
				code = 0
			}
			var got []lintFinding
			castellanRun(t, "cert", "lint", file, "-o", "json").want(t, code).decode(t, &got)
			plain := castellanRun(t, "cert", "lint", file).want(t, code)
			if tt.rule == "" {
				if len(got) != 0 || plain.out != "1 certificate, no findings\n" {
					t.Errorf("%+v\n%s", got, plain.out)
				}
				return
			}
			i := slices.IndexFunc(got, func(f lintFinding) bool { return f.Rule == tt.rule })
			if i < 0 || !strings.Contains(got[i].Message, tt.want) || got[i].Certificate == "" || got[i].Source == "" {
				t.Fatalf("%+v", got)
			}
			if !strings.Contains(plain.out, got[i].Certificate+": "+got[i].Severity+" "+tt.rule) {
				t.Errorf("%s", plain.out)
			}
		})
	}
}

// Rules of the web PKI are shown on request and never count.
func TestLintWebPKI(t *testing.T) {
	leaf := tlsconftest.NewRoot(t).SVIDIssuer(t).Leaf(t, ordersID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(20 * time.Hour) })
	file := writeFile(t, "c.pem", pemOf(leaf.Leaf))
	castellanRun(t, "cert", "lint", file).want(t, 0)
	r := castellanRun(t, "cert", "lint", file, "--web-pki").want(t, 0)
	if !strings.Contains(r.out, "(web PKI)") {
		t.Errorf("%s", r.out)
	}
	for _, line := range strings.Split(strings.TrimSpace(r.out), "\n") {
		if !strings.Contains(line, "(web PKI)") {
			t.Errorf("counted: %s", line)
		}
	}
	castellanRun(t, "cert", "lint", "/nothing.pem").want(t, 3, "there is no file")
	castellanRun(t, "cert", "lint", file, "-o", "pem").want(t, 3, `-o "pem"`)
}
