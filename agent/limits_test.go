package agent_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"castellan.dev/agent"
	"castellan.dev/agent/agenttest"
	"castellan.dev/sds"
)

const (
	fetchSecrets = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets"
	fetchBundles = "/SpiffeWorkloadAPI/FetchX509Bundles"
)

// hold begins a call on a connection of its own: a message is announced, a part
// of it sent, and never the rest. What the agent says of it comes on the channel.
func (n *node) hold(i int, method string, announced, sent uint32) <-chan string {
	n.t.Helper()
	transport := &http2.Transport{AllowHTTP: true, DialTLSContext: nil}
	conn, err := net.Dial("unix", n.cfg.Workloads[i].Socket)
	if err != nil {
		n.t.Fatal(err)
	}
	client, err := transport.NewClientConn(conn)
	if err != nil {
		n.t.Fatal(err)
	}
	body, feed := io.Pipe()
	req, err := http.NewRequestWithContext(n.t.Context(), http.MethodPost, "http://localhost"+method, body)
	if err != nil {
		n.t.Fatal(err)
	}
	for k, v := range map[string]string{"content-type": "application/grpc", "te": "trailers", "workload.spiffe.io": "true"} {
		req.Header.Set(k, v)
	}
	said, fed := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(fed)
		head := binary.BigEndian.AppendUint32([]byte{0}, announced)
		_, _ = feed.Write(append(head, make([]byte, sent)...)) // ends with the call
	}()
	go func() {
		res, err := client.RoundTrip(req)
		if err != nil {
			said <- err.Error()
			return
		}
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		said <- res.Header.Get("grpc-status") + res.Trailer.Get("grpc-status")
	}()
	n.t.Cleanup(func() {
		conn.Close()
		feed.Close()
		body.Close()
		<-fed
	})
	return said
}

// raw sends bytes as they are.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)   { return *(v.(*[]byte)), nil }
func (raw) Unmarshal(b []byte, v any) error { *(v.(*[]byte)) = bytes.Clone(b); return nil }
func (raw) Name() string                    { return "proto" }

func (n *node) send(method string, message []byte) error {
	var out []byte
	return n.dial(0).Invoke(withHeader(n.t.Context()), method, &message, &out, grpc.ForceCodec(raw{}))
}

// wait returns what is said within the time tests wait for anything.
func wait(t *testing.T, said <-chan string) string {
	t.Helper()
	select {
	case s := <-said:
		return s
	case <-time.After(20 * time.Second):
		t.Fatal("the call is held for good")
		return ""
	}
}

func code(c codes.Code) string { return fmt.Sprint(uint32(c)) }

func TestCallsThatNeverArrive(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account, "shop/frontend"), func(a *agent.Agent) { a.SetDeadlines(2*time.Second, 3*time.Second) })
	n.ready()
	t.Run("a message over the limit is refused by its announcement", func(t *testing.T) {
		for _, method := range []string{fetchSecrets, fetchBundles} {
			if got := wait(t, n.hold(0, method, agent.MaxMessage+1, 1)); got != code(codes.ResourceExhausted) {
				t.Errorf("%s: got status %s", method, got)
			}
		}
	})
	t.Run("unary calls are counted before their message is there, and end by themselves", func(t *testing.T) {
		var all []<-chan string
		for range agent.MaxUnary + 8 {
			all = append(all, n.hold(0, fetchSecrets, agent.MaxMessage, agent.MaxMessage/2))
		}
		said := map[string]int{}
		for _, c := range all {
			said[wait(t, c)]++
		}
		// A slow machine may see the first ones end before the last ones come.
		if said[code(codes.Unavailable)] == 0 || said[code(codes.DeadlineExceeded)] < agent.MaxUnary || len(said) != 2 {
			t.Errorf("got %v", said)
		}
		if n.metric("castellan_agent_refused_total", "calls") != float64(said[code(codes.Unavailable)]) {
			t.Error("refusals are not counted")
		}
	})
	t.Run("a stream's first message has a deadline", func(t *testing.T) {
		if got := wait(t, n.hold(0, fetchBundles, agent.MaxMessage, 100)); got != code(codes.Canceled) {
			t.Errorf("got status %s", got)
		}
	})
	t.Run("the places are free again", func(t *testing.T) {
		eventually(t, func() error {
			_, err := secretv3.NewSecretDiscoveryServiceClient(n.dial(0)).FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{sds.NameRoot}})
			return err
		})
	})
	t.Run("a stream lives past the deadlines, and other sockets are not touched", func(t *testing.T) {
		w := watch(t, n, 1)
		w.next(t)
		var held []<-chan string
		for range agent.MaxUnary {
			held = append(held, n.hold(0, fetchSecrets, agent.MaxMessage, 100))
		}
		if _, err := n.spiffe(1).FetchX509SVID(t.Context()); err != nil {
			t.Errorf("frontend: %v", err)
		}
		for _, c := range held {
			wait(t, c) // 3 s: the stream has outlived both
		}
		s.SetBundle(s.Authority().Root, agenttest.NewAuthority(t, "next").Root)
		if b, ok := w.next(t).Bundles.Get(n.trustDomain()); !ok || len(b.X509Authorities()) != 2 {
			t.Error("the stream did not get the new root")
		}
	})
}

func TestMessagesThatGrow(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account))
	n.ready()
	// Field 7 of DiscoveryRequest, empty: 2 bytes here, some 100 in memory.
	locators := bytes.Repeat([]byte{0x3a, 0x00}, agent.MaxMessage/2)
	for _, method := range []string{fetchSecrets, "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"} {
		if err := n.send(method, locators); err == nil || !strings.Contains(err.Error(), "message has more parts than any client sends") {
			t.Errorf("%s: got %v", method, err)
		}
	}
	// The same one level down: node (2), extensions (9).
	extensions := bytes.Repeat([]byte{0x4a, 0x00}, 100_000)
	nested := append(binary.AppendUvarint([]byte{0x12}, uint64(len(extensions))), extensions...)
	if err := n.send(fetchSecrets, nested); err == nil || !strings.Contains(err.Error(), "message has more parts than any client sends") {
		t.Errorf("nested: got %v", err)
	}
	// A map value in a map value and so on: node, metadata, fields.
	deep := []byte{}
	for range 2000 {
		for _, tag := range []byte{0x2a, 0x12, 0x0a} { // Value.struct_value, the value of an entry, Struct.fields
			deep = append(binary.AppendUvarint([]byte{tag}, uint64(len(deep))), deep...)
		}
	}
	deep = append(binary.AppendUvarint([]byte{0x1a}, uint64(len(deep))), deep...)
	deep = append(binary.AppendUvarint([]byte{0x12}, uint64(len(deep))), deep...)
	if err := n.send(fetchSecrets, deep); err == nil {
		t.Error("a message of 6000 levels was taken")
	}
	t.Run("what Envoy sends is taken", func(t *testing.T) {
		node := &corev3.Node{Id: "envoy-1"}
		for i := range 600 {
			node.Extensions = append(node.Extensions, &corev3.Extension{
				Name: fmt.Sprintf("envoy.filters.network.of_some_length_%d", i), Category: "envoy.filters.network",
				TypeUrls: []string{fmt.Sprintf("envoy.extensions.filters.network.of_some_length.v3.Extension%d", i), "another.of.the.same"},
			})
		}
		if _, err := secretv3.NewSecretDiscoveryServiceClient(n.dial(0)).FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{Node: node, ResourceNames: []string{sds.NameRoot}}); err != nil {
			t.Error(err)
		}
	})
	t.Run("headers are bounded", func(t *testing.T) {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "padding", strings.Repeat("x", agent.MaxHeaders))
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		if _, err := secretv3.NewSecretDiscoveryServiceClient(n.dial(0)).FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{}); err == nil || ctx.Err() != nil {
			t.Errorf("got %v", err)
		}
	})
}

func TestStreamsAreBounded(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account))
	n.ready()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	open := func(client secretv3.SecretDiscoveryServiceClient) codes.Code {
		stream, err := client.DeltaSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		// A stream that has been refused already takes nothing; Recv says why.
		_ = stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: sds.TypeSecret, ResourceNamesSubscribe: []string{sds.NameRoot}})
		_, err = stream.Recv()
		return status.Code(err)
	}
	// Full connections, until the socket is full: the next is told to come again.
	for range agent.MaxStreams / agent.StreamsPerConn {
		client := secretv3.NewSecretDiscoveryServiceClient(n.dial(0))
		for range agent.StreamsPerConn {
			if got := open(client); got != codes.OK {
				t.Fatalf("got %v", got)
			}
		}
	}
	client := secretv3.NewSecretDiscoveryServiceClient(n.dial(0))
	for range 10 {
		if got := open(client); got != codes.Unavailable {
			t.Errorf("past the limit: %v", got)
		}
	}
	// Unary calls have places of their own.
	if _, err := client.FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{ResourceNames: []string{sds.NameRoot}}); err != nil {
		t.Error(err)
	}
	cancel()
	ctx = t.Context()
	eventually(t, func() error {
		if got := open(client); got != codes.OK {
			return fmt.Errorf("places are not given back: %v", got)
		}
		return nil
	})
}
