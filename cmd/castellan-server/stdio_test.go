package main

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/run"
)

// TestStdio: the operator's services answer over standard input and output.
func TestStdio(t *testing.T) {
	s := newSite(t)
	stop, _ := s.start()
	ctx, cancel := context.WithCancel(t.Context())
	near, far := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- run.AdminSocket(ctx, s.path("data/admin.sock"), far, far) }()
	conn, err := grpc.NewClient("passthrough:stdio", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return near, nil }))
	if err != nil {
		t.Fatal(err)
	}
	st, err := castellanv1.NewAuthorityAdminClient(conn).Status(t.Context(), &castellanv1.AuthorityStatusRequest{})
	if err != nil || st.GetTrustDomain() != "cluster.local" {
		t.Fatal(st, err)
	}
	conn.Close()
	cancel()
	far.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestStdioRefuses(t *testing.T) {
	s := newSite(t)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"admin-stdio"}, "usage: castellan-server admin-stdio -config FILE"},
		{[]string{"admin-stdio", "-config", s.path("none.yaml")}, "none.yaml"},
		{[]string{"admin-stdio", "-config", s.path("server.yaml")}, "admin socket: "},
	} {
		if err := dispatch(t.Context(), tt.args, io.Discard); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v", tt.args, err)
		}
	}
}
