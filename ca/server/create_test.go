package server_test

import (
	"crypto"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	istiov1 "istio.io/api/security/v1alpha1"

	"castellan.dev/identity"
)

// readChain splits an answer as ztunnel does: one certificate per element, and
// all roots in the last.
func readChain(t *testing.T, chain []string) (certs, roots []*x509.Certificate) {
	t.Helper()
	for i, element := range chain {
		if !strings.HasPrefix(element, "-----BEGIN CERTIFICATE-----\n") || !strings.HasSuffix(element, "-----END CERTIFICATE-----\n") {
			t.Errorf("element %d is not PEM that ends in a newline: %q", i, element)
		}
		var here []*x509.Certificate
		for rest := []byte(element); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			here = append(here, c)
		}
		if i == len(chain)-1 {
			roots = here
			continue
		}
		if len(here) != 1 {
			t.Errorf("element %d holds %d certificates", i, len(here))
		}
		certs = append(certs, here...)
	}
	return certs, roots
}

func TestCreateCertificate(t *testing.T) {
	w := newWorld(t, options{})
	request, key := csr(t)
	resp, err := w.create(as(t.Context(), w.token(orders()), w.agentToken, "clusterid", "Kubernetes"),
		&istiov1.IstioCertificateRequest{Csr: request, ValidityDuration: 600})
	if err != nil {
		t.Fatal(err)
	}
	// istio-agent rejects a chain of fewer than two elements.
	if len(resp.GetCertChain()) < 3 {
		t.Fatalf("%d elements", len(resp.GetCertChain()))
	}
	certs, roots := readChain(t, resp.GetCertChain())
	leaf := certs[0]
	id, err := identity.FromCertificate(leaf)
	if err != nil || id.String() != "spiffe://cluster.local/ns/shop/sa/orders" {
		t.Fatalf("%v, %v", id, err)
	}
	if got, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !got.Equal(leaf.PublicKey) {
		t.Fatal("the certificate is for another key")
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range roots {
		if err := c.CheckSignatureFrom(c); err != nil {
			t.Errorf("the last element holds %s, which is no root: %v", c.Subject, err)
		}
		opts.Roots.AddCert(c)
	}
	for _, c := range certs[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		t.Fatal(err)
	}
	if left := time.Until(leaf.NotAfter); left > 600*time.Second || left < 590*time.Second {
		t.Errorf("asked for 600 s, has %v", left)
	}
	// A backdate as long as what is left of the TTL makes clients that renew at
	// half-life loop: at most a tenth of it.
	if back := time.Since(leaf.NotBefore); back > 60*time.Second+5*time.Second {
		t.Errorf("backdated by %v", back)
	}

	entry, err := w.ledger.BySerial(t.Context(), leaf.SerialNumber.Text(16))
	if err != nil {
		t.Fatal(err)
	}
	if entry.SPIFFEID != id || entry.PodUID != "pod-orders" || entry.Node != "node-a" || entry.Cluster != "Kubernetes" || entry.Attestor != "agent" {
		t.Errorf("ledger row %+v", entry)
	}

	records := w.log.take(t)
	if len(records) != 2 || records[0]["msg"] != "identity requested" || records[1]["msg"] != "identity issued" {
		t.Fatalf("audit records %v", records)
	}
	for _, r := range records {
		if r["spiffeId"] != id.String() || r["podUid"] != "pod-orders" {
			t.Errorf("audit record %v", r)
		}
	}
	if records[1]["serial"] != leaf.SerialNumber.Text(16) {
		t.Errorf("audit record says serial %v, it is %s", records[1]["serial"], leaf.SerialNumber.Text(16))
	}
}

// TestClientHabits holds what clients have been seen to do.
func TestClientHabits(t *testing.T) {
	w := newWorld(t, options{})
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, _ := csr(t)
	emptyOrg, _ := csr(t, func(r *x509.CertificateRequest) { r.Subject = pkix.Name{Organization: []string{""}} })
	tests := map[string]struct {
		csr      string
		validity int64
		ttl      time.Duration
	}{
		"istio-agent: RSA 2048": {csrOf(t, rsaKey), 3600, time.Hour},
		"Ed25519":               {csrOf(t, edKey), 3600, time.Hour},
		"P-384":                 {csrOf(t, newEC(t, elliptic.P384())), 3600, time.Hour},
		"older istio-agent: an empty organization": {emptyOrg, 3600, time.Hour},
		"istio-agent: 24 h by default":             {p256, 86400, 24 * time.Hour},
		"longer than allowed is capped":            {p256, 30 * 86400, 24 * time.Hour},
		"absurdly long is capped":                  {p256, 1<<63 - 1, 24 * time.Hour},
		"zero is the default":                      {p256, 0, time.Hour},
		"negative is the default":                  {p256, -5, time.Hour},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			resp, err := w.create(as(t.Context(), w.token(orders()), w.agentToken),
				&istiov1.IstioCertificateRequest{Csr: tt.csr, ValidityDuration: tt.validity})
			if err != nil {
				t.Fatal(err)
			}
			certs, _ := readChain(t, resp.GetCertChain())
			if left := time.Until(certs[0].NotAfter); left > tt.ttl || left < tt.ttl-time.Minute {
				t.Errorf("valid for %v, want %v", left, tt.ttl)
			}
		})
	}
}

// TestValidityFloorAndBackdate holds what clients that renew at half of [notBefore,
// notAfter] need: a backdate of at most a tenth, and no life so short that they loop.
func TestValidityFloorAndBackdate(t *testing.T) {
	w := newWorld(t, options{})
	request, _ := csr(t)
	ask := func(seconds int64) (*istiov1.IstioCertificateResponse, error) {
		return w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request, ValidityDuration: seconds})
	}
	for _, seconds := range []int64{1, 4} {
		t.Run(fmt.Sprintf("clients-01 %d s are refused", seconds), func(t *testing.T) {
			w.log.take(t)
			_, err := ask(seconds)
			w.checkRefusal(t, err, codes.InvalidArgument, "at least 5 s are needed")
		})
	}
	for _, seconds := range []int64{5, 9, 60, 299, 3600} {
		t.Run(fmt.Sprintf("clients-01 the backdate of %d s", seconds), func(t *testing.T) {
			before := time.Now()
			resp, err := ask(seconds)
			if err != nil {
				t.Fatal(err)
			}
			certs, _ := readChain(t, resp.GetCertChain())
			ttl := time.Duration(seconds) * time.Second
			// Whole seconds: a fresh certificate may begin with the second it is made in.
			if back := before.Sub(certs[0].NotBefore); back > max(ttl/10, time.Second) || back > 30*time.Second {
				t.Errorf("backdated by %v", back)
			}
			if left := certs[0].NotAfter.Sub(before); left < ttl-time.Second {
				t.Errorf("%v left", left)
			}
		})
	}
}
