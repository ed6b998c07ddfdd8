package server_test

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	istiov1 "istio.io/api/security/v1alpha1"

	"castellan.dev/ca"
	"castellan.dev/ca/server"
	"castellan.dev/identity"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

// certificate asks for one as a caller does.
func (w *world) certificate(t *testing.T, workload, agent string, seconds int64) *tls.Certificate {
	t.Helper()
	request, key := csr(t)
	resp, err := w.create(as(t.Context(), workload, agent), &istiov1.IstioCertificateRequest{Csr: request, ValidityDuration: seconds})
	if err != nil {
		t.Fatal(err)
	}
	return keyPair(t, resp.GetCertChain(), key)
}

// shortLived is an agent's certificate of a life too short to be asked for.
func (w *world) shortLived(t *testing.T, ttl time.Duration) *tls.Certificate {
	t.Helper()
	agent, err := identity.New(spiffeid.RequireTrustDomainFromString("cluster.local"), account(t, "castellan-system/castellan-agent"))
	if err != nil {
		t.Fatal(err)
	}
	request, key := csr(t)
	issued, err := w.authority.Issuer().Issue(t.Context(), ca.Request{CSR: []byte(request), Workload: agent, TTL: ttl, PodUID: "pod-agent", Node: "node-a"})
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{PrivateKey: key, Certificate: issued.Chain}
}

func keyPair(t *testing.T, chain []string, key crypto.Signer) *tls.Certificate {
	t.Helper()
	c := &tls.Certificate{PrivateKey: key}
	for _, element := range chain[:len(chain)-1] {
		block, _ := pem.Decode([]byte(element))
		c.Certificate = append(c.Certificate, block.Bytes)
	}
	return c
}

func TestGate(t *testing.T) {
	w := newWorld(t, options{})
	foreign := tlsconftest.NewRoot(t).SVIDIssuer(t)
	const agentID = "spiffe://cluster.local/ns/castellan-system/sa/castellan-agent"
	expired := w.shortLived(t, time.Second)
	request, _ := csr(t)

	tests := map[string]struct {
		cert  *tls.Certificate
		code  codes.Code
		cause string
	}{
		"an agent":                  {w.certificate(t, w.agentToken, w.agentToken, 600), codes.OK, ""},
		"no certificate":            {nil, codes.Unauthenticated, "the caller has no certificate"},
		"a workload":                {w.certificate(t, w.token(orders()), w.agentToken, 600), codes.PermissionDenied, `"spiffe://cluster.local/ns/shop/sa/orders" is no agent`},
		"an agent of another root":  {foreign.Leaf(t, agentID), codes.Unauthenticated, "tlsconf"},
		"an agent, but it expired":  {expired, codes.Unauthenticated, "expired"},
		"an agent of other domains": {foreign.Leaf(t, "spiffe://evil.test/ns/castellan-system/sa/castellan-agent"), codes.Unauthenticated, "tlsconf"},
	}
	leaf, err := x509.ParseCertificate(expired.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	for time.Now().Before(leaf.NotAfter.Add(time.Second)) { // the verifier's clock is real
		<-time.After(50 * time.Millisecond)
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w.log.take(t)
			conn := w.dial(tt.cert)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{})
			if status.Code(err) != tt.code {
				t.Fatalf("unary: %v, want %v", err, tt.code)
			}
			stream, err := healthv1.NewHealthClient(conn).Watch(ctx, &healthv1.HealthCheckRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err = stream.Recv(); status.Code(err) != tt.code {
				t.Fatalf("stream: %v, want %v", err, tt.code)
			}
			if tt.code != codes.OK {
				if text := status.Convert(err).Message(); text != textOf(tt.code) {
					t.Errorf("the caller is told %q", text)
				}
				records := w.log.take(t)
				if len(records) != 2 {
					t.Fatalf("log %v", records)
				}
				for _, r := range records {
					if r["msg"] != "call refused" || !strings.Contains(fmt.Sprint(r["cause"]), tt.cause) {
						t.Errorf("log %v, want %q", r, tt.cause)
					}
				}
			}
			// Whatever its certificate, who has tokens may ask for another.
			ctx = as(ctx, w.token(orders()), w.agentToken)
			if _, err := istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istiov1.IstioCertificateRequest{Csr: request}); err != nil {
				t.Errorf("CreateCertificate on the same connection: %v", err)
			}
		})
	}
}

// TestStreamEndsWithItsCertificate: an agent's stream does not outlive what opened it.
func TestStreamEndsWithItsCertificate(t *testing.T) {
	w := newWorld(t, options{})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := healthv1.NewHealthClient(w.dial(w.shortLived(t, 2*time.Second))).Watch(ctx, &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unauthenticated || status.Convert(err).Message() != "certificate expired" {
		t.Fatal(err)
	}
}

func TestStreamEndsWithTheServer(t *testing.T) {
	w := newWorld(t, options{})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := healthv1.NewHealthClient(w.dial(w.certificate(t, w.agentToken, w.agentToken, 600))).Watch(ctx, &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	w.gate.Close()
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
}

// TestCertificateAloneRenewsNothing holds trust rule 3: renewal attests again.
func TestCertificateAloneRenewsNothing(t *testing.T) {
	w := newWorld(t, options{})
	w.conn = w.dial(w.certificate(t, w.token(orders()), w.agentToken, 600))
	request, _ := csr(t)
	w.log.take(t)
	t.Run("trust-03 a certificate without tokens", func(t *testing.T) {
		_, err := w.create(t.Context(), &istiov1.IstioCertificateRequest{Csr: request})
		w.checkRefusal(t, err, codes.Unauthenticated, "no workload token")
	})
	t.Run("trust-03 a certificate with a token, and the pod is gone", func(t *testing.T) {
		w.setPods()
		_, err := w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
		w.checkRefusal(t, err, codes.PermissionDenied, "does not exist (any more)")
	})
}

// TestPanicsStayInTheirCall: a fault in one call is an internal error, and the
// server goes on.
func TestPanicsStayInTheirCall(t *testing.T) {
	w := newWorld(t, options{issuer: func(server.Issuer) server.Issuer { return panickingIssuer{} }})
	request, _ := csr(t)
	for range 2 {
		w.log.take(t)
		_, err := w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
		if st := status.Convert(err); st.Code() != codes.Internal || st.Message() != textInternal {
			t.Fatal(err)
		}
		records := w.log.take(t)
		if last := records[len(records)-1]; last["msg"] != "call panicked" || !strings.Contains(fmt.Sprint(last["panic"]), "index out of range") {
			t.Errorf("log %v", last)
		}
	}
}

type panickingIssuer struct{}

func (panickingIssuer) Issue(context.Context, ca.Request) (*ca.Issued, error) {
	panic("index out of range")
}

// TestTLSFloor: nothing below TLS 1.3.
func TestTLSFloor(t *testing.T) {
	w := newWorld(t, options{})
	_, err := tls.Dial("tcp", w.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})
	if err == nil {
		t.Fatal("TLS 1.2 was accepted")
	}
}
