package xds_test

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/goleak"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"castellan.dev/internal/xds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Two types to carry; any message will do.
const (
	typeA = "type.googleapis.com/google.protobuf.StringValue"
	typeB = "type.googleapis.com/google.protobuf.BytesValue"
)

// ads serves the engine by real gRPC.
type ads struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	cfg xds.Config
}

func (a ads) StreamAggregatedResources(s discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return xds.ServeSotW(s, a.cfg)
}

func (a ads) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return xds.ServeDelta(s, a.cfg)
}

type server struct {
	*xds.Table
	recorder *xds.Recorder
	answered chan struct{}
	client   discoveryv3.AggregatedDiscoveryServiceClient
	grpc     *grpc.Server
	listener *bufconn.Listener
}

// start serves both types over an in-memory connection.
func start(t *testing.T, adjust ...func(*xds.Config)) *server {
	t.Helper()
	s := &server{Table: xds.NewTable(typeA, typeB), answered: make(chan struct{}, 1000)}
	s.recorder = &xds.Recorder{Notify: func() { s.answered <- struct{}{} }}
	cfg := xds.Config{Source: s.Table, Types: []string{typeA, typeB}, Observer: s.recorder}
	for _, f := range adjust {
		f(&cfg)
	}
	s.listener = bufconn.Listen(1 << 20)
	s.grpc = grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(s.grpc, ads{cfg: cfg})
	done := make(chan struct{})
	go func() { defer close(done); _ = s.grpc.Serve(s.listener) }()
	conn, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	s.client = discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
	t.Cleanup(func() { conn.Close(); s.grpc.Stop(); <-done })
	return s
}

// set publishes name=value pairs as typeA.
func (s *server) set(t *testing.T, pairs ...string) { s.Set(typeA, snapshot(t, pairs...)) }

func snapshot(t *testing.T, pairs ...string) xds.Snapshot {
	t.Helper()
	out := xds.Snapshot{}
	for _, p := range pairs {
		name, value, _ := strings.Cut(p, "=")
		r, err := xds.NewResource(name, wrapperspb.String(value))
		if err != nil {
			t.Fatal(err)
		}
		out[name] = r
	}
	return out
}

func version(t *testing.T, value string) string { return snapshot(t, "x="+value)["x"].Version }

// acked waits until the recorder holds exactly these typeA versions, as name=value.
func (s *server) acked(t *testing.T, pairs ...string) {
	t.Helper()
	want := map[string]string{}
	for name, r := range snapshot(t, pairs...) {
		want[name] = r.Version
	}
	eventually(t, "acknowledgement of "+strings.Join(pairs, " "), func() bool {
		got := map[string]string{}
		for _, r := range s.recorder.Records() {
			if r.TypeURL == typeA && r.Acked != "" {
				got[r.Name] = r.Acked
			}
		}
		if len(got) != len(want) {
			return false
		}
		for name, v := range want {
			if got[name] != v {
				return false
			}
		}
		return true
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// delta is a raw client of the delta variant.
type delta struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	got    chan *discoveryv3.DeltaDiscoveryResponse
	err    chan error
}

func (s *server) delta(t *testing.T) *delta {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := s.client.DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	d := &delta{t: t, stream: stream, got: make(chan *discoveryv3.DeltaDiscoveryResponse, 100), err: make(chan error, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			resp, err := stream.Recv()
			if err != nil {
				d.err <- err
				return
			}
			d.got <- resp
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return d
}

func (d *delta) send(req *discoveryv3.DeltaDiscoveryRequest) {
	d.t.Helper()
	if req.TypeUrl == "" {
		req.TypeUrl = typeA
	}
	if req.Node == nil {
		req.Node = &corev3.Node{Id: "raw"}
	}
	if err := d.stream.Send(req); err != nil {
		d.t.Fatal(err)
	}
}

func (d *delta) subscribe(names ...string) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: names})
}

// next returns the next response, which must be describe()d as want.
func (d *delta) next(want string) *discoveryv3.DeltaDiscoveryResponse {
	d.t.Helper()
	select {
	case resp := <-d.got:
		if got := describe(d.t, resp); got != want {
			d.t.Fatalf("response %q, want %q", got, want)
		}
		return resp
	case err := <-d.err:
		d.t.Fatalf("stream ended (%v), want response %q", err, want)
	case <-time.After(10 * time.Second):
		d.t.Fatalf("no response within 10s, want %q", want)
	}
	return nil
}

// none checks that nothing came, by asking for something of the other type and
// getting only that: requests of one stream are answered in order.
func (d *delta) none(s *server) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeB, ResourceNamesSubscribe: []string{"no-such-thing"}})
	select {
	case resp := <-d.got:
		if resp.GetTypeUrl() != typeB {
			d.t.Fatalf("unexpected response %q", describe(d.t, resp))
		}
		d.ack(resp)
	case err := <-d.err:
		d.t.Fatalf("stream ended: %v", err)
	case <-time.After(10 * time.Second):
		d.t.Fatal("no answer within 10s")
	}
}

func (d *delta) ack(resp *discoveryv3.DeltaDiscoveryResponse) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()})
}

func (d *delta) nack(resp *discoveryv3.DeltaDiscoveryResponse, reason string) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce(),
		ErrorDetail: &statuspb.Status{Code: 3, Message: reason}})
}

// describe writes a response as "name=value name=value -removed".
func describe(t *testing.T, resp *discoveryv3.DeltaDiscoveryResponse) string {
	t.Helper()
	var out []string
	for _, r := range resp.GetResources() {
		var v wrapperspb.StringValue
		if err := r.GetResource().UnmarshalTo(&v); err != nil {
			t.Fatal(err)
		}
		if r.GetVersion() != version(t, v.GetValue()) {
			t.Fatalf("%s has version %q", r.GetName(), r.GetVersion())
		}
		out = append(out, r.GetName()+"="+v.GetValue())
	}
	for _, name := range resp.GetRemovedResources() {
		out = append(out, "-"+name)
	}
	return strings.Join(out, " ")
}
