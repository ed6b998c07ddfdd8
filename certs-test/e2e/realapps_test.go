package e2e_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// The applications that stand behind the proxies. They know nothing of the mesh.

// grpcApp is gRPC's own interoperability service, as far as it is asked for here.
type grpcApp struct {
	grpc_testing.UnimplementedTestServiceServer
	// expired counts calls whose deadline arrived here and ended here.
	expired atomic.Int64
}

func newGRPCApp(t *testing.T) (*grpcApp, string) {
	t.Helper()
	l := listenLocal(t)
	app := &grpcApp{}
	s := grpc.NewServer(grpc.MaxRecvMsgSize(16 << 20))
	grpc_testing.RegisterTestServiceServer(s, app)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return app, l.Addr().String()
}

func listenLocal(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func payload(n int32) *grpc_testing.Payload {
	return &grpc_testing.Payload{Body: make([]byte, n)}
}

// EmptyCall answers when the caller's time is up.
func (a *grpcApp) EmptyCall(ctx context.Context, _ *grpc_testing.Empty) (*grpc_testing.Empty, error) {
	_, bounded := ctx.Deadline()
	<-ctx.Done()
	if bounded {
		a.expired.Add(1)
	}
	return nil, status.FromContextError(ctx.Err()).Err()
}

// UnaryCall answers with as many bytes as asked for; what came in x-echo goes
// back as header and as trailer.
func (a *grpcApp) UnaryCall(ctx context.Context, r *grpc_testing.SimpleRequest) (*grpc_testing.SimpleResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	_ = grpc.SetHeader(ctx, metadata.MD{"x-header": md["x-echo"]})
	_ = grpc.SetTrailer(ctx, metadata.MD{"x-trailer": md["x-echo"], "x-blob-bin": md["x-blob-bin"]})
	if s := r.GetResponseStatus(); s != nil {
		return nil, status.Error(codes.Code(s.GetCode()), s.GetMessage())
	}
	return &grpc_testing.SimpleResponse{Payload: payload(r.GetResponseSize()), Username: md.Get("x-forwarded-client-cert")[0]}, nil
}

func (a *grpcApp) StreamingOutputCall(r *grpc_testing.StreamingOutputCallRequest, s grpc.ServerStreamingServer[grpc_testing.StreamingOutputCallResponse]) error {
	for _, p := range r.GetResponseParameters() {
		if err := s.Send(&grpc_testing.StreamingOutputCallResponse{Payload: payload(p.GetSize())}); err != nil {
			return err
		}
	}
	s.SetTrailer(metadata.Pairs("x-trailer", "output"))
	return nil
}

func (a *grpcApp) StreamingInputCall(s grpc.ClientStreamingServer[grpc_testing.StreamingInputCallRequest, grpc_testing.StreamingInputCallResponse]) error {
	var sum int32
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return s.SendAndClose(&grpc_testing.StreamingInputCallResponse{AggregatedPayloadSize: sum})
		}
		if err != nil {
			return err
		}
		sum += int32(len(r.GetPayload().GetBody()))
	}
}

// FullDuplexCall answers each message with one of the same size.
func (a *grpcApp) FullDuplexCall(s grpc.BidiStreamingServer[grpc_testing.StreamingOutputCallRequest, grpc_testing.StreamingOutputCallResponse]) error {
	s.SetTrailer(metadata.Pairs("x-trailer", "duplex"))
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

// HalfDuplexCall ends after the first message, though the caller would go on.
func (a *grpcApp) HalfDuplexCall(s grpc.BidiStreamingServer[grpc_testing.StreamingOutputCallRequest, grpc_testing.StreamingOutputCallResponse]) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	s.SetTrailer(metadata.Pairs("x-trailer", "early"))
	return status.Error(codes.Aborted, "enough")
}

// httpApp is an HTTP/1.1 application.
type httpApp struct {
	addr string
	// ticks: one event of the stream for each; an empty one ends it.
	ticks chan string
	// arrived and release hold requests to /slow in flight.
	arrived, release chan struct{}
	bodyRead         atomic.Int64
}

func newHTTPApp(t *testing.T) *httpApp {
	t.Helper()
	l := listenLocal(t)
	a := &httpApp{addr: l.Addr().String(), ticks: make(chan string), arrived: make(chan struct{}, 16), release: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", a.echo)
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(seen{r.Header, r.URL.RequestURI(), r.Host})
	})
	mux.HandleFunc("/events", a.events)
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		a.arrived <- struct{}{}
		select {
		case <-a.release:
			_, _ = io.WriteString(w, "finished")
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/no-body-please", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusExpectationFailed) })
	mux.Handle("/ws", websocket.Handler(echoMessages))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return a
}

func echoMessages(ws *websocket.Conn) {
	for {
		var message string
		if websocket.Message.Receive(ws, &message) != nil || websocket.Message.Send(ws, message) != nil {
			return
		}
	}
}

// seen is what the application was given.
type seen struct {
	Header http.Header
	URI    string
	Host   string
}

// echo sends the body back, with its hash and the request's trailer in trailers.
func (a *httpApp) echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Trailer", "X-Sum, X-Got")
	w.Header().Set("X-Framing", framing(r))
	body, err := io.ReadAll(r.Body)
	a.bodyRead.Add(int64(len(body)))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	// In pieces, so that the answer is chunked.
	for rest := body; len(rest) > 0; {
		n := min(len(rest), 10_000)
		_, _ = w.Write(rest[:n])
		w.(http.Flusher).Flush()
		rest = rest[n:]
	}
	w.Header().Set("X-Sum", sum(body))
	w.Header().Set("X-Got", r.Trailer.Get("X-Sent"))
}

func framing(r *http.Request) string {
	if r.ContentLength >= 0 {
		return "length"
	}
	return "chunked"
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func (a *httpApp) events(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.(http.Flusher).Flush()
	for {
		select {
		case tick := <-a.ticks:
			if tick == "" {
				return
			}
			_, _ = io.WriteString(w, "data: "+tick+"\n\n")
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// tcpApp echoes; with a greeting it speaks first.
func newTCPApp(t *testing.T, greeting string) string {
	t.Helper()
	l := listenLocal(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				_, _ = io.WriteString(c, greeting)
				_, _ = io.Copy(c, c)
				_ = c.(*net.TCPConn).CloseWrite()
			})
		}
	}()
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String()
}
