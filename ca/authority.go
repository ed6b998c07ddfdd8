package ca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"castellan.dev/internal/disk"
)

const (
	dirName  = "ca"
	lockName = "lock"
)

// Authority holds the trust domain's signing keys and renews what is under the
// root. It is safe for concurrent use.
type Authority struct {
	cfg      Config
	dir      string
	lock     *disk.Lock
	blobs    Blobs
	store    KeyStore
	upstream Upstream
	// direct is a plugged-in CA of path length 0, which signs leaves itself.
	direct *issuing
	// unnamed says that direct has no name constraints.
	unnamed bool
	metrics *metrics

	state  atomic.Pointer[state]
	issuer *Issuer
	jwt    *JWTIssuer

	mu      sync.Mutex // guards what follows, and renewal, which may wait for a store
	bundles *bundleState
	warned  time.Time

	changedMu sync.Mutex
	changed   chan struct{}
}

// state is what signs and serves now; replaced whole, never changed.
type state struct {
	svid *issuing
	// serving is nil where no certificate can be served.
	serving     *issuing
	servingCert *tls.Certificate
	bundle      *Bundle
}

// Open loads or creates everything under cfg.DataDir, or in cfg.Keys. It refuses what the
// package doc says, with an error that says what to do. Close releases the lock.
func Open(ctx context.Context, cfg Config) (_ *Authority, err error) {
	cfg, err = cfg.checked()
	if err != nil {
		return nil, fmt.Errorf("ca: configuration: %w", err)
	}
	dir := filepath.Join(cfg.DataDir, dirName)
	a := &Authority{cfg: cfg, dir: dir, blobs: cfg.Keys, metrics: newMetrics(), changed: make(chan struct{})}
	if a.blobs == nil {
		a.blobs = DiskBlobs(dir)
	}
	a.store = pairStore{a.blobs}
	if err := disk.MakeDir(dir); err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	if a.lock, err = disk.Acquire(filepath.Join(dir, lockName)); err != nil {
		if errors.Is(err, disk.ErrLocked) {
			return nil, fmt.Errorf("ca: %s is in use by another server; give each its own data directory", dir)
		}
		return nil, fmt.Errorf("ca: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.lock.Close())
		}
	}()
	if err := a.load(ctx); err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	if err := a.metrics.register(cfg.Registerer); err != nil {
		return nil, fmt.Errorf("ca: metrics: %w", err)
	}
	return a, nil
}

func (a *Authority) load(ctx context.Context) (err error) {
	if err := disk.Sweep(a.dir); err != nil {
		return err
	}
	if err := a.openUpstream(ctx); err != nil {
		return err
	}
	if a.jwt, err = openJWT(ctx, a.cfg, a.blobs, a.metrics); err != nil {
		return err
	}
	if a.bundles, err = loadBundleState(ctx, a.blobs, a.cfg.TrustDomain); err != nil {
		return err
	}
	a.issuer = &Issuer{authority: a, lifetimes: a.cfg.lifetimes()}
	if err := a.loadIssuers(ctx); err != nil {
		return err
	}
	err = a.renew(ctx)
	if err != nil && a.complete() {
		// What is due can wait, as it can while running.
		a.renewalFailed(err)
		return nil
	}
	return err
}

// complete reports whether everything is there and valid now.
func (a *Authority) complete() bool {
	s, now := a.state.Load(), a.cfg.Now()
	return s.bundle != nil && s.svid.window.holds(now) && (s.servingCert != nil || !a.serves())
}

func (a *Authority) openUpstream(ctx context.Context) error {
	if a.cfg.ChainDir == "" {
		upstream, err := openSelfSigned(ctx, a.cfg, a.blobs)
		if err != nil {
			return err
		}
		a.upstream = upstream
		return nil
	}
	plugged, direct, err := openPlugged(a.cfg)
	if err != nil {
		return err
	}
	a.upstream = plugged
	if direct {
		a.direct = plugged.issuing
	}
	if !constrained(plugged.cert) {
		a.unnamed = direct
		a.metrics.unconstrained.Set(1)
		a.cfg.Log.Warn("the plugged-in CA has no name constraints: whoever steals its key can mint any server's name",
			"chainDir", a.cfg.ChainDir, "subject", plugged.cert.Subject.String(), "signsLeaves", direct)
	}
	return nil
}

// Close releases the directory's lock. The ledger stays its owner's.
func (a *Authority) Close() error { return a.lock.Close() }

// Issuer signs X509-SVIDs.
func (a *Authority) Issuer() *Issuer { return a.issuer }

// JWTIssuer signs JWT-SVIDs.
func (a *Authority) JWTIssuer() *JWTIssuer { return a.jwt }

// Bundle returns what the trust domain is trusted by now.
func (a *Authority) Bundle() *Bundle { return a.state.Load().bundle }

// Changed returns a channel that is closed at the next change of the bundle.
// Take it before Bundle, so that no change is missed.
func (a *Authority) Changed() <-chan struct{} {
	a.changedMu.Lock()
	defer a.changedMu.Unlock()
	return a.changed
}

func (a *Authority) announce() {
	a.changedMu.Lock()
	defer a.changedMu.Unlock()
	close(a.changed)
	a.changed = make(chan struct{})
}

// ServingCertificate returns the hook for the server's tls.Config; each
// handshake gets the newest certificate.
func (a *Authority) ServingCertificate() func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert := a.state.Load().servingCert
		if cert == nil {
			return nil, errors.New("ca: there is no serving certificate: no serving names are configured")
		}
		return cert, nil
	}
}

// Role says what one of the authority's own certificates is for.
type Role string

// Roles, as the AuthorityAdmin service names them.
const (
	RoleRoot          Role = "root"
	RoleSVIDIssuer    Role = "svid-issuer"
	RoleServingIssuer Role = "serving-issuer"
	RoleServing       Role = "serving"
)

// Certificate is one of the authority's own.
type Certificate struct {
	Role Role
	Cert *x509.Certificate
}

// Certificates lists the authority's own certificates now in use.
func (a *Authority) Certificates() []Certificate {
	s := a.state.Load()
	var list []Certificate
	for _, r := range s.bundle.Roots {
		list = append(list, Certificate{RoleRoot, r})
	}
	list = append(list, Certificate{RoleSVIDIssuer, s.svid.cert})
	if s.servingCert != nil {
		list = append(list, Certificate{RoleServingIssuer, s.serving.cert}, Certificate{RoleServing, s.servingCert.Leaf})
	}
	return list
}

// LeafTTL returns the validity that a caller gets who asks for none.
func (a *Authority) LeafTTL() time.Duration { return a.cfg.LeafTTL }

// Ready returns nil when the authority can sign now, else why not.
func (a *Authority) Ready() error {
	s, now := a.state.Load(), a.cfg.Now()
	if err := a.checkUpstream(now); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if !s.svid.window.holds(now) {
		return fmt.Errorf("ca: the SVID issuer is not valid at %s (%s to %s)", now.UTC().Format(time.RFC3339),
			s.svid.window.notBefore.UTC().Format(time.RFC3339), s.svid.window.notAfter.UTC().Format(time.RFC3339))
	}
	return nil
}
