package cli_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca"
	"castellan.dev/identity"
)

// issueTo has the authority sign for an account.
func issueTo(t *testing.T, authority *ca.Authority, account string) *tls.Certificate {
	t.Helper()
	a, err := identity.ParseAccount(account)
	if err != nil {
		t.Fatal(err)
	}
	w, err := identity.New(spiffeid.RequireTrustDomainFromString("cluster.local"), a)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := authority.Issuer().Issue(t.Context(), ca.Request{CSR: csr, Workload: w, PodUID: "uid", Node: "local", Cluster: "Kubernetes", Attestor: "test"})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: issued.Chain, PrivateKey: key, Leaf: leaf}
}

func issue(t *testing.T, authority *ca.Authority, account string) (serial string) {
	t.Helper()
	return issueTo(t, authority, account).Leaf.SerialNumber.Text(16)
}
