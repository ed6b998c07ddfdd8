package server_test

import (
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"

	"castellan.dev/ca/server"
)

type refuseAll struct{}

func (refuseAll) Peer(tls.ConnectionState) (spiffeid.ID, error) {
	return spiffeid.ID{}, errors.New("nobody")
}

// TestPingsOfZtunnel: a client that pings every 30 s on an open stream is not cut
// off, as it would be by gRPC's default of one ping in 5 minutes.
func TestPingsOfZtunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newEC(t, elliptic.P256())
		template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		gate, err := server.NewGate(server.GateConfig{
			Verifier: refuseAll{}, TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
			Open: []string{healthv1.Health_Watch_FullMethodName},
		})
		if err != nil {
			t.Fatal(err)
		}
		g := server.NewFront(&tls.Config{NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13,
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, gate)
		healthv1.RegisterHealthServer(g, health.NewServer())
		l := bufconn.Listen(1 << 20)
		done := make(chan struct{})
		go func() { defer close(done); _ = g.Serve(l) }()

		// The client library pings no oftener than every 10 s; 16 s is near our bound.
		for _, every := range []time.Duration{30 * time.Second, 16 * time.Second} {
			dials := 0
			conn, err := grpc.NewClient("passthrough:///localhost",
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { dials++; return l.DialContext(ctx) }),
				grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})),
				grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: every, Timeout: 10 * time.Second, PermitWithoutStream: true}))
			if err != nil {
				t.Fatal(err)
			}
			stream, err := healthv1.NewHealthClient(conn).Watch(t.Context(), &healthv1.HealthCheckRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { _, err := stream.Recv(); ended <- err }()
			time.Sleep(20 * time.Minute)
			select {
			case err := <-ended:
				t.Errorf("pinging every %v: cut off with %v", every, err)
			default:
			}
			if dials != 1 {
				t.Errorf("pinging every %v: %d connections", every, dials)
			}
			conn.Close()
			<-ended
		}
		g.Stop()
		<-done
	})
}
