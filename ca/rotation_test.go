package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca"
	"castellan.dev/ca/ledger/ledgertest"
)

// bubble runs an authority on synctest's clock.
func bubble(t *testing.T, change func(*ca.Config), test func(t *testing.T, a *ca.Authority, l *ledgertest.Memory)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		l := &ledgertest.Memory{}
		cfg := ca.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), DataDir: filepath.Join(dir, "data"),
			ServingNames: []string{"localhost"}, Ledger: l,
			LeafTTL: time.Minute, MaxLeafTTL: 10 * time.Minute, IntermediateTTL: time.Hour, RootTTL: 24 * time.Hour,
		}
		if change != nil {
			change(&cfg)
		}
		a, err := ca.Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.Run(ctx) }()
		test(t, a, l)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestIssuersAreRenewedAtHalfLife(t *testing.T) {
	bubble(t, nil, func(t *testing.T, a *ca.Authority, _ *ledgertest.Memory) {
		roles := []ca.Role{ca.RoleSVIDIssuer, ca.RoleServingIssuer}
		var first []*x509.Certificate
		for _, r := range roles {
			first = append(first, byRole(t, a, r))
		}
		issue(t, a, request(t))
		time.Sleep(29 * time.Minute)
		synctest.Wait()
		for i, r := range roles {
			if !first[i].Equal(byRole(t, a, r)) {
				t.Errorf("%s was renewed before half of its life", r)
			}
		}
		r := request(t)
		r.TTL = 9 * time.Minute
		old, _ := issue(t, a, r)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		for i, r := range roles {
			c := byRole(t, a, r)
			if first[i].Equal(c) {
				t.Errorf("%s was not renewed at half of its life", r)
			}
			if time.Until(c.NotAfter) < 58*time.Minute {
				t.Errorf("%s ends in %v", r, time.Until(c.NotAfter))
			}
			if slices.Equal(first[i].SubjectKeyId, c.SubjectKeyId) {
				t.Errorf("%s kept its key", r)
			}
		}
		if err := verify(t, old.Chain, a.Bundle().RootsDER(), time.Now(), x509.ExtKeyUsageClientAuth); err != nil {
			t.Errorf("a leaf of the old issuer is not valid any more: %v", err)
		}
		renewed, _ := issue(t, a, request(t))
		if err := verify(t, renewed.Chain, a.Bundle().RootsDER(), time.Now(), x509.ExtKeyUsageClientAuth); err != nil {
			t.Error(err)
		}
	})
}

func TestServingCertificateIsRenewedAtHalfLife(t *testing.T) {
	bubble(t, nil, func(t *testing.T, a *ca.Authority, _ *ledgertest.Memory) {
		hook := a.ServingCertificate()
		first, _ := hook(nil)
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		if c, _ := hook(nil); c != first {
			t.Error("renewed before half of its life")
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		c, _ := hook(nil)
		if c == first {
			t.Error("not renewed at half of its life")
		}
		if err := verify(t, c.Certificate, a.Bundle().RootsDER(), time.Now(), x509.ExtKeyUsageServerAuth); err != nil {
			t.Error(err)
		}
	})
}

// A renewal that fails takes nothing down: what is valid signs on, never beyond
// its own end, and then no more.
func TestFailedRenewalKeepsSigningUntilTheEnd(t *testing.T) {
	bubble(t, nil, func(t *testing.T, a *ca.Authority, l *ledgertest.Memory) {
		issuer := byRole(t, a, ca.RoleSVIDIssuer)
		l.Fail(errors.New("disk full"))
		time.Sleep(55 * time.Minute)
		synctest.Wait()
		l.Fail(nil)
		// Between two attempts of the renewal.
		r := request(t)
		r.TTL = 10 * time.Minute
		_, leaf := issue(t, a, r)
		if !issuer.Equal(byRole(t, a, ca.RoleSVIDIssuer)) || !leaf.NotAfter.Equal(issuer.NotAfter) {
			t.Errorf("trust rule 10: leaf ends %v, its issuer %v", leaf.NotAfter, issuer.NotAfter)
		}
		l.Fail(errors.New("disk full"))
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		if _, err := a.Issuer().Issue(t.Context(), request(t)); !errors.Is(err, ca.ErrNoIssuer) {
			t.Errorf("issued by an expired issuer: %v", err)
		}
		contains(t, a.Ready(), "the SVID issuer is not valid at")
		l.Fail(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if err := a.Ready(); err != nil {
			t.Error(err)
		}
		issue(t, a, request(t))
	})
}

func TestNothingOutlivesTheRoot(t *testing.T) {
	bubble(t, nil, func(t *testing.T, a *ca.Authority, _ *ledgertest.Memory) {
		root := byRole(t, a, ca.RoleRoot)
		for time.Until(root.NotAfter) > 2*time.Minute {
			time.Sleep(min(10*time.Minute, time.Until(root.NotAfter)-90*time.Second))
			synctest.Wait()
			issued, leaf := issue(t, a, request(t))
			if leaf.NotAfter.After(root.NotAfter) || parse(t, issued.Chain[1]).NotAfter.After(root.NotAfter) {
				t.Fatalf("leaf ends %v, issuer %v, root %v", leaf.NotAfter, parse(t, issued.Chain[1]).NotAfter, root.NotAfter)
			}
		}
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if _, err := a.Issuer().Issue(t.Context(), request(t)); !errors.Is(err, ca.ErrNoIssuer) {
			t.Errorf("issued under an expired root: %v", err)
		}
		contains(t, a.Ready(), "expired at")
	})
}

func TestClockSetBackRefusesAndRecovers(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	e.clock.Add(-5 * time.Minute) // before every certificate
	if _, err := a.Issuer().Issue(t.Context(), request(t)); !errors.Is(err, ca.ErrNoIssuer) {
		t.Fatalf("issued with a clock before the issuer: %v", err)
	}
	contains(t, a.Ready(), "has the clock been set back?")
	e.clock.Add(5*time.Minute - 10*time.Second) // inside the backdate
	_, leaf := issue(t, a, request(t))
	if issuer := byRole(t, a, ca.RoleSVIDIssuer); leaf.NotBefore.Before(issuer.NotBefore) {
		t.Errorf("leaf begins %v, before its issuer's %v", leaf.NotBefore, issuer.NotBefore)
	}
	// An issuer made while the clock was ahead is replaced, under the same root.
	e.clock.Add(30 * day)
	a = e.Open()
	ahead := byRole(t, a, ca.RoleSVIDIssuer)
	e.clock.Add(-29 * day)
	a = e.Open()
	if ahead.Equal(byRole(t, a, ca.RoleSVIDIssuer)) {
		t.Error("an issuer of the future is in use")
	}
	issue(t, a, request(t))
}

func TestRootNearItsEndIsWarnedAbout(t *testing.T) {
	e := newEnv(t)
	e.Open()
	if strings.Contains(e.log.String(), "the root nears its end") {
		t.Error("warned about a new root")
	}
	e.clock.Add(300 * day)
	a := e.Open()
	if !strings.Contains(e.log.String(), "level=WARN msg=\"the root nears its end") {
		t.Errorf("no warning in %s", e.log)
	}
	if got, want := counter(t, e.reg, "castellan_ca_certificate_not_after_seconds", "root"), float64(byRole(t, a, ca.RoleRoot).NotAfter.Unix()); got != want {
		t.Errorf("metric %v, want %v", got, want)
	}
}
