package proxy

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/identity"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/tlsconf"
)

const (
	// maxDocuments bounds the policies of one workload.
	maxDocuments = 10_000
	// maxProblems bounds what one refusal tells the server.
	maxProblems = 10
)

// parseSVID reads the secret that holds our certificate and key. What would
// not be accepted by peers is refused here, where the last good one stays.
func parseSVID(s secret, now time.Time) (*tls.Certificate, spiffeid.ID, error) {
	if len(s.chain) == 0 {
		return nil, spiffeid.ID{}, errors.New("secret holds no certificate")
	}
	cert, err := tls.X509KeyPair(s.chain, s.key)
	if err != nil {
		// The error of X509KeyPair names blocks and mismatches, never key bytes.
		return nil, spiffeid.ID{}, fmt.Errorf("certificate and key: %w", err)
	}
	if cert.Leaf == nil {
		if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
			return nil, spiffeid.ID{}, fmt.Errorf("certificate: %w", err)
		}
	}
	if now.After(cert.Leaf.NotAfter) {
		return nil, spiffeid.ID{}, fmt.Errorf("certificate expired at %s", cert.Leaf.NotAfter.Format(time.RFC3339))
	}
	id, err := identity.FromCertificate(cert.Leaf)
	if err != nil {
		return nil, spiffeid.ID{}, err
	}
	return &cert, id, nil
}

// parseRoots reads the secret that holds the bundle's roots.
func parseRoots(s secret) ([]*x509.Certificate, error) {
	rest := s.roots
	var roots []*x509.Certificate
	for len(rest) > 0 {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("bundle holds a PEM block of type %q", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("bundle: %w", err)
		}
		roots = append(roots, cert)
	}
	if len(roots) == 0 {
		return nil, errors.New("bundle is empty")
	}
	return roots, nil
}

// trustVersion names the content of t but for its deny list.
func trustVersion(t *tlsconf.Trust) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s %q\n", t.TrustDomain.Name(), t.Aliases)
	for _, root := range t.Roots {
		sum := sha256.Sum256(root.Raw)
		h.Write(sum[:])
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// policyInput is a WorkloadPolicy and what was made of it.
type policyInput struct {
	trustDomain string
	account     string
	compiled    *policyState
}

// protects reports whether the policy is for the workload we are.
func (p *policyInput) protects(id spiffeid.ID) bool {
	w, err := identity.FromID(id)
	return err == nil && w.Account().String() == p.account &&
		(w.TrustDomain().Name() == p.trustDomain || slices.Contains(p.compiled.aliases, w.TrustDomain()))
}

// compilePolicy makes the policy to enforce, which is never nil, and an error for
// the server where part of it could not be represented. What cannot be
// represented fails closed, so it is enforced at once all the same (authz 21):
// keeping the version before would keep what the new one wanted to end.
func compilePolicy(wp *castellanv1.WorkloadPolicy, keys func(string) *jws.KeySet, now func() time.Time) (*policyInput, error) {
	in := &policyInput{
		trustDomain: wp.GetTrustDomain(),
		account:     wp.GetNamespace() + "/" + wp.GetServiceAccount(),
		compiled:    &policyState{ports: make(map[uint16]string, len(wp.GetPorts()))},
	}
	cfg, problems := policyConfig(wp, in.compiled)
	snapshot, unrepresented := authz.Compile(cfg)
	in.compiled.snapshot = snapshot
	in.compiled.broken = cfg.DenyAll
	in.compiled.http = portsWithHTTP(cfg)
	for _, p := range unrepresented {
		problems = append(problems, fmt.Sprintf("%s %s/%s: %s: %q: %s", p.Kind, p.Namespace, p.Name, p.Field, p.Value, p.Reason))
	}
	if rules := snapshot.JWTRules(); len(rules) > 0 {
		tokens, err := jws.NewAuthenticator(rules, keys, jws.AuthenticatorConfig{Now: now})
		if err != nil {
			in.compiled.broken = "request authentication: " + err.Error()
			problems = append(problems, in.compiled.broken)
		}
		in.compiled.tokens = tokens
	}
	if len(problems) == 0 {
		return in, nil
	}
	if more := len(problems) - maxProblems; more > 0 {
		problems = append(problems[:maxProblems], fmt.Sprintf("and %d more", more))
	}
	return in, errors.New(strings.Join(problems, "; "))
}

// policyConfig reads the resource. What cannot be read turns into DenyAll: which
// requests it wanted denied cannot be known.
func policyConfig(wp *castellanv1.WorkloadPolicy, into *policyState) (authz.Config, []string) {
	var cfg authz.Config
	var problems []string
	broken := func(format string, args ...any) {
		reason := fmt.Sprintf(format, args...)
		problems = append(problems, reason)
		if cfg.DenyAll == "" {
			cfg.DenyAll = reason
		}
	}
	if wp.GetDenyAll() {
		// The server's own decision, and no problem of ours.
		cfg.DenyAll = "server: " + wp.GetDenyReason()
	}
	var err error
	if cfg.Workload.TrustDomain, err = spiffeid.TrustDomainFromString(wp.GetTrustDomain()); err != nil {
		broken("trust domain %q: %v", wp.GetTrustDomain(), err)
	}
	if cfg.Workload.Account, err = identity.NewAccount(wp.GetNamespace(), wp.GetServiceAccount()); err != nil {
		broken("%v", err)
	}
	cfg.Workload.Labels = wp.GetLabels()
	cfg.Workload.Ports = into.ports
	for _, port := range wp.GetPorts() {
		if port.GetNumber() == 0 || port.GetNumber() > math.MaxUint16 {
			// Passed over: such a port cannot be connected to.
			problems = append(problems, fmt.Sprintf("port %d", port.GetNumber()))
			continue
		}
		into.ports[uint16(port.GetNumber())] = port.GetProtocol()
	}
	if len(wp.GetMesh()) > 0 {
		if err := json.Unmarshal(wp.GetMesh(), &into.mesh); err != nil {
			broken("mesh settings: %v", err)
		}
	}
	cfg.Mesh = into.mesh
	for _, name := range append([]string{into.mesh.TrustDomain}, into.mesh.TrustDomainAliases...) {
		if name == "" {
			continue
		}
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			broken("mesh settings: trust domain %q: %v", name, err)
			continue
		}
		into.aliases = append(into.aliases, td)
	}
	cfg.Documents = decodeDocuments(wp.GetDocuments(), broken)
	return cfg, problems
}

func decodeDocuments(raw [][]byte, broken func(string, ...any)) []policy.Document {
	if len(raw) > maxDocuments {
		broken("%d policy documents for one workload, at most %d are taken", len(raw), maxDocuments)
		return nil
	}
	documents := make([]policy.Document, 0, len(raw))
	for i, object := range raw {
		doc, err := authz.Decode(object)
		if err != nil {
			broken("document %d cannot be read: %v", i, err)
			continue
		}
		documents = append(documents, doc)
	}
	return documents
}

// denylist is the revoked, by what names them.
type denylist struct {
	ids, serials, keys map[string]struct{}
}

func newDenylist(d *castellanv1.Denylist) denylist {
	set := func(names []string) map[string]struct{} {
		out := make(map[string]struct{}, len(names))
		for _, n := range names {
			out[n] = struct{}{}
		}
		return out
	}
	return denylist{ids: set(d.GetSpiffeIds()), serials: set(d.GetSerials()), keys: set(d.GetKeyIds())}
}

func (d denylist) denies(id spiffeid.ID, serial, keyID string) bool {
	if _, ok := d.serials[serial]; ok {
		return true
	}
	if _, ok := d.ids[id.String()]; ok && !id.IsZero() {
		return true
	}
	_, ok := d.keys[keyID]
	return ok && keyID != ""
}
