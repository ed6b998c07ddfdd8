package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"time"
)

// checkEvery bounds how long a renewal that is due waits. Looking often and not
// sleeping until a computed moment keeps a clock that jumps from mattering.
const checkEvery = 10 * time.Second

// rootWarning is how often a root near its end is complained about.
const rootWarning = time.Hour

// Run renews the issuers, the serving certificate and the JWT keys until ctx
// ends. A renewal that fails is logged, counted and tried again: what is valid
// keeps signing.
func (a *Authority) Run(ctx context.Context) error {
	tick := time.NewTicker(a.interval())
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			if err := a.renew(ctx); err != nil && ctx.Err() == nil {
				a.renewalFailed(err)
			}
		}
	}
}

func (a *Authority) renewalFailed(err error) {
	a.metrics.renewals.WithLabelValues("failed").Inc()
	a.cfg.Log.Error("renewal failed; what is valid stays in use", "error", err)
}

// interval is a small part of the shortest half-life there is.
func (a *Authority) interval() time.Duration {
	return max(min(checkEvery, a.cfg.MaxLeafTTL/20, a.cfg.JWTTTL/20), 10*time.Millisecond)
}

// loadIssuers takes from the store what is there and still fits; renew makes the rest.
func (a *Authority) loadIssuers(ctx context.Context) error {
	s := &state{}
	if a.direct != nil {
		s.svid, s.serving = a.direct, a.direct
		a.state.Store(s)
		return nil
	}
	var err error
	if s.svid, err = a.loadIssuer(ctx, RoleSVIDIssuer, a.svidTemplate); err != nil {
		return err
	}
	if a.serves() {
		if s.serving, err = a.loadIssuer(ctx, RoleServingIssuer, a.servingIssuerTemplate); err != nil {
			return err
		}
	}
	a.state.Store(s)
	return nil
}

func (a *Authority) serves() bool { return len(a.cfg.ServingNames)+len(a.cfg.ServingIPs) > 0 }

// templateFunc makes an issuer's template.
type templateFunc func(public crypto.PublicKey, w window) (*x509.Certificate, error)

func (a *Authority) svidTemplate(public crypto.PublicKey, w window) (*x509.Certificate, error) {
	return svidIssuerTemplate(a.cfg.TrustDomain, a.cfg.PermittedURI, public, w)
}

func (a *Authority) servingIssuerTemplate(public crypto.PublicKey, w window) (*x509.Certificate, error) {
	return servingIssuerTemplate(a.cfg.ServingNames, a.cfg.ServingIPs, public, w)
}

// loadIssuer returns nil where there is none or where it no longer fits: another
// root, other names, an expiry slept through. Documents that cannot be trusted are an
// error instead.
func (a *Authority) loadIssuer(ctx context.Context, role Role, template templateFunc) (*issuing, error) {
	pair, err := a.store.Load(ctx, role)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil && !damaged(err) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w; remove %s and a new issuer is made under the same root", err, a.store.Where(role))
	}
	i, err := a.asIssuing(pair)
	if err != nil {
		a.cfg.Log.Warn("a stored issuer does not fit and is replaced", "role", role, "error", err)
		return nil, nil
	}
	want, err := template(pair.Key.Public(), i.window)
	if err != nil {
		return nil, err
	}
	if fits(i.cert, want) != nil || !i.window.holds(a.cfg.Now()) {
		a.cfg.Log.Info("a stored issuer is for another configuration or time and is replaced", "role", role)
		return nil, nil
	}
	return i, nil
}

// fits compares an issuer with what the configuration asks for now.
func fits(got, want *x509.Certificate) error {
	if len(got.URIs) != len(want.URIs) || (len(want.URIs) == 1 && got.URIs[0].String() != want.URIs[0].String()) {
		return errors.New("the SPIFFE ID is another")
	}
	return sameConstraints(got, want)
}

// asIssuing verifies a pair's chain up to the roots that are published.
func (a *Authority) asIssuing(pair *KeyPair) (*issuing, error) {
	if err := pair.check(); err != nil {
		return nil, err
	}
	roots, pool := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range a.upstream.Roots() {
		roots.AddCert(r)
	}
	for _, c := range pair.Chain[1:] {
		pool.AddCert(c)
	}
	cert := pair.Chain[0]
	// At the chain's own time: whether it is valid now is for the caller.
	chains, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: pool, CurrentTime: cert.NotBefore.Add(time.Second), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, fmt.Errorf("the issuer does not chain to the root: %w", err)
	}
	i := &issuing{key: pair.Key, cert: cert, window: intersect(chains[0]...)}
	for _, c := range pair.Chain {
		i.chain = append(i.chain, c.Raw)
	}
	return i, nil
}

// renew replaces whatever is missing or past half of its life, publishes the
// bundle, and swaps the whole state at once.
func (a *Authority) renew(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := *a.state.Load()
	var errs []error
	if err := a.renewIssuers(ctx, &next); err != nil {
		errs = append(errs, err)
	}
	if next.svid == nil { // only at start
		return errors.Join(errs...)
	}
	if err := a.renewServing(ctx, &next); err != nil {
		errs = append(errs, err)
	}
	if err := a.jwt.ring.rotate(ctx); err != nil {
		errs = append(errs, fmt.Errorf("JWT keys: %w", err))
	}
	previous := next.bundle
	bundle, err := a.bundles.next(ctx, a.upstream.Roots(), a.jwt.ring.authorities(), a.cfg.Now())
	if err != nil {
		errs = append(errs, err)
	}
	if bundle != nil {
		next.bundle = bundle
	}
	if next.bundle == nil {
		return errors.Join(errs...)
	}
	a.state.Store(&next)
	// Only now may a key sign whose public half has been published.
	a.jwt.published(next.bundle)
	if previous != next.bundle {
		a.announce()
	}
	a.report(&next)
	return errors.Join(errs...)
}

func (a *Authority) renewIssuers(ctx context.Context, next *state) error {
	if a.direct != nil {
		return nil
	}
	var errs []error
	for _, i := range []struct {
		role     Role
		slot     **issuing
		wanted   bool
		template templateFunc
	}{
		{RoleSVIDIssuer, &next.svid, true, a.svidTemplate},
		{RoleServingIssuer, &next.serving, a.serves(), a.servingIssuerTemplate},
	} {
		if !i.wanted || !a.due(*i.slot) {
			continue
		}
		made, err := a.makeIssuer(ctx, i.role, i.template)
		if err != nil {
			errs = append(errs, fmt.Errorf("renew %s: %w", i.role, err))
			continue
		}
		*i.slot = made
		a.metrics.renewals.WithLabelValues("ok").Inc()
		a.cfg.Log.Info("made a new issuer", "role", i.role, "notAfter", made.window.notAfter, "serial", SerialString(made.cert.SerialNumber))
	}
	return errors.Join(errs...)
}

// due holds past half of the life, and before its start: a clock set back must
// not stop signing where the root is valid. Where the upstream has no more to
// give than the issuer already has, renewing would change nothing.
func (a *Authority) due(i *issuing) bool {
	now := a.cfg.Now()
	if i == nil || !i.window.holds(now) {
		return true
	}
	_, end := a.upstream.Window()
	return !now.Before(i.window.halfLife()) && end.After(i.window.notAfter)
}

// checkUpstream refuses a time at which nothing under the upstream is valid.
func (a *Authority) checkUpstream(now time.Time) error {
	notBefore, notAfter := a.upstream.Window()
	switch {
	case now.Before(notBefore):
		return fmt.Errorf("the root is not valid before %s and it is %s now; has the clock been set back?", notBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case !now.Before(notAfter):
		return fmt.Errorf("the root, or what is between it and the issuers, expired at %s and it is %s now; replace it, or correct the clock", notAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

func (a *Authority) makeIssuer(ctx context.Context, role Role, template templateFunc) (*issuing, error) {
	now := a.cfg.Now()
	if err := a.checkUpstream(now); err != nil {
		return nil, err
	}
	var above window
	above.notBefore, above.notAfter = a.upstream.Window()
	w, err := validity(now, a.cfg.IntermediateTTL, a.cfg.Backdate, above)
	if err != nil {
		return nil, err
	}
	pair, err := a.store.Create(ctx, role, func(key crypto.Signer) ([]*x509.Certificate, error) {
		t, err := template(key.Public(), w)
		if err != nil {
			return nil, err
		}
		chain, err := a.upstream.SignIssuer(ctx, t, key)
		if err != nil {
			return nil, err
		}
		// An upstream may give less than was asked, or something else.
		if err := fits(chain[0], t); err != nil {
			return nil, err
		}
		return chain, nil
	})
	if err != nil {
		return nil, err
	}
	return a.asIssuing(pair)
}

// renewServing makes the server's own certificate. Its key stays in memory: a
// restart makes another.
func (a *Authority) renewServing(ctx context.Context, next *state) error {
	if !a.serves() {
		return nil
	}
	now := a.cfg.Now()
	if next.serving == nil {
		return errors.New("there is no issuer for the serving certificate")
	}
	if c := next.servingCert; c != nil {
		w := intersect(c.Leaf)
		if w.holds(now) && now.Before(w.halfLife()) {
			return nil
		}
	}
	cert, err := a.makeServing(ctx, next.serving, now)
	if err != nil {
		return fmt.Errorf("renew %s: %w", RoleServing, err)
	}
	next.servingCert = cert
	return nil
}

func (a *Authority) makeServing(ctx context.Context, issuer *issuing, now time.Time) (*tls.Certificate, error) {
	w, err := validity(now, a.cfg.MaxLeafTTL, a.cfg.Backdate, issuer.window)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template, err := servingTemplate(a.cfg.ServingNames, a.cfg.ServingIPs, key.Public(), w)
	if err != nil {
		return nil, err
	}
	o := &order{
		ctx: ctx, ledger: a.cfg.Ledger, issuer: issuer, entry: authorityEntry(template),
		lint: func(t *tbs) error { return t.lintServing(template) },
	}
	der, err := o.sign(template, key.Public())
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if err := a.verifyServing(leaf, issuer, now); err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: append([][]byte{der}, issuer.chain...), PrivateKey: key, Leaf: leaf}, nil
}

// verifyServing finds out before any client does that an upstream's constraints
// exclude the configured names.
func (a *Authority) verifyServing(leaf *x509.Certificate, issuer *issuing, now time.Time) error {
	roots, pool := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range a.upstream.Roots() {
		roots.AddCert(r)
	}
	for _, der := range issuer.chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		pool.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err != nil {
		return fmt.Errorf("the CA cannot certify the server's own names %v %v: %w; plug in one that may, or change servingNames", a.cfg.ServingNames, netipStrings(a.cfg.ServingIPs), err)
	}
	return nil
}

// report sets the gauges and complains about a root that nears its end.
func (a *Authority) report(s *state) {
	set := func(role Role, c *x509.Certificate) {
		a.metrics.notAfter.WithLabelValues(string(role)).Set(float64(c.NotAfter.Unix()))
	}
	set(RoleRoot, slices.MinFunc(s.bundle.Roots, func(x, y *x509.Certificate) int { return x.NotAfter.Compare(y.NotAfter) }))
	set(RoleSVIDIssuer, s.svid.cert)
	if s.servingCert != nil {
		set(RoleServingIssuer, s.serving.cert)
		set(RoleServing, s.servingCert.Leaf)
	}
	a.metrics.bundleSequence.Set(float64(s.bundle.Sequence))
	now := a.cfg.Now()
	notBefore, notAfter := a.upstream.Window()
	left := notAfter.Sub(now)
	if left > max(2*a.cfg.IntermediateTTL, notAfter.Sub(notBefore)/5) || (!a.warned.IsZero() && now.Sub(a.warned).Abs() < rootWarning) {
		return
	}
	a.warned = now
	a.cfg.Log.Warn("the root nears its end; no certificate outlives it", "notAfter", notAfter, "left", left.Truncate(time.Second).String())
}

func netipStrings(ips []netip.Addr) []string {
	out := make([]string, len(ips))
	for i, ip := range ips {
		out[i] = ip.String()
	}
	return out
}
