package cli_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// workloadAPI serves what it was last given, on a socket.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	socket string

	mu      sync.Mutex
	answer  *workload.X509SVIDResponse
	refusal error
	changed chan struct{}
}

func newWorkloadAPI(t testing.TB) *workloadAPI {
	t.Helper()
	w := &workloadAPI{
		socket:  filepath.Join(t.TempDir(), "s"),
		refusal: status.Error(codes.PermissionDenied, "no identity issued"), changed: make(chan struct{}),
	}
	l, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, w)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return w
}

// give makes the certificates what the workload holds, the first as its default.
func (w *workloadAPI) give(t testing.TB, root *tlsconftest.CA, certs ...*tls.Certificate) {
	t.Helper()
	answer := &workload.X509SVIDResponse{}
	for _, c := range certs {
		key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		svid := &workload.X509SVID{SpiffeId: c.Leaf.URIs[0].String(), X509SvidKey: key, Bundle: root.Cert.Raw}
		for _, der := range c.Certificate {
			svid.X509Svid = append(svid.X509Svid, der...)
		}
		answer.Svids = append(answer.Svids, svid)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer, w.refusal = answer, nil
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if md, _ := metadata.FromIncomingContext(stream.Context()); len(md.Get("workload.spiffe.io")) != 1 {
		return status.Error(codes.InvalidArgument, "security header missing")
	}
	for {
		w.mu.Lock()
		answer, refusal, changed := w.answer, w.refusal, w.changed
		w.mu.Unlock()
		if refusal != nil {
			return refusal
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}
