package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// get asks once and reads the whole answer.
func get(url string, header ...string) (int, string, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := plainClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

const frontend, intruder = "shop/frontend", "guest/intruder"

// TestApplications: real applications of every protocol, through both proxies and
// mutual TLS between them, with 10-second leaves under all of it.
func TestApplications(t *testing.T) {
	a := startAppMesh(t, "--svid-ttl", "10s")
	rotated := a.openLive(t)
	t.Run("protocols", func(t *testing.T) {
		for name, f := range map[string]func(*testing.T){
			"grpc":                       func(t *testing.T) { a.testGRPC(t, onGRPC) },
			"grpc, undeclared port":      func(t *testing.T) { a.testGRPC(t, onAnyGRPC) },
			"chunked bodies, trailers":   a.testBodies,
			"100-continue":               a.testContinue,
			"server-sent events":         a.testEvents,
			"websocket":                  a.testWebSocket,
			"tcp":                        func(t *testing.T) { a.testTCP(t, onTCP, "") },
			"tcp, server first":          func(t *testing.T) { a.testTCP(t, onGreeting, a.greeting) },
			"tcp, undeclared port":       func(t *testing.T) { a.testTCP(t, onAnyTCP, "") },
			"tcp, undeclared, greeting":  func(t *testing.T) { a.testTCP(t, onAnyGreeting, a.greeting) },
			"http rules on tcp":          a.testHTTPRulesOnTCP,
			"what the application sees":  a.testForwarded,
			"end users' tokens":          a.testTokens,
			"a policy closes what lives": a.testPolicyCloses,
		} {
			t.Run(name, func(t *testing.T) { t.Parallel(); f(t) })
		}
	})
	t.Run("rotation touches nothing that lives", rotated)
	t.Run("drain finishes what is in flight", a.testDrain)
}

func (a *appMesh) dialGRPC(t *testing.T, caller string, port int) grpc_testing.TestServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+a.outbounds[caller][port], grpc.WithNoProxy(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return grpc_testing.NewTestServiceClient(conn)
}

func (a *appMesh) testGRPC(t *testing.T, port int) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client := a.dialGRPC(t, frontend, port)
	var header, trailer metadata.MD

	// Unary, with metadata both ways and an ID that only the proxy can have set.
	out := metadata.AppendToOutgoingContext(ctx, "x-echo", "hello", "x-blob-bin", "\x00\x01\xff", "x-forwarded-client-cert", "URI=spiffe://forged")
	resp, err := client.UnaryCall(out, &grpc_testing.SimpleRequest{ResponseSize: 10}, grpc.Header(&header), grpc.Trailer(&trailer))
	if err != nil || len(resp.GetPayload().GetBody()) != 10 {
		t.Fatalf("%v %v", resp, err)
	}
	if header.Get("x-header")[0] != "hello" || trailer.Get("x-trailer")[0] != "hello" || trailer.Get("x-blob-bin")[0] != "\x00\x01\xff" {
		t.Errorf("header %v trailer %v", header, trailer)
	}
	if !strings.HasSuffix(resp.GetUsername(), ";URI="+frontendID.String()) || strings.Contains(resp.GetUsername(), "forged") {
		t.Errorf("x-forwarded-client-cert %q", resp.GetUsername())
	}

	// 6 MiB up and 5 MiB down, past every window and buffer.
	resp, err = client.UnaryCall(ctx, &grpc_testing.SimpleRequest{Payload: payload(6 << 20), ResponseSize: 5 << 20})
	if err != nil || len(resp.GetPayload().GetBody()) != 5<<20 {
		t.Fatalf("large: %v", err)
	}

	// A status of the application's own arrives as it is.
	_, err = client.UnaryCall(out, &grpc_testing.SimpleRequest{ResponseStatus: &grpc_testing.EchoStatus{Code: int32(codes.DataLoss), Message: "fünf % lost"}}, grpc.Trailer(&trailer))
	if s := status.Convert(err); s.Code() != codes.DataLoss || s.Message() != "fünf % lost" {
		t.Errorf("status %v", s)
	}

	// The deadline travels to the application, which sees its end.
	before := a.grpc.expired.Load()
	short, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	_, err = client.EmptyCall(short, &grpc_testing.Empty{})
	stop()
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("deadline: %v", err)
	}
	eventually(t, "the application saw the deadline", func() error {
		if a.grpc.expired.Load() == before {
			return errors.New("not yet")
		}
		return nil
	})
	a.testGRPCStreams(ctx, t, client)

	_, err = a.dialGRPC(t, intruder, port).UnaryCall(ctx, &grpc_testing.SimpleRequest{})
	if s := status.Convert(err); s.Code() != codes.PermissionDenied || strings.Contains(s.Message(), "guests-call-nothing") {
		t.Errorf("the intruder: %v", err)
	}
}

func (a *appMesh) testGRPCStreams(ctx context.Context, t *testing.T, client grpc_testing.TestServiceClient) {
	down, err := client.StreamingOutputCall(ctx, &grpc_testing.StreamingOutputCallRequest{ResponseParameters: []*grpc_testing.ResponseParameters{{Size: 1}, {Size: 200_000}, {Size: 0}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{1, 200_000, 0} {
		r, err := down.Recv()
		if err != nil || len(r.GetPayload().GetBody()) != want {
			t.Fatalf("server stream: %v, want %d bytes", err, want)
		}
	}
	if _, err := down.Recv(); !errors.Is(err, io.EOF) || down.Trailer().Get("x-trailer")[0] != "output" {
		t.Errorf("server stream ended with %v, trailer %v", err, down.Trailer())
	}

	up, err := client.StreamingInputCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int32{10, 100_000, 0, 5} {
		if err := up.Send(&grpc_testing.StreamingInputCallRequest{Payload: payload(n)}); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := up.CloseAndRecv(); err != nil || r.GetAggregatedPayloadSize() != 100_015 {
		t.Errorf("client stream: %v %v", r, err)
	}

	both, err := client.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int32{1, 70_000, 2} {
		if err := pingGRPC(both, n); err != nil {
			t.Fatal(err)
		}
	}
	if err := both.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := both.Recv(); !errors.Is(err, io.EOF) || both.Trailer().Get("x-trailer")[0] != "duplex" {
		t.Errorf("bidirectional stream ended with %v, trailer %v", err, both.Trailer())
	}

	// The server ends it while our side is open: its status arrives at once.
	early, err := client.HalfDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := early.Send(&grpc_testing.StreamingOutputCallRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := early.Recv(); status.Code(err) != codes.Aborted || early.Trailer().Get("x-trailer")[0] != "early" {
		t.Errorf("ended early with %v, trailer %v", err, early.Trailer())
	}
}

type duplex = grpc.BidiStreamingClient[grpc_testing.StreamingOutputCallRequest, grpc_testing.StreamingOutputCallResponse]

// pingGRPC sends one message and wants one of the same size back.
func pingGRPC(s duplex, size int32) error {
	if err := s.Send(&grpc_testing.StreamingOutputCallRequest{Payload: payload(size)}); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	r, err := s.Recv()
	if err != nil {
		return err
	}
	if n := len(r.GetPayload().GetBody()); n != int(size) {
		return fmt.Errorf("%d bytes, want %d", n, size)
	}
	return nil
}

// testBodies: 1 MiB both ways, chunked and with Content-Length, trailers in both
// directions, over HTTP/1.1 and over HTTP/2 without TLS.
func (a *appMesh) testBodies(t *testing.T) {
	h2c := &http.Transport{Protocols: &http.Protocols{}}
	h2c.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(h2c.CloseIdleConnections)
	body := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for name, client := range map[string]*http.Client{"HTTP/1.1": plainClient, "HTTP/2": {Transport: h2c, Timeout: patience}} {
		for _, framing := range []string{"length", "chunked"} {
			req, err := http.NewRequest(http.MethodPost, a.url(frontend, onHTTP, "/echo"), bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			if framing == "chunked" {
				req.ContentLength = -1
				req.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body[:3]), bytes.NewReader(body[3:])))
				req.Trailer = http.Header{"X-Sent": {"after the body"}}
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatalf("%s %s: %v", name, framing, err)
			}
			got, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != 200 || !bytes.Equal(got, body) {
				t.Fatalf("%s %s: %s, %d bytes, %v", name, framing, resp.Status, len(got), err)
			}
			if resp.Header.Get("X-Framing") != framing {
				t.Errorf("%s %s: the application got %s", name, framing, resp.Header.Get("X-Framing"))
			}
			if resp.Trailer.Get("X-Sum") != sum(body) {
				t.Errorf("%s %s: trailers %v", name, framing, resp.Trailer)
			}
			if want := req.Trailer.Get("X-Sent"); resp.Trailer.Get("X-Got") != want {
				t.Errorf("%s %s: the application got the trailer %q, want %q", name, framing, resp.Trailer.Get("X-Got"), want)
			}
		}
	}
}

// testContinue: the body is sent when the application asks for it, and not to one
// that does not, nor past a refusal.
func (a *appMesh) testContinue(t *testing.T) {
	for _, c := range []struct {
		caller, path string
		asked        bool
		status       int
	}{
		{frontend, "/echo", true, 200},
		{frontend, "/no-body-please", false, 417},
		{intruder, "/echo", false, 403},
	} {
		conn, err := net.Dial("tcp", a.outbounds[c.caller][onHTTP])
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: apps\r\nExpect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", c.path)
		r := bufio.NewReader(conn)
		asked := false
		resp, err := http.ReadResponse(r, nil)
		if err == nil && resp.StatusCode == http.StatusContinue {
			asked = true
			_, _ = io.WriteString(conn, "hello")
			resp, err = http.ReadResponse(r, nil)
		}
		if err != nil {
			t.Fatalf("%s %s: %v", c.caller, c.path, err)
		}
		body, _ := io.ReadAll(resp.Body)
		if asked != c.asked || resp.StatusCode != c.status || c.asked && string(body) != "hello" {
			t.Errorf("%s %s: asked %v, %s %q", c.caller, c.path, asked, resp.Status, body)
		}
	}
}

// testEvents: each event arrives before the next one is made.
func (a *appMesh) testEvents(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url(frontend, onHTTP, "/events"), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for i := range 5 {
		select {
		case a.http.ticks <- fmt.Sprint(i):
		case <-ctx.Done():
			t.Fatal("the application is not there")
		}
		if !lines.Scan() || lines.Text() != fmt.Sprintf("data: %d", i) || !lines.Scan() {
			t.Fatalf("event %d: %q %v", i, lines.Text(), lines.Err())
		}
	}
	a.http.ticks <- ""
	if lines.Scan() || lines.Err() != nil {
		t.Errorf("after the end: %q %v", lines.Text(), lines.Err())
	}
	if code, _, err := a.get(intruder, onHTTP, "/events"); err != nil || code != 403 {
		t.Errorf("the intruder: %d %v", code, err)
	}
}

func (a *appMesh) dialWebSocket(caller string, port int) (*websocket.Conn, error) {
	cfg, err := websocket.NewConfig("ws://"+a.outbounds[caller][port]+"/ws", "http://apps/")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return cfg.DialContext(ctx)
}

func pingWebSocket(ws *websocket.Conn, message string) error {
	if err := ws.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if err := websocket.Message.Send(ws, message); err != nil {
		return err
	}
	var got string
	if err := websocket.Message.Receive(ws, &got); err != nil {
		return err
	}
	if got != message {
		return fmt.Errorf("%d bytes back, %d sent", len(got), len(message))
	}
	return nil
}

func (a *appMesh) testWebSocket(t *testing.T) {
	for _, port := range []int{onHTTP, onAnyHTTP} {
		ws, err := a.dialWebSocket(frontend, port)
		if err != nil {
			t.Fatal(err)
		}
		defer ws.Close()
		for _, message := range []string{"hello", strings.Repeat("long ", 40_000), ""} {
			if err := pingWebSocket(ws, message); err != nil {
				t.Fatal(err)
			}
		}
		if ws, err := a.dialWebSocket(intruder, port); err == nil {
			ws.Close()
			t.Errorf("port %d: the intruder has a WebSocket", port)
		}
	}
}

// dialTCP connects through a caller's proxy.
func (a *appMesh) dialTCP(t *testing.T, caller string, port int) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", a.outbounds[caller][port])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * patience))
	return c.(*net.TCPConn)
}

func pingTCP(c net.Conn, message string) error {
	if _, err := io.WriteString(c, message); err != nil {
		return err
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != message {
		return fmt.Errorf("got %q", got)
	}
	return nil
}

// refusedTCP asserts that nothing comes back but the end.
func refusedTCP(t *testing.T, c net.Conn, say string) {
	t.Helper()
	_, _ = io.WriteString(c, say) // it may be closed already
	got, err := io.ReadAll(c)
	if len(got) > 0 {
		t.Errorf("a refused connection answered %q", got)
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("a refused connection stays open")
	}
}

func (a *appMesh) testTCP(t *testing.T, port int, greeting string) {
	c, foreign := a.dialTCP(t, frontend, port), a.dialTCP(t, intruder, port)
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != greeting {
		t.Fatalf("greeting %q %v", got, err)
	}
	for _, message := range []string{"\x00binary\xff", "GET is not always HTTP", strings.Repeat("x", 10_000)} {
		if err := pingTCP(c, message); err != nil {
			t.Fatal(err)
		}
	}
	// The end of one direction goes through, and the other stays open for the rest.
	if _, err := io.WriteString(c, "last words"); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(c); err != nil || string(rest) != "last words" {
		t.Errorf("after our end: %q %v", rest, err)
	}
	say := "\x00hello"
	if greeting != "" {
		say = ""
	}
	refusedTCP(t, foreign, say)
}

// testHTTPRulesOnTCP: what cannot be evaluated on TCP does not allow (authz 19),
// and denies wider.
func (a *appMesh) testHTTPRulesOnTCP(t *testing.T) {
	refusedTCP(t, a.dialTCP(t, frontend, onTCPAllowHTTP), "hello")
	refusedTCP(t, a.dialTCP(t, frontend, onTCPAllowHTTP), "GET / HTTP/1.1\r\nHost: apps\r\n\r\n")
	refusedTCP(t, a.dialTCP(t, frontend, onTCPDenyHTTP), "hello")
	// An undeclared port: the rule about GET holds for HTTP and never for other bytes.
	if code, body, err := a.get(frontend, onAnyHTTP, "/headers"); err != nil || code != 200 {
		t.Errorf("GET: %d %q %v", code, body, err)
	}
	resp, err := plainClient.Post(a.url(frontend, onAnyHTTP, "/echo"), "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 403 {
		t.Errorf("POST: %s, want 403", resp.Status)
	}
	refusedTCP(t, a.dialTCP(t, frontend, onAnyHTTP), "\x00hello")
}
