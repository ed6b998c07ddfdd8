package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// answers says what it was asked. /status/NUMBER answers with that status, /ws is a
// WebSocket that echoes.
func answers(pod string) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/ws", websocket.Server{Handler: func(ws *websocket.Conn) { _, _ = io.Copy(ws, ws) }})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		seen := control.Seen{Pod: pod, Header: r.Header}
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 && len(r.TLS.PeerCertificates[0].URIs) > 0 {
			seen.Peer = r.TLS.PeerCertificates[0].URIs[0].String()
		}
		w.Header().Set("Content-Type", "application/json")
		if code, ok := strings.CutPrefix(r.URL.Path, "/status/"); ok {
			if n, err := strconv.Atoi(code); err == nil && n >= 200 && n < 600 {
				w.WriteHeader(n)
			}
		}
		_ = json.NewEncoder(w).Encode(seen)
	})
	return mux
}

// either passes gRPC to calls and all else to web.
func either(web http.Handler, calls http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			calls.ServeHTTP(w, r)
			return
		}
		web.ServeHTTP(w, r)
	})
}

type grpcApp struct {
	grpc_testing.UnimplementedTestServiceServer
	pod string
}

func grpcServer(pod string) *grpc.Server {
	s := grpc.NewServer()
	grpc_testing.RegisterTestServiceServer(s, &grpcApp{pod: pod})
	healthv1.RegisterHealthServer(s, health.NewServer())
	return s
}

// UnaryCall answers with what it was asked.
func (a *grpcApp) UnaryCall(ctx context.Context, r *grpc_testing.SimpleRequest) (*grpc_testing.SimpleResponse, error) {
	seen, err := json.Marshal(a.seen(ctx))
	if err != nil {
		return nil, err
	}
	return &grpc_testing.SimpleResponse{Payload: &grpc_testing.Payload{Body: seen}, Username: string(r.GetPayload().GetBody())}, nil
}

func (a *grpcApp) seen(ctx context.Context) control.Seen {
	md, _ := metadata.FromIncomingContext(ctx)
	header := http.Header{}
	for k, v := range md {
		for _, one := range v {
			header.Add(k, one)
		}
	}
	return control.Seen{Pod: a.pod, Header: header}
}

// FullDuplexCall answers each message with one of the same content.
func (a *grpcApp) FullDuplexCall(s grpc.BidiStreamingServer[grpc_testing.StreamingOutputCallRequest, grpc_testing.StreamingOutputCallResponse]) error {
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&grpc_testing.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
			return err
		}
	}
}

// echo says the greeting and then what it hears.
func echo(l net.Listener, greeting string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_, _ = io.WriteString(c, greeting)
			_, _ = io.Copy(c, c)
			_ = c.(*net.TCPConn).CloseWrite()
		}()
	}
}
