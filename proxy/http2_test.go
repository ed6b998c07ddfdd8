package proxy_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// newGRPCApp echoes messages both ways, and fails when told to.
func newGRPCApp(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		md, _ := metadata.FromIncomingContext(stream.Context())
		_ = stream.SetHeader(metadata.Pairs("x-saw-client-cert", strings.Join(md.Get("x-forwarded-client-cert"), ",")))
		stream.SetTrailer(metadata.Pairs("x-trailer", "kept"))
		for {
			var m wrapperspb.StringValue
			if err := stream.RecvMsg(&m); err != nil {
				if errors.Is(err, io.EOF) {
					return nil
				}
				return err
			}
			if m.Value == "fail" {
				return status.Error(codes.FailedPrecondition, "told to")
			}
			if err := stream.SendMsg(&m); err != nil {
				return err
			}
		}
	}))
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() { s.Stop(); serving.Wait() })
	return l.Addr().String()
}

func TestGRPCThroughBothProxies(t *testing.T) {
	for _, protocol := range []string{"grpc", "http"} {
		t.Run("declared "+protocol, func(t *testing.T) {
			p := newPair(t, protocol, newGRPCApp(t))
			conn, err := grpc.NewClient(p.frontend.outbound[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/test.Echo/Stream")
			if err != nil {
				t.Fatal(err)
			}
			for i := range 20 {
				want := fmt.Sprintf("message %d", i)
				if err := stream.SendMsg(wrapperspb.String(want)); err != nil {
					t.Fatal(err)
				}
				var got wrapperspb.StringValue
				if err := stream.RecvMsg(&got); err != nil || got.Value != want {
					t.Fatalf("%q, %v", got.Value, err)
				}
			}
			header, err := stream.Header()
			if got := header.Get("x-saw-client-cert"); err != nil || len(got) != 1 || !strings.HasSuffix(got[0], "URI="+frontend) {
				t.Fatalf("%q, %v", got, err)
			}
			if err := stream.SendMsg(wrapperspb.String("fail")); err != nil {
				t.Fatal(err)
			}
			err = stream.RecvMsg(&wrapperspb.StringValue{})
			if status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "told to" {
				t.Fatalf("status %v", err)
			}
			if got := stream.Trailer().Get("x-trailer"); len(got) != 1 || got[0] != "kept" {
				t.Fatalf("trailer %q", got)
			}
			p.orders.logged(`"protocol":"HTTP/2"`, `"path":"/test.Echo/Stream"`, `"grpcStatus":"9"`)
		})
	}
}

// h2Client is one HTTP/2 connection as cert.
func h2Client(t testing.TB, cert *tls.Certificate, addr string) *http.ClientConn {
	t.Helper()
	var protocols http.Protocols
	protocols.SetHTTP2(true)
	transport := &http.Transport{TLSClientConfig: clientTLS(cert, "h2"), Protocols: &protocols}
	cc, err := transport.NewClientConn(t.Context(), "https", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

func h2Get(t testing.TB, cc *http.ClientConn) (int, error) {
	t.Helper()
	req, _ := http.NewRequest("GET", "https://orders/x", nil)
	resp, err := cc.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

func TestHTTP2Inbound(t *testing.T) {
	r, ca := mesh(t, strict+frontendMayGet)
	cc := h2Client(t, ca.Leaf(t, frontend), r.inbound)
	if status, err := h2Get(t, cc); err != nil || status != 200 {
		t.Fatalf("%d, %v", status, err)
	}
	r.agent.Publish(strict + strings.Replace(frontendMayGet, "sa/frontend", "sa/payments", 1))
	r.agent.Settled()
	if status, err := h2Get(t, cc); err != nil || status != 403 {
		t.Fatalf("%d, %v", status, err)
	}
	r.logged(`"protocol":"HTTP/2"`, `"status":403`)
}

// A peer whose certificate expires: HTTP/2 gets GOAWAY.
func TestPeerExpirySendsGoAway(t *testing.T) {
	r, ca := mesh(t, strict)
	cc := h2Client(t, ca.Leaf(t, frontend, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(2 * time.Second).Truncate(time.Second) }), r.inbound)
	if status, err := h2Get(t, cc); err != nil || status != 200 {
		t.Fatalf("%d, %v", status, err)
	}
	eventually(t, "GOAWAY", func() bool { return cc.Available() == 0 })
}

func TestDrainSendsGoAway(t *testing.T) {
	r, ca := mesh(t, strict)
	cc := h2Client(t, ca.Leaf(t, frontend), r.inbound)
	if status, err := h2Get(t, cc); err != nil || status != 200 {
		t.Fatalf("%d, %v", status, err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "GOAWAY", func() bool { return cc.Available() == 0 })
}
