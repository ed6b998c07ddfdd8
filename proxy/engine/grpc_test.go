package engine_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"castellan.dev/proxy/engine"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// echoService answers every message of a bidirectional stream with itself, and
// ends with a trailer and, if asked, an error.
var echoService = grpc.ServiceDesc{
	ServiceName: "test.Echo",
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{StreamName: "Chat", ServerStreams: true, ClientStreams: true,
		Handler: func(_ any, stream grpc.ServerStream) error {
			md, _ := metadata.FromIncomingContext(stream.Context())
			stream.SetTrailer(metadata.Pairs("x-sum", "t", "x-bin", "\x00\x01"))
			if len(md.Get("fail-at-once")) > 0 {
				return status.Error(codes.NotFound, "no such thing") // a trailers-only response
			}
			stream.SendHeader(metadata.Pairs("x-head", "h"))
			for {
				var m wrapperspb.BytesValue
				if err := stream.RecvMsg(&m); errors.Is(err, io.EOF) {
					if len(md.Get("fail")) > 0 {
						return status.Error(codes.Aborted, "in the end")
					}
					return nil
				} else if err != nil {
					return err
				}
				if err := stream.SendMsg(&m); err != nil {
					return err
				}
			}
		}}},
}

func grpcFront(t *testing.T, cfg engine.Config) (*front, *grpc.ClientConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	server.RegisterService(&echoService, nil)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	s := &session{addr: l.Addr().String()}
	s.begin = func(r *engine.Request) engine.Verdict {
		if len(r.Values("deny")) > 0 {
			return engine.Verdict{Status: 403}
		}
		return engine.Verdict{Upstream: engine.Upstream{Key: s.addr, H2: true}}
	}
	f := start(t, cfg, s, true)
	cc, err := grpc.NewClient(f.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return f, cc
}

func chat(t *testing.T, cc *grpc.ClientConn, md ...string) grpc.ClientStream {
	t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), md...), 20*time.Second)
	t.Cleanup(cancel)
	stream, err := cc.NewStream(ctx, &echoService.Streams[0], "/test.Echo/Chat")
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func TestGRPC(t *testing.T) {
	f, cc := grpcFront(t, engine.Config{})
	t.Run("bidirectional", func(t *testing.T) {
		stream := chat(t, cc)
		for i := range 50 {
			if err := stream.SendMsg(wrapperspb.Bytes(make([]byte, i*1000))); err != nil {
				t.Fatal(err)
			}
			var m wrapperspb.BytesValue
			if err := stream.RecvMsg(&m); err != nil || len(m.Value) != i*1000 {
				t.Fatalf("message %d: %d bytes, %v", i, len(m.Value), err)
			}
		}
		stream.CloseSend()
		if err := stream.RecvMsg(&wrapperspb.BytesValue{}); !errors.Is(err, io.EOF) {
			t.Fatalf("end: %v", err)
		}
		head, _ := stream.Header()
		if tr := stream.Trailer(); head.Get("x-head")[0] != "h" || tr.Get("x-sum")[0] != "t" || tr.Get("x-bin")[0] != "\x00\x01" {
			t.Errorf("head %v, trailer %v", head, tr)
		}
	})
	for md, want := range map[string]codes.Code{"fail": codes.Aborted, "fail-at-once": codes.NotFound, "deny": codes.PermissionDenied} {
		t.Run(md, func(t *testing.T) {
			stream := chat(t, cc, md, "1")
			stream.CloseSend()
			if err := stream.RecvMsg(&wrapperspb.BytesValue{}); status.Code(err) != want {
				t.Errorf("got %v, want %v", err, want)
			}
		})
	}
	t.Run("many streams share one upstream connection", func(t *testing.T) {
		var streams []grpc.ClientStream
		for range 40 {
			streams = append(streams, chat(t, cc))
		}
		for _, s := range streams {
			s.SendMsg(wrapperspb.Bytes([]byte("x")))
			if err := s.RecvMsg(&wrapperspb.BytesValue{}); err != nil {
				t.Fatal(err)
			}
		}
		if f.session.dials != 1 {
			t.Errorf("%d dials", f.session.dials)
		}
		for _, s := range streams {
			s.CloseSend()
			if err := s.RecvMsg(&wrapperspb.BytesValue{}); !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		}
	})
	found := map[string]bool{}
	for _, o := range f.session.outcomes(t, 44) {
		found[fmt.Sprintf("%d/%s", o.Status, o.GRPCStatus)] = true
	}
	for _, want := range []string{"200/0", "200/10", "200/5", "403/"} {
		if !found[want] {
			t.Errorf("no outcome %s among %v", want, found)
		}
	}
}

func TestGRPCCancel(t *testing.T) {
	f, cc := grpcFront(t, engine.Config{})
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := cc.NewStream(ctx, &echoService.Streams[0], "/test.Echo/Chat")
	if err != nil {
		t.Fatal(err)
	}
	stream.SendMsg(wrapperspb.Bytes([]byte("x")))
	if err := stream.RecvMsg(&wrapperspb.BytesValue{}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if o := f.session.outcomes(t, 1)[0]; o.Reason != engine.ReasonClientGone {
		t.Errorf("outcome %+v", o)
	}
}

// TestGRPCIdle: a stream on which nothing moves ends; one that moves does not.
func TestGRPCIdle(t *testing.T) {
	f, cc := grpcFront(t, engine.Config{StreamIdleTimeout: 200 * time.Millisecond})
	stream := chat(t, cc)
	for range 6 {
		time.Sleep(70 * time.Millisecond) // not a wait: this is the slow client
		stream.SendMsg(wrapperspb.Bytes([]byte("x")))
		if err := stream.RecvMsg(&wrapperspb.BytesValue{}); err != nil {
			t.Fatalf("a live stream: %v", err)
		}
	}
	if err := stream.RecvMsg(&wrapperspb.BytesValue{}); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("an idle stream: %v", err)
	}
	f.session.outcomes(t, 1)
}
