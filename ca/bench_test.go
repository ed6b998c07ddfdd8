package ca_test

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/url"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca"
	"castellan.dev/ca/ledger"
	"castellan.dev/ca/ledger/ledgertest"
)

// The callers that share a group commit; CPU is what counts (cpu-us/op), as
// waiting for the disk is not work.
const callers = 16

func cpuTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func measure(b *testing.B, one func() error) {
	b.Helper()
	b.SetParallelism(callers)
	b.ReportAllocs()
	b.ResetTimer()
	start := cpuTime()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := one(); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64((cpuTime()-start).Nanoseconds())/1000/float64(b.N), "cpu-us/op")
}

// BenchmarkFloor is what no CA can do without: parse and verify the CSR, and
// x509.CreateCertificate.
func BenchmarkFloor(b *testing.B) {
	csr := newCSR(b, nil, nil)
	key := newKey(b)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, SubjectKeyId: []byte{1}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		b.Fatal(err)
	}
	parent := parse(b, der)
	id := spiffeid.RequireFromString(ordersID).URL()
	measure(b, func() error {
		block, _ := pem.Decode(csr)
		req, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return err
		}
		if err := req.CheckSignature(); err != nil {
			return err
		}
		serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
		if err != nil {
			return err
		}
		_, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: serial, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			BasicConstraintsValid: true,
		}, parent, req.PublicKey, key)
		return err
	})
}

func benchIssue(b *testing.B, l ledger.Ledger) {
	a, err := ca.Open(b.Context(), ca.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"), DataDir: b.TempDir(), Ledger: l})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { a.Close() })
	r := ca.Request{CSR: newCSR(b, nil, nil), Workload: workload(b, ordersID), PodUID: "0b5cbd4e-4b62-4d4c-9a9e-3f7b7b1b0a11", Node: "node-1", Cluster: "Kubernetes", Attestor: "https://issuer.example"}
	measure(b, func() error {
		_, err := a.Issuer().Issue(context.Background(), r)
		return err
	})
}

func BenchmarkIssueMemory(b *testing.B) { benchIssue(b, &ledgertest.Memory{}) }

func BenchmarkIssue(b *testing.B) {
	l, err := ledger.Open(b.Context(), ledger.Config{Path: filepath.Join(b.TempDir(), "ledger.db")})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	benchIssue(b, l)
}
