package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"castellan.dev/ca/ledger"
	"castellan.dev/internal/disk"
)

// Upstream is the authority above the issuers: a root of our own or a plugged-in
// CA now; Vault's sign-intermediate fits the same two calls.
type Upstream interface {
	// Roots are what the trust domain is trusted by.
	Roots() []*x509.Certificate
	// SignIssuer certifies an issuer's key as template says (the validity is cut
	// to what the upstream has left) and returns its chain without roots. The
	// key is there so that an upstream elsewhere can be sent a CSR.
	SignIssuer(ctx context.Context, template *x509.Certificate, key crypto.Signer) ([]*x509.Certificate, error)
	// Window is when what it signs can be valid.
	Window() (notBefore, notAfter time.Time)
}

var _ Upstream = (*local)(nil)

// local is an upstream whose key is here.
type local struct {
	*issuing
	ledger ledger.Recorder
	above  []*x509.Certificate // from the signing certificate up, without roots
	roots  []*x509.Certificate
}

// Window implements Upstream.
func (l *local) Window() (notBefore, notAfter time.Time) {
	return l.window.notBefore, l.window.notAfter
}

// Roots implements Upstream.
func (l *local) Roots() []*x509.Certificate { return l.roots }

// SignIssuer implements Upstream.
func (l *local) SignIssuer(ctx context.Context, template *x509.Certificate, key crypto.Signer) ([]*x509.Certificate, error) {
	if template.NotBefore.Before(l.window.notBefore) {
		template.NotBefore = l.window.notBefore
	}
	if template.NotAfter.After(l.window.notAfter) {
		template.NotAfter = l.window.notAfter
	}
	o := &order{
		ctx: ctx, ledger: l.ledger, issuer: l.issuing, entry: authorityEntry(template),
		lint: func(t *tbs) error { return t.lintCA(template) },
	}
	der, err := o.sign(template, key.Public())
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{cert}, l.above...), nil
}

// openSelfSigned loads the root or, where there has never been one, makes it.
func openSelfSigned(ctx context.Context, cfg Config, blobs Blobs) (*local, error) {
	store := pairStore{blobs}
	pair, err := store.Load(ctx, RoleRoot)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := neverUsed(ctx, cfg, blobs); err != nil {
			return nil, err
		}
		if pair, err = createRoot(ctx, cfg, store); err != nil {
			return nil, fmt.Errorf("make the root: %w", err)
		}
		cfg.Log.Info("made a new root", "trustDomain", cfg.TrustDomain.Name(), "notAfter", pair.Chain[0].NotAfter)
	case err != nil && !damaged(err):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w; restore it from a backup, or remove %s to begin with a new root that everybody must learn to trust", err, blobs.Where(""))
	}
	root := pair.Chain[0]
	if len(pair.Chain) != 1 || !root.IsCA || root.CheckSignatureFrom(root) != nil {
		return nil, fmt.Errorf("%s does not hold one self-signed root; restore it from a backup", store.Where(RoleRoot))
	}
	if len(root.URIs) != 1 || root.URIs[0].String() != cfg.TrustDomain.IDString() {
		return nil, fmt.Errorf("%s is the root of another trust domain than %q (%v); use another data directory (on Kubernetes another Secret) or set trustDomain back", store.Where(RoleRoot), cfg.TrustDomain.Name(), root.URIs)
	}
	if err := checkTime(root, cfg.Now()); err != nil {
		return nil, fmt.Errorf("%s: %w", store.Where(RoleRoot), err)
	}
	return &local{
		issuing: &issuing{key: pair.Key, cert: root, window: intersect(root)},
		ledger:  cfg.Ledger, roots: pair.Chain,
	}, nil
}

func createRoot(ctx context.Context, cfg Config, store KeyStore) (*KeyPair, error) {
	return store.Create(ctx, RoleRoot, func(key crypto.Signer) ([]*x509.Certificate, error) {
		now := cfg.Now()
		w := window{now.Add(-cfg.Backdate).Truncate(time.Second).UTC(), now.Add(cfg.RootTTL).Truncate(time.Second).UTC()}
		template, err := rootTemplate(cfg.TrustDomain, key.Public(), w)
		if err != nil {
			return nil, err
		}
		o := &order{
			ctx: ctx, ledger: cfg.Ledger, key: key, entry: authorityEntry(template),
			lint: func(t *tbs) error { return t.lintCA(template) },
		}
		der, err := o.sign(template, key.Public())
		if err != nil {
			return nil, err
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		return []*x509.Certificate{cert}, nil
	})
}

// The file names of Istio's cacerts.
const (
	pluggedCert  = "ca-cert.pem"
	pluggedKey   = "ca-key.pem"
	pluggedRoots = "root-cert.pem"
	pluggedChain = "cert-chain.pem"
)

// openPlugged loads a chain from disk and verifies it. The second result says
// that it may only sign leaves itself (path length 0).
func openPlugged(cfg Config) (_ *local, direct bool, err error) {
	cert, above, roots, err := readPlugged(cfg.ChainDir)
	if err != nil {
		return nil, false, err
	}
	path := func(name string) string { return filepath.Join(cfg.ChainDir, name) }
	read := disk.ReadSecret
	if cfg.ChainOfVolume {
		read = disk.ReadGroupSecret
	}
	key, err := readPluggedKey(path(pluggedKey), read)
	if err != nil {
		return nil, false, err
	}
	pair := &KeyPair{Key: key, Chain: []*x509.Certificate{cert}}
	if err := pair.check(); err != nil {
		return nil, false, fmt.Errorf("%s and %s: %w", path(pluggedCert), path(pluggedKey), err)
	}
	if !cert.BasicConstraintsValid || !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0 || len(cert.SubjectKeyId) == 0 || len(cert.RawSubject) <= 2 {
		return nil, false, fmt.Errorf("%s is not a CA that may sign certificates (basic constraints, keyCertSign, a subject and a subject key identifier are needed)", path(pluggedCert))
	}
	chain, err := verifyPlugged(cfg, cert, above, roots)
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", path(pluggedCert), err)
	}
	if !constrained(cert) && !cfg.AllowUnconstrainedIssuer {
		return nil, false, fmt.Errorf("%s has no name constraints, so that whoever steals its key can mint any server's name; add them, or set ca.allowUnconstrainedIssuer", path(pluggedCert))
	}
	signing := &issuing{key: key, cert: cert, window: intersect(chain...)}
	without := chain[:len(chain)-1] // the last is a root, and may be cert itself
	for _, c := range without {
		signing.chain = append(signing.chain, c.Raw)
	}
	direct = cert.MaxPathLen == 0 && cert.MaxPathLenZero
	return &local{issuing: signing, ledger: cfg.Ledger, above: without, roots: roots}, direct, nil
}

func readPlugged(dir string) (cert *x509.Certificate, above, roots []*x509.Certificate, err error) {
	read := func(name string, optional bool) []*x509.Certificate {
		if err != nil {
			return nil
		}
		data, rerr := disk.Read(filepath.Join(dir, name))
		if optional && errors.Is(rerr, fs.ErrNotExist) {
			return nil
		}
		if rerr != nil {
			err = fmt.Errorf("plugged-in chain: %w", rerr)
			return nil
		}
		blocks, perr := pemBlocks(data)
		var certs []*x509.Certificate
		if perr == nil {
			certs, perr = parseCertificates(blocks)
		}
		if perr != nil {
			err = fmt.Errorf("%s: %w", filepath.Join(dir, name), perr)
		}
		return certs
	}
	own := read(pluggedCert, false)
	roots = read(pluggedRoots, false)
	above = read(pluggedChain, true)
	if err != nil {
		return nil, nil, nil, err
	}
	return own[0], above, roots, nil
}

func readPluggedKey(path string, read func(string) ([]byte, error)) (crypto.Signer, error) {
	data, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("plugged-in chain: %w", err)
	}
	blocks, err := pemBlocks(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	// openssl writes the curve before an EC key.
	if len(blocks) == 2 && blocks[0].Type == "EC PARAMETERS" {
		blocks = blocks[1:]
	}
	if len(blocks) != 1 {
		return nil, fmt.Errorf("%s: one private key is wanted", path)
	}
	key, err := parsePrivateKey(blocks[0])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// verifyPlugged returns the chain from cert to a root, verified at this time.
func verifyPlugged(cfg Config, cert *x509.Certificate, above, roots []*x509.Certificate) ([]*x509.Certificate, error) {
	now := cfg.Now()
	if err := checkTime(cert, now); err != nil {
		return nil, err
	}
	rootPool, pool := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range roots {
		if !r.IsCA {
			return nil, fmt.Errorf("%s holds a certificate that is no CA (%s)", pluggedRoots, r.Subject)
		}
		rootPool.AddCert(r)
	}
	for _, c := range above {
		pool.AddCert(c)
	}
	chains, err := cert.Verify(x509.VerifyOptions{Roots: rootPool, Intermediates: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, fmt.Errorf("does not chain to %s through %s: %w", pluggedRoots, pluggedChain, err)
	}
	left := intersect(chains[0]...).notAfter.Sub(now)
	if left < 2*cfg.LeafTTL {
		return nil, fmt.Errorf("its chain is valid for another %v, less than twice ca.leafTTL (%v); renew it or shorten ca.leafTTL", left.Truncate(time.Second), cfg.LeafTTL)
	}
	return chains[0], nil
}

// constrained reports whether cert can sign neither any DNS name nor any IP
// address it likes. Only a critical extension counts: others may be skipped.
func constrained(cert *x509.Certificate) bool {
	dns := len(cert.PermittedDNSDomains) > 0
	for _, d := range cert.ExcludedDNSDomains {
		dns = dns || d == ""
	}
	v4, v6 := false, false
	for _, r := range cert.ExcludedIPRanges {
		if ones, bits := r.Mask.Size(); ones == 0 {
			v4, v6 = v4 || bits == 32, v6 || bits == 128
		}
	}
	ips := len(cert.PermittedIPRanges) > 0 || (v4 && v6)
	return cert.PermittedDNSDomainsCritical && dns && ips
}

// checkTime refuses a certificate outside its time, naming the clock as one cause.
func checkTime(cert *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(cert.NotBefore):
		return fmt.Errorf("certificate %q is not valid before %s and it is %s now; has the clock been set back?", cert.Subject, cert.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case !now.Before(cert.NotAfter):
		return fmt.Errorf("certificate %q expired at %s and it is %s now; replace it, or correct the clock", cert.Subject, cert.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

func authorityEntry(template *x509.Certificate) ledger.Entry {
	e := ledger.Entry{Attestor: ledger.AttestorAuthority}
	if len(template.URIs) == 1 {
		e.SPIFFEID = idFromURL(template.URIs[0])
	}
	return e
}
