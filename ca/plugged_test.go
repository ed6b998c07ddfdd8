package ca_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"castellan.dev/ca"
)

// plug is a chain as Istio's cacerts hold one: a root, a CA between, and the
// plugged-in CA. Each test changes what it is about.
type plug struct {
	dir      string
	rootKey  *ecdsa.PrivateKey
	midKey   *ecdsa.PrivateKey
	key      *ecdsa.PrivateKey
	root     *x509.Certificate
	mid      *x509.Certificate
	template x509.Certificate
}

func signCA(t *testing.T, template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, der)
}

func newPlug(t *testing.T, e *env) *plug {
	t.Helper()
	now := e.clock.Now()
	p := &plug{dir: t.TempDir(), rootKey: newKey(t), midKey: newKey(t), key: newKey(t)}
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(365 * day),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
	}
	rt := template("Corporate root")
	p.root = signCA(t, rt, rt, p.rootKey, p.rootKey)
	p.mid = signCA(t, template("Corporate CA"), p.root, p.midKey, p.rootKey)
	p.template = *template("Mesh CA")
	p.template.MaxPathLen = 1
	return p
}

// write puts the four files down and points the configuration to them.
func (p *plug) write(t *testing.T, e *env) *x509.Certificate {
	t.Helper()
	c := signCA(t, &p.template, p.mid, p.key, p.midKey)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		t.Fatal(err)
	}
	p.put(t, "ca-cert.pem", "CERTIFICATE", c.Raw)
	p.put(t, "ca-key.pem", "PRIVATE KEY", pkcs8)
	p.put(t, "root-cert.pem", "CERTIFICATE", p.root.Raw)
	p.put(t, "cert-chain.pem", "CERTIFICATE", c.Raw, p.mid.Raw, p.root.Raw)
	e.cfg.ChainDir = p.dir
	return c
}

func (p *plug) put(t *testing.T, name, kind string, ders ...[]byte) {
	t.Helper()
	var b []byte
	for _, d := range ders {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: d})...)
	}
	if err := os.WriteFile(filepath.Join(p.dir, name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func allRanges() []*net.IPNet {
	return []*net.IPNet{{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}
}

func TestPluggedUnconstrainedNeedsTheSwitch(t *testing.T) {
	for name, pathLen := range map[string]int{"path length 0": 0, "path length 1": 1, "no path length": -1} {
		t.Run("trust rule 6 "+name, func(t *testing.T) {
			e := newEnv(t)
			p := newPlug(t, e)
			p.template.MaxPathLen, p.template.MaxPathLenZero = pathLen, pathLen == 0
			p.write(t, e)
			_, err := e.TryOpen()
			contains(t, err, "has no name constraints", "set ca.allowUnconstrainedIssuer")
			// One that is not critical may be skipped, and counts for nothing.
			p.template.PermittedDNSDomains, p.template.ExcludedIPRanges = []string{"invalid"}, allRanges()
			p.write(t, e)
			_, err = e.TryOpen()
			contains(t, err, "has no name constraints")
		})
	}
}

func TestPluggedUnconstrainedSignsLeavesItself(t *testing.T) {
	e := newEnv(t, func(c *ca.Config) { c.AllowUnconstrainedIssuer = true })
	p := newPlug(t, e)
	p.template.MaxPathLen, p.template.MaxPathLenZero = 0, true
	plugged := p.write(t, e)
	a := e.Open()
	issued, leaf := issue(t, a, request(t))
	if len(issued.Chain) != 3 || !parse(t, issued.Chain[1]).Equal(plugged) || leaf.CheckSignatureFrom(plugged) != nil {
		t.Fatalf("chain of %d", len(issued.Chain))
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if err := verify(t, issued.Chain, [][]byte{p.root.Raw}, e.clock.Now(), usage); err != nil {
			t.Error(err)
		}
	}
	if !strings.Contains(e.log.String(), "the plugged-in CA has no name constraints") {
		t.Error("not warned")
	}
	if counter(t, e.reg, "castellan_ca_unconstrained_issuer") != 1 || counter(t, e.reg, "castellan_ca_svids_unconstrained_total") != 1 {
		t.Error("not counted")
	}
	serving, err := a.ServingCertificate()(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(t, serving.Certificate, [][]byte{p.root.Raw}, e.clock.Now(), x509.ExtKeyUsageServerAuth); err != nil {
		t.Error(err)
	}
	if got := a.Bundle().RootsDER(); len(got) != 1 || string(got[0]) != string(p.root.Raw) {
		t.Error("the bundle does not hold the plugged-in root alone")
	}
}

func TestPluggedWithRoomGetsOurIssuers(t *testing.T) {
	e := newEnv(t, func(c *ca.Config) { c.AllowUnconstrainedIssuer = true })
	plugged := newPlug(t, e)
	cert := plugged.write(t, e)
	a := e.Open()
	issued, _ := issue(t, a, request(t))
	if len(issued.Chain) != 4 || !parse(t, issued.Chain[2]).Equal(cert) {
		t.Fatalf("chain of %d", len(issued.Chain))
	}
	issuer := byRole(t, a, ca.RoleSVIDIssuer)
	if strings.Join(issuer.PermittedDNSDomains, " ") != "invalid" || !issuer.MaxPathLenZero {
		t.Error("the issuer under it is not constrained")
	}
	roots := [][]byte{plugged.root.Raw}
	if err := verify(t, issued.Chain, roots, e.clock.Now(), x509.ExtKeyUsageClientAuth); err != nil {
		t.Error(err)
	}
	if out, ok := opensslVerify(t, e, issued.Chain, roots, "sslclient"); !ok {
		t.Error(out)
	}
	// From our own root to a plugged-in one and back to another: issuers follow.
	other := newPlug(t, e)
	other.write(t, e)
	a = e.Open()
	if issuer.Equal(byRole(t, a, ca.RoleSVIDIssuer)) {
		t.Error("the issuer of the former CA is still in use")
	}
}

func TestPluggedConstrained(t *testing.T) {
	constrain := func(p *plug) {
		p.template.PermittedDNSDomainsCritical = true
		p.template.PermittedDNSDomains = []string{"localhost", "castellan.example"}
		p.template.PermittedIPRanges = []*net.IPNet{{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}}
	}
	t.Run("to the server's names: needs no switch", func(t *testing.T) {
		e := newEnv(t)
		p := newPlug(t, e)
		constrain(p)
		p.write(t, e)
		a := e.Open()
		issue(t, a, request(t))
		if counter(t, e.reg, "castellan_ca_unconstrained_issuer") != 0 {
			t.Error("counted as unconstrained")
		}
	})
	t.Run("to other names: cannot serve", func(t *testing.T) {
		e := newEnv(t)
		p := newPlug(t, e)
		constrain(p)
		p.template.PermittedDNSDomains = []string{"elsewhere.example"}
		p.write(t, e)
		_, err := e.TryOpen()
		contains(t, err, "the CA cannot certify the server's own names", "plug in one that may, or change servingNames")
	})
	t.Run("path length 0, excluding everything, without serving names", func(t *testing.T) {
		e := newEnv(t, func(c *ca.Config) { c.ServingNames, c.ServingIPs = nil, nil })
		p := newPlug(t, e)
		p.template.PermittedDNSDomainsCritical = true
		p.template.PermittedDNSDomains, p.template.ExcludedIPRanges = []string{"invalid"}, allRanges()
		p.template.MaxPathLen, p.template.MaxPathLenZero = 0, true
		p.write(t, e)
		issued, _ := issue(t, e.Open(), request(t))
		if len(issued.Chain) != 3 {
			t.Errorf("chain of %d", len(issued.Chain))
		}
	})
	t.Run("to another trust domain's URIs", func(t *testing.T) {
		e := newEnv(t)
		p := newPlug(t, e)
		constrain(p)
		p.template.PermittedURIDomains = []string{"other.example"}
		p.write(t, e)
		_, err := e.TryOpen()
		contains(t, err, "the issuer does not chain to the root")
	})
}

func TestPluggedIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*testing.T, *env, *plug)
		want  string
	}{
		"no directory":       {func(_ *testing.T, e *env, p *plug) { e.cfg.ChainDir += "/none" }, "ca-cert.pem: no such file"},
		"no root file":       {func(_ *testing.T, _ *env, p *plug) { os.Remove(filepath.Join(p.dir, "root-cert.pem")) }, "root-cert.pem: no such file"},
		"key readable":       {func(_ *testing.T, _ *env, p *plug) { os.Chmod(filepath.Join(p.dir, "ca-key.pem"), 0o640) }, "ca-key.pem holds a private key and may be read by others"},
		"half a certificate": {func(_ *testing.T, _ *env, p *plug) { os.Truncate(filepath.Join(p.dir, "ca-cert.pem"), 100) }, "ca-cert.pem: is half-written"},
		"half a key":         {func(_ *testing.T, _ *env, p *plug) { os.Truncate(filepath.Join(p.dir, "ca-key.pem"), 100) }, "ca-key.pem: is half-written"},
		"key of another": {func(t *testing.T, e *env, p *plug) {
			k := p.key
			p.key = newKey(t)
			p.write(t, e)
			pkcs8, _ := x509.MarshalPKCS8PrivateKey(k)
			p.put(t, "ca-key.pem", "PRIVATE KEY", pkcs8)
		}, "the private key does not belong to the certificate"},
		"chain missing": {func(_ *testing.T, _ *env, p *plug) { os.Remove(filepath.Join(p.dir, "cert-chain.pem")) }, "does not chain to root-cert.pem through cert-chain.pem"},
		"another root":  {func(t *testing.T, e *env, p *plug) { p.put(t, "root-cert.pem", "CERTIFICATE", newPlug(t, e).root.Raw) }, "does not chain to root-cert.pem"},
		"root is no CA": {func(t *testing.T, e *env, p *plug) { p.put(t, "root-cert.pem", "CERTIFICATE", leafOf(t, e, p).Raw) }, "holds a certificate that is no CA"},
		"not a CA":      {func(t *testing.T, e *env, p *plug) { p.template.IsCA, p.template.MaxPathLen = false, 0; p.write(t, e) }, "is not a CA that may sign certificates"},
		"may not sign": {func(t *testing.T, e *env, p *plug) {
			p.template.KeyUsage = x509.KeyUsageDigitalSignature
			p.write(t, e)
		}, "is not a CA that may sign certificates"},
		"expired":       {func(t *testing.T, e *env, p *plug) { e.clock.Add(366 * day) }, "expired at"},
		"not yet valid": {func(t *testing.T, e *env, p *plug) { e.clock.Add(-2 * time.Hour) }, "has the clock been set back?"},
		"trust rule 10 short": {func(t *testing.T, e *env, p *plug) {
			p.template.NotAfter = e.clock.Now().Add(90 * time.Minute)
			p.write(t, e)
		}, "valid for another 1h30m0s, less than twice ca.leafTTL (1h0m0s)"},
		"encrypted key": {func(t *testing.T, _ *env, p *plug) { p.put(t, "ca-key.pem", "ENCRYPTED PRIVATE KEY", []byte("x")) }, `holds a PEM block "ENCRYPTED PRIVATE KEY" where an unencrypted private key is wanted`},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, func(c *ca.Config) { c.AllowUnconstrainedIssuer = true })
			p := newPlug(t, e)
			p.write(t, e)
			c.spoil(t, e, p)
			_, err := e.TryOpen()
			contains(t, err, "ca: ", c.want)
		})
	}
}

func leafOf(t *testing.T, e *env, p *plug) *x509.Certificate {
	t.Helper()
	return signCA(t, &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: e.clock.Now(), NotAfter: e.clock.Now().Add(day)}, p.mid, newKey(t), p.midKey)
}

// TestPluggedOfAVolume: in a pod the key's group may read it, as the pod does itself;
// elsewhere that is refused.
func TestPluggedOfAVolume(t *testing.T) {
	e := newEnv(t, func(c *ca.Config) { c.AllowUnconstrainedIssuer = true })
	newPlug(t, e).write(t, e)
	if err := os.Chmod(filepath.Join(e.cfg.ChainDir, "ca-key.pem"), 0o440); err != nil {
		t.Fatal(err)
	}
	_, err := e.TryOpen()
	contains(t, err, "ca-key.pem holds a private key and may be read by others (mode 0440)")
	e.cfg.ChainOfVolume = true
	e.Open()
}
