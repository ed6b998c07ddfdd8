package cli

import (
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"net/url"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"
)

// lintFinding is one rule that a certificate does not follow.
type lintFinding struct {
	Certificate string `json:"certificate"`
	// Source is "SPIFFE", "RFC" or "web PKI".
	Source   string `json:"source"`
	Rule     string `json:"rule"`
	Severity string `json:"severity"`
	Message  string `json:"message"`
}

func (e *env) certLintCommand() *cobra.Command {
	var web bool
	cmd := &cobra.Command{
		Use:   "lint FILE|-|HOST:PORT|unix:SOCKET",
		Short: "Check certificates against the SPIFFE rules and the RFCs",
		Long: `Check every certificate of a chain against the SPIFFE X509-SVID rules and zlint's RFC
lints. Rules of the web PKI do not apply to SVIDs; --web-pki shows what they would say,
which changes nothing in the exit code. Exit code 2 when there are findings.`,
		Args: oneArg(certSource),
	}
	var options tlsOptions
	options.addFlags(cmd)
	cmd.Flags().BoolVar(&web, "web-pki", false, "also show what web PKI rules would say")
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		stop := e.progress("reading " + args[0])
		certs, err := e.loadCertificates(cmd.Context(), args[0], options)
		stop()
		if err != nil {
			return err
		}
		findings, err := lintChain(certs, web)
		if err != nil {
			return err
		}
		if *format != "table" {
			err = writeData(e.out, *format, findings)
		} else {
			err = e.printFindings(findings, len(certs))
		}
		if err == nil && slices.ContainsFunc(findings, func(f lintFinding) bool { return f.Source != "web PKI" }) {
			err = errNegative
		}
		return err
	}
	return cmd
}

func (e *env) printFindings(findings []lintFinding, certs int) error {
	if len(findings) == 0 {
		_, err := fmt.Fprintf(e.out, "%s, no findings\n", count(certs, "certificate"))
		return err
	}
	for _, f := range findings {
		if _, err := fmt.Fprintf(e.out, "%s: %s %s (%s): %s\n", f.Certificate, f.Severity, f.Rule, f.Source, f.Message); err != nil {
			return err
		}
	}
	return nil
}

func lintChain(certs []*x509.Certificate, web bool) ([]lintFinding, error) {
	findings := []lintFinding{}
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lint.SourceList{
		lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC8813,
	}})
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		name := nameOf(c)
		for _, f := range spiffeLints(c) {
			f.Certificate, f.Source = name, "SPIFFE"
			findings = append(findings, f)
		}
		findings = append(findings, zlintFindings(c, name, "RFC", registry)...)
		if web {
			rest, err := lint.GlobalRegistry().Filter(lint.FilterOptions{ExcludeSources: lint.SourceList{
				lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC8813,
			}})
			if err != nil {
				return nil, err
			}
			findings = append(findings, zlintFindings(c, name, "web PKI", rest)...)
		}
	}
	return findings, nil
}

// fqdnLint wants a URI's host to be a full domain name (RFC 5280 4.2.1.6). The host
// of a SPIFFE ID is a trust domain, which need not be one (SPIFFE-ID 2.1).
const fqdnLint = "e_ext_san_uri_host_not_fqdn_or_ip"

func onlySPIFFE(c *x509.Certificate) bool {
	return !slices.ContainsFunc(c.URIs, func(u *url.URL) bool { return u.Scheme != "spiffe" })
}

func zlintFindings(c *x509.Certificate, name, source string, registry lint.Registry) []lintFinding {
	parsed, err := zx509.ParseCertificate(c.Raw)
	if err != nil {
		return []lintFinding{{Certificate: name, Source: source, Rule: "parse", Severity: "error", Message: err.Error()}}
	}
	var out []lintFinding
	results := zlint.LintCertificateEx(parsed, registry)
	for rule, r := range results.Results {
		severity := map[lint.LintStatus]string{lint.Warn: "warning", lint.Error: "error", lint.Fatal: "error"}[r.Status]
		if severity == "" {
			continue
		}
		if rule == fqdnLint && source == "RFC" && onlySPIFFE(c) {
			continue
		}
		message := r.Details
		if l := registry.CertificateLints().ByName(rule); l != nil {
			message = l.Description
		}
		out = append(out, lintFinding{Certificate: name, Source: source, Rule: rule, Severity: severity, Message: message})
	}
	slices.SortFunc(out, func(a, b lintFinding) int {
		if a.Rule < b.Rule {
			return -1
		}
		return 1
	})
	return out
}

var (
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSAN      = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// spiffeLints are the rules of X509-SVID, numbered as in docs/conformance.md.
func spiffeLints(c *x509.Certificate) []lintFinding {
	var out []lintFinding
	add := func(rule, severity, message string, args ...any) {
		out = append(out, lintFinding{Rule: rule, Severity: severity, Message: fmt.Sprintf(message, args...)})
	}
	usage, hasUsage := critical(c, oidKeyUsage)
	if !hasUsage || !usage {
		add("spiffe-09", "error", "key usage must be set and critical")
	}
	if c.IsCA {
		lintAuthority(c, add)
		return out
	}
	if len(c.URIs) != 1 {
		add("spiffe-06", "error", "%d URI SANs; an SVID has exactly one", len(c.URIs))
	}
	for _, u := range c.URIs {
		id, err := spiffeid.FromURI(u)
		switch {
		case err != nil:
			add("spiffe-01", "error", "URI SAN %q: %v", u, err)
		case id.Path() == "":
			add("spiffe-07", "error", "%q names a trust domain; a leaf names a workload", id)
		}
		if len(u.String()) > 2048 {
			add("spiffe-04", "warning", "the SPIFFE ID is longer than 2048 bytes")
		}
	}
	if san, ok := critical(c, oidSAN); ok && !san && len(c.Subject.Names) == 0 {
		add("spiffe-07", "error", "the SAN must be critical where the subject is empty")
	}
	if c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		add("spiffe-10", "error", "a leaf must have digitalSignature")
	}
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		add("spiffe-10", "error", "a leaf must not have keyCertSign or cRLSign")
	}
	server := slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	client := slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	switch {
	case len(c.ExtKeyUsage) == 0:
		add("spiffe-11", "warning", "a leaf should have extended key usages")
	case !server || !client:
		add("spiffe-11", "error", "extended key usages must hold serverAuth and clientAuth both")
	}
	return out
}

func lintAuthority(c *x509.Certificate, add func(rule, severity, message string, args ...any)) {
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		add("spiffe-12", "error", "an authority must have keyCertSign")
	}
	if !c.BasicConstraintsValid {
		add("spiffe-08", "error", "an authority must have valid basic constraints")
	}
	for _, u := range c.URIs {
		if id, err := spiffeid.FromURI(u); err == nil && id.Path() != "" {
			add("spiffe-12", "error", "the authority's ID %q must have no path", id)
		}
	}
}

// critical tells whether an extension is there, and whether it is critical.
func critical(c *x509.Certificate, oid asn1.ObjectIdentifier) (isCritical, present bool) {
	for _, e := range c.Extensions {
		if e.Id.Equal(oid) {
			return e.Critical, true
		}
	}
	return false, false
}
