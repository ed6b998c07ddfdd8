package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// maxAnswer bounds what is read of an answer.
const maxAnswer = 1 << 20

// caller makes calls.
type caller struct {
	started time.Time
	source  *source
	http1   *http.Client
	h2c     *http.Client

	live stream

	mu    sync.Mutex
	grpc  map[string]*grpc.ClientConn
	loads map[string]*load
	next  int
}

func newCaller(started time.Time, s *source) *caller {
	return &caller{
		started: started, source: s, http1: httpClient(false), h2c: httpClient(true),
		grpc: map[string]*grpc.ClientConn{}, loads: map[string]*load{},
	}
}

func httpClient(h2c bool) *http.Client {
	t := &http.Transport{MaxIdleConnsPerHost: 64}
	if h2c {
		t.Protocols = new(http.Protocols)
		t.Protocols.SetUnencryptedHTTP2(true)
	}
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func (c *caller) close() {
	c.live.close()
	c.http1.CloseIdleConnections()
	c.h2c.CloseIdleConnections()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.grpc {
		conn.Close()
	}
}

// call makes one call.
func (c *caller) call(ctx context.Context, call control.Call) (r control.Result) {
	timeout := 10 * time.Second
	if call.Timeout > 0 {
		timeout = time.Duration(call.Timeout) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	start := time.Now()
	err := c.dispatch(ctx, call, &r)
	r.Millis = float64(time.Since(start).Microseconds()) / 1000
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

func (c *caller) dispatch(ctx context.Context, call control.Call, r *control.Result) error {
	switch call.Kind {
	case "http":
		return web(ctx, pick(c.http1, call.Fresh, false), call, r)
	case "h2c":
		return web(ctx, pick(c.h2c, call.Fresh, true), call, r)
	case "spiffe":
		if c.source == nil {
			return errors.New("there is no socket")
		}
		client, err := c.source.client(ctx, call.Expect)
		if err != nil {
			return err
		}
		return web(ctx, client, call, r)
	case "grpc":
		return c.callGRPC(ctx, call, r)
	case "websocket":
		return callWebSocket(ctx, call, r)
	case "tcp":
		return callTCP(ctx, call, "", r)
	case "greeting":
		return callTCP(ctx, call, control.Greeted, r)
	case "nobody":
		return callNobody(ctx, call)
	case "stream":
		return c.live.say(ctx, call)
	}
	return fmt.Errorf("kind %q", call.Kind)
}

func pick(shared *http.Client, fresh, h2c bool) *http.Client {
	if !fresh {
		return shared
	}
	client := httpClient(h2c)
	if t := client.Transport.(*http.Transport); !h2c {
		t.DisableKeepAlives = true
	} else {
		t.IdleConnTimeout = time.Millisecond
	}
	return client
}

func web(ctx context.Context, client *http.Client, call control.Call, r *control.Result) error {
	method := call.Method
	if method == "" {
		method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(ctx, method, call.URL, strings.NewReader(call.Body))
	if err != nil {
		return err
	}
	for name, value := range call.Header {
		req.Header.Set(name, value)
		if strings.EqualFold(name, "host") {
			req.Host = value
		}
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	r.Status, r.Body, r.Header = resp.StatusCode, string(body), map[string]string{}
	for name, values := range resp.Header {
		r.Header[name] = values[0]
	}
	var seen control.Seen
	if json.Unmarshal(body, &seen) == nil && seen.Pod != "" {
		r.Seen, r.Body = &seen, ""
	}
	return err
}

func (c *caller) connection(target string) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if conn := c.grpc[target]; conn != nil {
		return conn, nil
	}
	conn, err := grpc.NewClient("passthrough:"+target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err == nil {
		c.grpc[target] = conn
	}
	return conn, err
}

// callGRPC makes a unary call and then, on the same connection, a stream of two messages.
func (c *caller) callGRPC(ctx context.Context, call control.Call, r *control.Result) (err error) {
	defer func() {
		r.Code = status.Code(err).String()
	}()
	var conn *grpc.ClientConn
	if call.Fresh {
		conn, err = grpc.NewClient("passthrough:"+call.URL, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
		if err == nil {
			defer conn.Close()
		}
	} else {
		conn, err = c.connection(call.URL)
	}
	if err != nil {
		return err
	}
	for name, value := range call.Header {
		ctx = metadata.AppendToOutgoingContext(ctx, name, value)
	}
	client := grpc_testing.NewTestServiceClient(conn)
	answer, err := client.UnaryCall(ctx, &grpc_testing.SimpleRequest{Payload: &grpc_testing.Payload{Body: []byte(call.Body)}})
	if err != nil {
		return err
	}
	if answer.GetUsername() != call.Body {
		return fmt.Errorf("the body came back as %q", answer.GetUsername())
	}
	r.Seen = new(control.Seen)
	if err := json.Unmarshal(answer.GetPayload().GetBody(), r.Seen); err != nil {
		return err
	}
	stream, err := client.FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	for _, message := range []string{"one", "two"} {
		if err := stream.Send(&grpc_testing.StreamingOutputCallRequest{Payload: &grpc_testing.Payload{Body: []byte(message)}}); err != nil {
			return err
		}
		back, err := stream.Recv()
		if err != nil {
			return err
		}
		if string(back.GetPayload().GetBody()) != message {
			return fmt.Errorf("%q came back as %q", message, back.GetPayload().GetBody())
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the stream ended with %w", err)
	}
	return nil
}

func callWebSocket(ctx context.Context, call control.Call, r *control.Result) error {
	cfg, err := websocket.NewConfig(call.URL, "http://test.invalid")
	if err != nil {
		return err
	}
	for name, value := range call.Header {
		cfg.Header.Set(name, value)
	}
	ws, err := cfg.DialContext(ctx)
	if err != nil {
		return err
	}
	defer ws.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = ws.SetDeadline(deadline)
	}
	for _, message := range []string{call.Body, "again"} {
		if err := websocket.Message.Send(ws, message); err != nil {
			return err
		}
		var back string
		if err := websocket.Message.Receive(ws, &back); err != nil {
			return err
		}
		if back != message {
			return fmt.Errorf("%q came back as %q", message, back)
		}
		r.Body += back
	}
	return nil
}

// callTCP hears the greeting, says the body, and hears it back until the other ends.
func callTCP(ctx context.Context, call control.Call, greeting string, r *control.Result) error {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", call.URL)
	if err != nil {
		return err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(deadline)
	}
	heard := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, heard); err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if string(heard) != greeting {
		return fmt.Errorf("greeting is %q", heard)
	}
	if _, err := io.WriteString(c, call.Body); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	var back bytes.Buffer
	if _, err := io.Copy(&back, io.LimitReader(c, maxAnswer)); err != nil {
		return err
	}
	r.Body = back.String()
	if r.Body != call.Body {
		return fmt.Errorf("%q came back as %q", call.Body, r.Body)
	}
	return nil
}

// callNobody wants TLS of whoever is there, without a certificate of its own, and hears
// what becomes of it. It says nothing: a server that ends the connection with something
// unread resets it, and its reason is lost.
func callNobody(ctx context.Context, call control.Call) error {
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // it is the other who is to refuse
	conn, err := d.DialContext(ctx, "tcp", call.URL)
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}
