package ca_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"castellan.dev/ca"
)

// stolen reads an issuer's key and chain from disk, as a thief would: what
// follows is what such a thief can and cannot do (trust rule 6).
func stolen(t *testing.T, e *env, role ca.Role) (*ecdsa.PrivateKey, [][]byte) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(e.cfg.DataDir, "ca", string(role)+".pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(data)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	var chain [][]byte
	for block, rest = pem.Decode(rest); block != nil; block, rest = pem.Decode(rest) {
		chain = append(chain, block.Bytes)
	}
	return key.(*ecdsa.PrivateKey), chain
}

// forge signs template with the stolen key.
func forge(t *testing.T, e *env, role ca.Role, template x509.Certificate) [][]byte {
	t.Helper()
	key, chain := stolen(t, e, role)
	now := e.clock.Now()
	template.SerialNumber = big.NewInt(7)
	template.NotBefore, template.NotAfter = now.Add(-time.Second), now.Add(time.Hour)
	if template.KeyUsage == 0 {
		template.KeyUsage = x509.KeyUsageDigitalSignature
	}
	if template.ExtKeyUsage == nil {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	template.BasicConstraintsValid = true
	leaf, err := x509.CreateCertificate(rand.Reader, &template, parse(t, chain[0]), newKey(t).Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return append([][]byte{leaf}, chain...)
}

// opensslVerify asks OpenSSL; purpose is sslserver or sslclient.
func opensslVerify(t *testing.T, e *env, chain, roots [][]byte, purpose string) (string, bool) {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("openssl is not installed")
	}
	dir := t.TempDir()
	write := func(name string, ders [][]byte) string {
		var b []byte
		for _, d := range ders {
			b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d})...)
		}
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	at := e.clock.Now().Unix()
	args := []string{"verify", "-x509_strict", "-attime", big.NewInt(at).String(), "-purpose", purpose, "-CAfile", write("roots.pem", roots)}
	if len(chain) > 1 {
		args = append(args, "-untrusted", write("chain.pem", chain[1:]))
	}
	out, err := exec.Command(path, append(args, write("leaf.pem", chain[:1]))...).CombinedOutput()
	return string(out), err == nil
}

func TestNameConstraints(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	roots := a.Bundle().RootsDER()
	now := e.clock.Now()
	id := []*url.URL{mustURL(ordersID)}
	svid, _ := issue(t, a, request(t))
	serving, err := a.ServingCertificate()(nil)
	if err != nil {
		t.Fatal(err)
	}
	const server, client = "sslserver", "sslclient"
	for name, c := range map[string]struct {
		chain    [][]byte
		purposes []string
		good     bool
	}{
		"an SVID is valid for both ends":                         {svid.Chain, []string{server, client}, true},
		"the serving certificate is valid for a server":          {serving.Certificate, []string{server}, true},
		"the serving certificate is not for a client":            {serving.Certificate, []string{client}, false},
		"stolen SVID issuer cannot sign a DNS name":              {forge(t, e, ca.RoleSVIDIssuer, x509.Certificate{DNSNames: []string{"castellan.example"}}), []string{server, client}, false},
		"stolen SVID issuer cannot sign any DNS name":            {forge(t, e, ca.RoleSVIDIssuer, x509.Certificate{DNSNames: []string{"bank.example"}, URIs: id}), []string{server, client}, false},
		"stolen SVID issuer cannot sign an IPv4 address":         {forge(t, e, ca.RoleSVIDIssuer, x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}), []string{server, client}, false},
		"stolen SVID issuer cannot sign an IPv6 address":         {forge(t, e, ca.RoleSVIDIssuer, x509.Certificate{IPAddresses: []net.IP{net.IPv6loopback}}), []string{server, client}, false},
		"stolen serving issuer cannot sign an SVID for a client": {forge(t, e, ca.RoleServingIssuer, x509.Certificate{URIs: id}), []string{client}, false},
		"stolen serving issuer cannot sign another DNS name":     {forge(t, e, ca.RoleServingIssuer, x509.Certificate{DNSNames: []string{"bank.example"}}), []string{server, client}, false},
		"stolen serving issuer cannot sign another address":      {forge(t, e, ca.RoleServingIssuer, x509.Certificate{IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}}), []string{server, client}, false},
		"stolen serving issuer cannot sign an IPv6 address":      {forge(t, e, ca.RoleServingIssuer, x509.Certificate{IPAddresses: []net.IP{net.IPv6loopback}}), []string{server, client}, false},
	} {
		for _, purpose := range c.purposes {
			t.Run("trust rule 6 "+name+" "+purpose, func(t *testing.T) {
				usage := x509.ExtKeyUsageServerAuth
				if purpose == client {
					usage = x509.ExtKeyUsageClientAuth
				}
				if err := verify(t, c.chain, roots, now, usage); (err == nil) != c.good {
					t.Errorf("Go: %v", err)
				}
				if out, ok := opensslVerify(t, e, c.chain, roots, purpose); ok != c.good {
					t.Errorf("OpenSSL: %s", out)
				}
			})
		}
	}
}

// A stolen issuer cannot make an issuer either.
func TestPathLength(t *testing.T) {
	e := newEnv(t)
	a := e.Open()
	for _, role := range []ca.Role{ca.RoleSVIDIssuer, ca.RoleServingIssuer} {
		key, chain := stolen(t, e, role)
		below := newKey(t)
		sub := forgeCA(t, e, parse(t, chain[0]), key, below)
		leafTemplate := x509.Certificate{SerialNumber: big.NewInt(8), NotBefore: e.clock.Now(), NotAfter: e.clock.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
		leaf, err := x509.CreateCertificate(rand.Reader, &leafTemplate, parse(t, sub), newKey(t).Public(), below)
		if err != nil {
			t.Fatal(err)
		}
		forged := append([][]byte{leaf, sub}, chain...)
		if err := verify(t, forged, a.Bundle().RootsDER(), e.clock.Now(), x509.ExtKeyUsageServerAuth); err == nil {
			t.Errorf("%s made an issuer", role)
		}
		if c := byRole(t, a, role); !c.MaxPathLenZero || c.MaxPathLen != 0 {
			t.Errorf("%s has path length %d", role, c.MaxPathLen)
		}
	}
}

func forgeCA(t *testing.T, e *env, parent *x509.Certificate, parentKey, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	template := x509.Certificate{
		SerialNumber: big.NewInt(9), NotBefore: e.clock.Now(), NotAfter: e.clock.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte("below"), RawSubject: parent.RawSubject,
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestConstraintsAsConfigured(t *testing.T) {
	cases := map[string]struct {
		change    func(*ca.Config)
		dns       string
		permitted int
		excluded  int
		uri       string
	}{
		"names and address":                       {func(*ca.Config) {}, "castellan.example localhost", 1, 0, ""},
		"trust rule 6 no addresses: all excluded": {func(c *ca.Config) { c.ServingIPs = nil }, "castellan.example localhost", 0, 2, ""},
		"trust rule 6 no names: only invalid":     {func(c *ca.Config) { c.ServingNames = nil }, "invalid", 1, 0, ""},
		"permitted URI by switch":                 {func(c *ca.Config) { c.PermittedURI = true }, "castellan.example localhost", 1, 0, "cluster.local"},
		"two addresses":                           {func(c *ca.Config) { c.ServingIPs = append(c.ServingIPs, netip.MustParseAddr("::1")) }, "castellan.example localhost", 2, 0, ""},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, c.change)
			a := e.Open()
			s, v := byRole(t, a, ca.RoleServingIssuer), byRole(t, a, ca.RoleSVIDIssuer)
			if got := strings.Join(s.PermittedDNSDomains, " "); got != c.dns {
				t.Errorf("serving DNS %q, want %q", got, c.dns)
			}
			if len(s.PermittedIPRanges) != c.permitted || len(s.ExcludedIPRanges) != c.excluded {
				t.Errorf("serving addresses permitted %v, excluded %v", s.PermittedIPRanges, s.ExcludedIPRanges)
			}
			if len(s.ExtKeyUsage) != 1 || s.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth || !s.PermittedDNSDomainsCritical {
				t.Errorf("serving issuer usages %v, critical %v", s.ExtKeyUsage, s.PermittedDNSDomainsCritical)
			}
			if strings.Join(v.PermittedDNSDomains, " ") != "invalid" || len(v.ExcludedIPRanges) != 2 || !v.PermittedDNSDomainsCritical {
				t.Errorf("SVID issuer: %v %v", v.PermittedDNSDomains, v.ExcludedIPRanges)
			}
			if got := strings.Join(v.PermittedURIDomains, " "); got != c.uri {
				t.Errorf("SVID issuer's URI %q, want %q", got, c.uri)
			}
			issued, _ := issue(t, a, request(t))
			if err := verify(t, issued.Chain, issued.Roots, e.clock.Now(), x509.ExtKeyUsageClientAuth); err != nil {
				t.Error(err)
			}
		})
	}
}
