package ca_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca"
)

func (e *env) path(name string) string { return filepath.Join(e.cfg.DataDir, "ca", name) }

func TestFilesArePrivate(t *testing.T) {
	e := newEnv(t)
	e.Open()
	entries, err := os.ReadDir(filepath.Join(e.cfg.DataDir, "ca"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range entries {
		info, err := f.Info()
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", f.Name(), info.Mode(), err)
		}
		names = append(names, f.Name())
	}
	if got := strings.Join(names, " "); got != "bundle.json jwt-keys.json lock root.pem serving-issuer.pem svid-issuer.pem" {
		t.Errorf("files: %s", got)
	}
	if info, _ := os.Stat(filepath.Join(e.cfg.DataDir, "ca")); info.Mode().Perm() != 0o700 {
		t.Errorf("directory mode %v", info.Mode())
	}
}

func TestRestartKeepsTrust(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	root, svid, serving := byRole(t, a, ca.RoleRoot), byRole(t, a, ca.RoleSVIDIssuer), byRole(t, a, ca.RoleServingIssuer)
	sequence, keys := a.Bundle().Sequence, len(a.Bundle().JWTAuthorities)
	issued, _ := issue(t, a, request(t))
	e.clock.Add(time.Minute)
	a = e.Open()
	if !root.Equal(byRole(t, a, ca.RoleRoot)) || !svid.Equal(byRole(t, a, ca.RoleSVIDIssuer)) || !serving.Equal(byRole(t, a, ca.RoleServingIssuer)) {
		t.Error("a restart changed the root or an issuer")
	}
	if a.Bundle().Sequence != sequence || len(a.Bundle().JWTAuthorities) != keys {
		t.Errorf("bundle sequence %d with %d keys, was %d with %d", a.Bundle().Sequence, len(a.Bundle().JWTAuthorities), sequence, keys)
	}
	if err := verify(t, issued.Chain, a.Bundle().RootsDER(), e.clock.Now(), x509.ExtKeyUsageClientAuth); err != nil {
		t.Errorf("what was signed before: %v", err)
	}
}

func TestSecondServerIsKeptOut(t *testing.T) {
	e := newEnv(t)
	e.Open()
	_, err := ca.Open(t.Context(), e.cfg)
	contains(t, err, strings.TrimSuffix(e.path(""), "/")+" is in use by another server; give each its own data directory")
}

// Every way a file can be wrong is refused with what to do, and nothing is made
// anew over it.
func TestBadFilesAreRefused(t *testing.T) {
	edit := func(name string, f func([]byte) []byte) func(*testing.T, *env) {
		return func(t *testing.T, e *env) {
			data, err := os.ReadFile(e.path(name))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(e.path(name), f(data), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	cut := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:n] } }
	keyOnly := func(b []byte) []byte {
		block, _ := pem.Decode(b)
		return pem.EncodeToMemory(block)
	}
	mode := func(name string, m os.FileMode) func(*testing.T, *env) {
		return func(t *testing.T, e *env) {
			if err := os.Chmod(e.path(name), m); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		spoil func(*testing.T, *env)
		want  []string
	}{
		"root cut in the key":               {edit("root.pem", cut(60)), []string{"root.pem: is half-written", "restore it from a backup"}},
		"root cut in the certificate":       {edit("root.pem", cut(400)), []string{"root.pem: is half-written"}},
		"root without certificate":          {edit("root.pem", keyOnly), []string{"is half-written: a private key and its certificate are wanted"}},
		"root empty":                        {edit("root.pem", cut(0)), []string{"root.pem: is empty"}},
		"root followed by something":        {edit("root.pem", func(b []byte) []byte { return append(b, "x"...) }), []string{"holds something else than PEM"}},
		"root readable by group":            {mode("root.pem", 0o640), []string{"root.pem holds a private key and may be read by others (mode 0640)", "chmod 600"}},
		"root readable by the world":        {mode("root.pem", 0o604), []string{"may be read by others (mode 0604)"}},
		"issuer readable by group":          {mode("svid-issuer.pem", 0o640), []string{"svid-issuer.pem holds a private key and may be read by others"}},
		"serving issuer readable by group":  {mode("serving-issuer.pem", 0o660), []string{"serving-issuer.pem holds a private key and may be read by others"}},
		"JWT keys readable by group":        {mode("jwt-keys.json", 0o640), []string{"jwt-keys.json holds a private key and may be read by others"}},
		"issuer cut":                        {edit("svid-issuer.pem", cut(300)), []string{"svid-issuer.pem: is half-written", "remove", "a new issuer is made under the same root"}},
		"JWT keys cut":                      {edit("jwt-keys.json", cut(40)), []string{"jwt-keys.json is half-written"}},
		"bundle state cut":                  {edit("bundle.json", cut(10)), []string{"bundle.json is half-written; remove it"}},
		"directory writable by others":      {mode("", 0o770), []string{"may be written by others (mode 0770); run: chmod 700"}},
		"root gone while the rest is there": {func(t *testing.T, e *env) { os.Remove(e.path("root.pem")) }, []string{"root.pem is missing while", "restore the root from a backup"}},
		"key of another certificate": {func(t *testing.T, e *env) {
			other := newEnv(t)
			other.Open()
			mine, _ := os.ReadFile(e.path("root.pem"))
			theirs, _ := os.ReadFile(other.path("root.pem"))
			key, _ := pem.Decode(theirs)
			_, certificate := pem.Decode(mine)
			if err := os.WriteFile(e.path("root.pem"), append(pem.EncodeToMemory(key), certificate...), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"root.pem: the private key does not belong to the certificate"}},
		"root of another trust domain": {func(_ *testing.T, e *env) {
			e.cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.example")
		}, []string{`is the root of another trust domain than "other.example"`, "use another data directory"}},
		"root expired":                   {func(_ *testing.T, e *env) { e.clock.Add(366 * day) }, []string{"Castellan root", "expired at 2027-11-21T12:00:00Z", "replace it, or correct the clock"}},
		"clock set back before the root": {func(_ *testing.T, e *env) { e.clock.Add(-time.Hour) }, []string{"is not valid before", "has the clock been set back?"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			e.Open()
			e.Close()
			before, _ := os.ReadFile(e.path("root.pem"))
			c.spoil(t, e)
			spoilt, _ := os.ReadFile(e.path("root.pem"))
			a, err := e.TryOpen()
			if a != nil {
				t.Fatal("opened")
			}
			contains(t, err, append(c.want, "ca: ")...)
			if strings.Contains(err.Error(), "PRIVATE KEY") {
				t.Errorf("error shows key material: %v", err)
			}
			if after, _ := os.ReadFile(e.path("root.pem")); !bytes.Equal(after, spoilt) {
				t.Error("the root was changed", len(before))
			}
		})
	}
}

// An issuer's file that is removed, as the error advises, is made anew under the
// same root.
func TestIssuerIsMadeAgain(t *testing.T) {
	e := newEnv(t)
	root := byRole(t, e.Open(), ca.RoleRoot)
	e.Close()
	if err := os.Remove(e.path("svid-issuer.pem")); err != nil {
		t.Fatal(err)
	}
	// What a crash in the middle of a write leaves behind is swept.
	if err := os.WriteFile(e.path(".tmp-1"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := e.Open()
	if !root.Equal(byRole(t, a, ca.RoleRoot)) {
		t.Error("another root")
	}
	issue(t, a, request(t))
	if _, err := os.Stat(e.path(".tmp-1")); !os.IsNotExist(err) {
		t.Error("the temporary file is still there")
	}
}

func TestIssuersFollowTheConfiguration(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	svid, serving := byRole(t, a, ca.RoleSVIDIssuer), byRole(t, a, ca.RoleServingIssuer)
	e.cfg.ServingNames = []string{"LOCALHOST", "castellan.example", "localhost"}
	a = e.Open()
	if !serving.Equal(byRole(t, a, ca.RoleServingIssuer)) {
		t.Error("the same names in another order made a new issuer")
	}
	e.cfg.ServingNames = append(e.cfg.ServingNames, "istiod.istio-system.svc")
	a = e.Open()
	if serving.Equal(byRole(t, a, ca.RoleServingIssuer)) || !svid.Equal(byRole(t, a, ca.RoleSVIDIssuer)) {
		t.Error("new serving names must renew the serving issuer, and it alone")
	}
	if err := byRole(t, a, ca.RoleServing).VerifyHostname("istiod.istio-system.svc"); err != nil {
		t.Error(err)
	}
	e.cfg.PermittedURI = true
	a = e.Open()
	if svid.Equal(byRole(t, a, ca.RoleSVIDIssuer)) {
		t.Error("the URI constraint must renew the SVID issuer")
	}
}
