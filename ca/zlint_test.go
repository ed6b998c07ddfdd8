package ca_test

import (
	"crypto/tls"
	"testing"

	"github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"

	"castellan.dev/ca"
)

// TestZlint holds everything we sign to zlint's RFC lints: rules that nobody
// here wrote.
func TestZlint(t *testing.T) {
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lint.SourceList{lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC8813, lint.RFC3279, lint.RFC6960}})
	if err != nil {
		t.Fatal(err)
	}
	e := newEnv(t, func(c *ca.Config) { c.PermittedURI = true })
	a := e.Open()
	issued, _ := issue(t, a, request(t))
	serving, err := a.ServingCertificate()(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	for name, der := range map[string][]byte{
		"root": issued.Roots[0], "svid-issuer": issued.Chain[1], "svid": issued.Chain[0], "serving-issuer": serving.Certificate[1], "serving": serving.Certificate[0],
	} {
		t.Run(name, func(t *testing.T) {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			results := zlint.LintCertificateEx(cert, registry).Results
			if len(results) < 100 {
				t.Fatalf("only %d lints ran", len(results))
			}
			for lintName, r := range results {
				if r.Status >= lint.Notice {
					t.Errorf("%s: %v %s", lintName, r.Status, r.Details)
				}
			}
		})
	}
}
