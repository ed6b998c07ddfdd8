package cli

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
)

// clockSkew is how far ahead a notBefore may lie for a wrong clock to be the likelier cause.
const clockSkew = 10 * time.Minute

const (
	hintOrder   = "the leaf must stand first, then what signed it"
	hintReissue = "ask for it again from an authority that issues SVIDs"
)

type verifyResult struct {
	Valid    bool   `json:"valid"`
	SPIFFEID string `json:"spiffeId,omitempty"`
	// Problem is a fixed word per kind of failure, Reason the sentence for people.
	Problem string `json:"problem,omitempty"`
	Reason  string `json:"reason,omitempty"`
	Hint    string `json:"hint,omitempty"`
}

func (e *env) certVerifyCommand() *cobra.Command {
	var bundle, id string
	var options tlsOptions
	cmd := &cobra.Command{
		Use:   "verify --bundle FILE [--id spiffe://…] FILE|-|HOST:PORT|unix:SOCKET",
		Short: "Verify an SVID against a bundle, and say why it fails",
		Long: `Verify an X.509-SVID and its chain, leaf first, against the roots of a bundle. Exit
code 2 where it is not valid, with what is wrong and what to do about it.`,
		Example: "  castellan cert verify --bundle .castellan/bundle.pem --id spiffe://cluster.local/ns/shop/sa/orders svid.pem",
		Args:    oneArg(certSource),
	}
	cmd.Flags().StringVar(&bundle, "bundle", "", "trusted roots: PEM, or a SPIFFE bundle in JSON (required)")
	cmd.Flags().StringVar(&id, "id", "", "SPIFFE ID that the certificate must have")
	options.addFlags(cmd)
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		if bundle == "" {
			return invalidf("--bundle is required: the roots to trust, such as the `bundle` of up.json")
		}
		var want spiffeid.ID
		if id != "" {
			var err error
			if want, err = spiffeid.FromString(id); err != nil {
				return invalidf("--id %q: %w", id, err)
			}
		}
		roots, td, err := loadBundle(bundle)
		if err != nil {
			return err
		}
		stop := e.progress("reading " + args[0])
		chain, err := e.loadCertificates(cmd.Context(), args[0], options)
		stop()
		if err != nil {
			return err
		}
		check := svidCheck{chain: chain, roots: roots, trustDomain: td, want: want, now: time.Now()} //nolint:forbidigo // a command line reads the real clock
		result := check.run()
		if *format != "table" {
			err = writeData(e.out, *format, result)
		} else if result.Valid {
			_, err = fmt.Fprintf(e.out, "%s: valid until %s\n", result.SPIFFEID, chain[0].NotAfter.UTC().Format(time.RFC3339))
		} else {
			_, err = fmt.Fprintf(e.out, "not valid: %s: %s\n", result.Problem, result.Reason)
			if result.Hint != "" {
				fmt.Fprintf(e.err, "hint: %s\n", result.Hint)
			}
		}
		if err == nil && !result.Valid {
			err = errNegative
		}
		return err
	}
	return cmd
}

// loadBundle reads roots. The trust domain is that of a SPIFFE bundle, or of the
// roots' own URI SANs where they agree; else it is zero and not compared.
func loadBundle(path string) ([]*x509.Certificate, spiffeid.TrustDomain, error) {
	data, err := readNamedFile("--bundle", path)
	if err != nil {
		return nil, spiffeid.TrustDomain{}, err
	}
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		b, err := spiffebundle.Parse(spiffeid.TrustDomain{}, data)
		if err != nil {
			return nil, spiffeid.TrustDomain{}, invalidf("--bundle %s: %w", path, err)
		}
		if len(b.X509Authorities()) == 0 {
			return nil, spiffeid.TrustDomain{}, invalidf("--bundle %s holds no X.509 authority, so nothing can be trusted by it", path)
		}
		return b.X509Authorities(), spiffeid.TrustDomain{}, nil
	}
	roots, err := parseCertificates(data, path)
	if err != nil {
		return nil, spiffeid.TrustDomain{}, fmt.Errorf("--bundle: %w", err)
	}
	return roots, trustDomainOf(roots), nil
}

// svidCheck verifies an X509-SVID (X509-SVID 5). The chain is judged by
// crypto/x509 alone; the steps before and after it can only refuse. Those after
// find out which of the chain's rules was broken, so that it can be named.
type svidCheck struct {
	chain       []*x509.Certificate
	roots       []*x509.Certificate
	trustDomain spiffeid.TrustDomain
	want        spiffeid.ID
	now         time.Time
}

func (c svidCheck) run() verifyResult {
	leaf := c.chain[0]
	result := verifyResult{}
	for _, step := range []func() *verifyResult{c.uriSANs, c.leafShape, c.names, c.judge} {
		if failed := step(); failed != nil {
			result = *failed
			break
		}
	}
	result.Valid = result.Problem == ""
	if id, err := identity.FromCertificate(leaf); err == nil {
		result.SPIFFEID = id.String()
	}
	return result
}

// judge lets crypto/x509 decide, for both usages; a refusal is then explained.
func (c svidCheck) judge() *verifyResult {
	var refused error
	for _, u := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if err := c.verify(u); err != nil {
			refused = err
		}
	}
	if refused == nil {
		return nil
	}
	for _, step := range []func() *verifyResult{
		func() *verifyResult { return c.times(c.chain[0], "the certificate") },
		c.path, c.constraints, c.usages,
	} {
		if failed := step(); failed != nil {
			return failed
		}
	}
	return fail("chain", "see the chain with `castellan cert inspect`", "%v", refused)
}

func fail(problem, hint, reason string, args ...any) *verifyResult {
	return &verifyResult{Problem: problem, Hint: hint, Reason: fmt.Sprintf(reason, args...)}
}

func (c svidCheck) uriSANs() *verifyResult {
	switch n := len(c.chain[0].URIs); {
	case n == 0 && c.chain[0].IsCA:
		return fail("not an SVID", hintOrder, "the first certificate, %s, is an authority's", nameOf(c.chain[0]))
	case n == 0:
		return fail("no URI SAN", "an X509-SVID names its workload in a URI SAN; this is an ordinary certificate", "the certificate has no URI SAN, so it names no workload")
	case n == 2:
		return fail("two URI SANs", hintReissue, "the certificate has two URI SANs (%s); an SVID has exactly one", joinURIs(c.chain[0].URIs))
	case n > 2:
		return fail("too many URI SANs", hintReissue, "the certificate has %d URI SANs (%s); an SVID has exactly one", n, joinURIs(c.chain[0].URIs))
	}
	return nil
}

func joinURIs(uris []*url.URL) string {
	out := make([]string, len(uris))
	for i, u := range uris {
		out[i] = u.String()
	}
	return strings.Join(out, ", ")
}

func (c svidCheck) leafShape() *verifyResult {
	if _, err := identity.FromCertificate(c.chain[0]); err != nil {
		hint := hintReissue
		if c.chain[0].IsCA {
			hint = hintOrder
		}
		return fail("not an SVID", hint, "%v", err)
	}
	return nil
}

func (c svidCheck) names() *verifyResult {
	id, _ := identity.FromCertificate(c.chain[0]) // leafShape has seen it
	td := c.trustDomain
	if !c.want.IsZero() {
		td = c.want.TrustDomain()
	}
	if !td.IsZero() && id.TrustDomain() != td {
		return fail("wrong trust domain", "use the bundle of the certificate's own trust domain", "the certificate is of trust domain %q, what is trusted is %q", id.TrustDomain(), td)
	}
	if !c.want.IsZero() && id != c.want {
		return fail("wrong SPIFFE ID", "is this the right workload's certificate?", "the certificate is of %q, asked for was %q", id, c.want)
	}
	return nil
}

func (c svidCheck) times(cert *x509.Certificate, what string) *verifyResult {
	switch {
	case c.now.After(cert.NotAfter):
		return fail("expired", "renew it; where renewal works, check this machine's clock", "%s expired at %s, %s ago (clock: %s)", what, cert.NotAfter.UTC().Format(time.RFC3339), humanDuration(c.now.Sub(cert.NotAfter)), c.now.UTC().Format(time.RFC3339))
	case c.now.Before(cert.NotBefore):
		ahead := cert.NotBefore.Sub(c.now)
		hint := "it is meant for later"
		if ahead <= clockSkew {
			hint = fmt.Sprintf("this machine's clock is probably behind by %s or more; it says %s", humanDuration(ahead), c.now.UTC().Format(time.RFC3339))
		}
		return fail("not yet valid", hint, "%s is valid from %s, in %s (clock: %s)", what, cert.NotBefore.UTC().Format(time.RFC3339), humanDuration(ahead), c.now.UTC().Format(time.RFC3339))
	}
	return nil
}

// path climbs from the leaf to a root, and names the authority it misses.
func (c svidCheck) path() *verifyResult {
	cert := c.chain[0]
	for range len(c.chain) + 1 {
		if root := c.signer(cert, c.roots); root != nil {
			return c.times(root, "the root "+nameOf(root))
		}
		if selfSigned(cert) && !cert.IsCA {
			return fail("unknown authority", hintReissue, "%s signed itself; no authority vouches for it", nameOf(cert))
		}
		if selfSigned(cert) {
			return fail("unknown authority", hintBundle, "the chain ends in the root %s (key id %x), which is not in the bundle (which has %s)",
				nameOf(cert), cert.SubjectKeyId, keyIDs(c.roots))
		}
		parent := c.signer(cert, c.chain[1:])
		if parent == nil {
			return c.missing(cert)
		}
		if failed := c.times(parent, "the authority "+nameOf(parent)); failed != nil {
			return failed
		}
		cert = parent
	}
	return fail("no path to a root", "see the chain with `castellan cert inspect`", "the chain goes round in a circle")
}

// selfSigned asks for the key only, not for the right to sign.
func selfSigned(c *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
}

const hintBundle = "use the bundle of the mesh that issued it"

// signer finds who signed a certificate; of several with one key, one that is
// valid now.
func (c svidCheck) signer(cert *x509.Certificate, among []*x509.Certificate) *x509.Certificate {
	var found *x509.Certificate
	for _, p := range among {
		if cert.CheckSignatureFrom(p) != nil {
			continue
		}
		if c.times(p, "") == nil {
			return p
		}
		found = p
	}
	return found
}

// missing explains why nobody signed a certificate.
func (c svidCheck) missing(cert *x509.Certificate) *verifyResult {
	for _, p := range append(append([]*x509.Certificate{}, c.roots...), c.chain[1:]...) {
		if len(cert.AuthorityKeyId) == 0 || !bytes.Equal(p.SubjectKeyId, cert.AuthorityKeyId) {
			continue
		}
		var notAuthority x509.ConstraintViolationError
		if errors.As(cert.CheckSignatureFrom(p), &notAuthority) {
			return fail("not an authority", hintReissue, "%s names the authority %s (key id %x), which may not sign certificates", nameOf(cert), nameOf(p), p.SubjectKeyId)
		}
		return fail("bad signature", "the certificate was changed, or another authority reuses the key id",
			"%s names the authority key id %x, but that authority's key did not sign it", nameOf(cert), cert.AuthorityKeyId)
	}
	return fail("unknown authority", "add the missing intermediate after the leaf, or "+hintBundle,
		"%s was signed by the authority with key id %x (%s), which is neither in the file nor in the bundle (which has %s)",
		nameOf(cert), cert.AuthorityKeyId, cert.Issuer, keyIDs(c.roots))
}

func keyIDs(certs []*x509.Certificate) string {
	ids := make([]string, 0, len(certs))
	for _, c := range certs {
		ids = append(ids, hex.EncodeToString(c.SubjectKeyId))
	}
	return strings.Join(ids, ", ")
}

func (c svidCheck) verify(usage x509.ExtKeyUsage) error {
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range c.roots {
		roots.AddCert(r)
	}
	for _, i := range c.chain[1:] {
		inter.AddCert(i)
	}
	_, err := c.chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: inter, CurrentTime: c.now, KeyUsages: []x509.ExtKeyUsage{usage}})
	return err
}

func (c svidCheck) constraints() *verifyResult {
	var invalid x509.CertificateInvalidError
	if err := c.verify(x509.ExtKeyUsageAny); errors.As(err, &invalid) {
		switch invalid.Reason {
		case x509.CANotAuthorizedForThisName, x509.UnconstrainedName, x509.NameConstraintsWithoutSANs, x509.TooManyConstraints:
			return fail("name constraint", "the authority may not sign this name; see its constraints with `castellan cert inspect`", "%v", err)
		case x509.TooManyIntermediates:
			return fail("path length", "an authority of the chain may have fewer authorities below it", "%v", err)
		}
	}
	return nil
}

func (c svidCheck) usages() *verifyResult {
	for _, u := range []struct {
		usage x509.ExtKeyUsage
		name  string
	}{{x509.ExtKeyUsageClientAuth, "clientAuth"}, {x509.ExtKeyUsageServerAuth, "serverAuth"}} {
		var invalid x509.CertificateInvalidError
		if err := c.verify(u.usage); errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage {
			return fail("key usage", "an authority for serving certificates cannot sign SVIDs", "the chain does not allow %s", u.name)
		}
	}
	return nil
}
