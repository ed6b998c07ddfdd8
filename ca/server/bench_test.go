package server_test

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	istiov1 "istio.io/api/security/v1alpha1"

	"castellan.dev/ca/server"
	"castellan.dev/internal/jws/jwstest"
)

// BenchmarkCreateCertificate issues over TLS and gRPC with a new RS256 workload
// token each time, agent token and connection kept, ledger on. Client and server
// share the process: it is for profiles. The figure that counts, the server's CPU
// against the bare floor, is that of certs-test/bench.
func BenchmarkCreateCertificate(b *testing.B) {
	w := newWorld(b, options{limits: server.Limits{PodBurst: 1 << 30, TotalBurst: 1 << 30}})
	out, err := os.Create(filepath.Join(b.TempDir(), "log.json"))
	if err != nil {
		b.Fatal(err)
	}
	defer out.Close()
	w.log.divert(out)
	// Tokens are made before, so that signing them is not measured.
	tokens := make([]string, 2048)
	claims := w.issuer.PodClaims(time.Now(), orders(), "castellan.dev")
	for i := range tokens {
		tokens[i] = w.issuer.Sign(b, claims.With(jwstest.Claims{"jti": i}))
	}
	request, _ := csr(b)
	client := istiov1.NewIstioCertificateServiceClient(w.conn)
	var n atomic.Int64
	b.ReportAllocs()
	b.SetParallelism(8)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			token := tokens[int(n.Add(1))%len(tokens)]
			if _, err := client.CreateCertificate(as(b.Context(), token, w.agentToken, "clusterid", "Kubernetes"),
				&istiov1.IstioCertificateRequest{Csr: request, ValidityDuration: 3600}); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
