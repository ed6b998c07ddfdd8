package xds_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"castellan.dev/internal/xds"
)

// sotw is a raw client of the state-of-the-world variant, which remembers as Envoy does.
type sotw struct {
	t       *testing.T
	stream  discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	got     chan *discoveryv3.DiscoveryResponse
	names   []string
	version string // last accepted
	// barriers counts the calls of none.
	barriers int
}

func (s *server) sotw(t *testing.T, names ...string) *sotw {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := s.client.StreamAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c := &sotw{t: t, stream: stream, got: make(chan *discoveryv3.DiscoveryResponse, 100), names: names}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			resp, err := stream.Recv()
			if err != nil {
				return
			}
			c.got <- resp
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return c
}

func (c *sotw) send(req *discoveryv3.DiscoveryRequest) {
	c.t.Helper()
	if req.TypeUrl == "" {
		req.TypeUrl, req.ResourceNames, req.VersionInfo = typeA, c.names, c.version
	}
	if err := c.stream.Send(req); err != nil {
		c.t.Fatal(err)
	}
}

func (c *sotw) ask() { c.t.Helper(); c.send(&discoveryv3.DiscoveryRequest{}) }

func (c *sotw) ack(resp *discoveryv3.DiscoveryResponse) {
	c.t.Helper()
	c.version = resp.GetVersionInfo()
	c.send(&discoveryv3.DiscoveryRequest{ResponseNonce: resp.GetNonce()})
}

func (c *sotw) nack(resp *discoveryv3.DiscoveryResponse, reason string) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{ResponseNonce: resp.GetNonce(), ErrorDetail: &statuspb.Status{Message: reason}})
}

func (c *sotw) next(want string) *discoveryv3.DiscoveryResponse {
	c.t.Helper()
	select {
	case resp := <-c.got:
		if got := values(c.t, resp); got != want {
			c.t.Fatalf("response %q, want %q", got, want)
		}
		return resp
	case <-time.After(10 * time.Second):
		c.t.Fatalf("no response within 10s, want %q", want)
	}
	return nil
}

// none checks that nothing came before the answer of another type. It asks for a
// name of its own each time: only the answer to this request can hold it, while a
// name asked for before would be pushed by itself.
func (c *sotw) none(s *server) {
	c.t.Helper()
	c.barriers++
	name := fmt.Sprintf("barrier-%d", c.barriers)
	b, err := xds.NewResource(name, wrapperspb.String(name))
	if err != nil {
		c.t.Fatal(err)
	}
	s.Set(typeB, xds.NewSnapshot(b))
	c.send(&discoveryv3.DiscoveryRequest{TypeUrl: typeB, ResourceNames: []string{name}})
	deadline := time.After(10 * time.Second)
	for {
		select {
		case resp := <-c.got:
			if resp.GetTypeUrl() != typeB {
				c.t.Fatalf("unexpected response %q", values(c.t, resp))
			}
			c.send(&discoveryv3.DiscoveryRequest{TypeUrl: typeB, ResourceNames: []string{name}, VersionInfo: resp.GetVersionInfo(), ResponseNonce: resp.GetNonce()})
			if values(c.t, resp) == name {
				return
			}
		case <-deadline:
			c.t.Fatal("no answer within 10s")
		}
	}
}

func values(t *testing.T, resp *discoveryv3.DiscoveryResponse) string {
	t.Helper()
	var out []string
	for _, r := range resp.GetResources() {
		var v wrapperspb.StringValue
		if err := r.UnmarshalTo(&v); err != nil {
			t.Fatal(err)
		}
		out = append(out, v.GetValue())
	}
	return strings.Join(out, " ")
}

func TestSotWNames(t *testing.T) {
	s := start(t)
	s.set(t, "a=a1", "b=b1", "c=c1")
	c := s.sotw(t, "a", "missing")
	c.ask()
	c.ack(c.next("a1")) // one bad name does not fail the other
	s.acked(t, "a=a1")
	s.set(t, "a=a1", "b=b2", "c=c1") // not subscribed
	c.none(s)
	c.names = []string{"a", "b"}
	c.ask() // new names, nothing to answer
	c.ack(c.next("a1 b2"))
	c.names = []string{"b"}
	c.ask()
	c.none(s)
	s.set(t, "a=a2", "b=b2")
	c.none(s)
	c.names = []string{"a", "b"}
	c.ask()
	c.ack(c.next("a2 b2"))
	s.set(t, "b=b2") // that a is gone cannot be said
	c.none(s)
}

func TestSotWWaitsForMissing(t *testing.T) {
	s := start(t)
	s.set(t, "other=1")
	c := s.sotw(t, "a")
	c.ask()
	c.none(s) // an empty answer would be an error to Envoy
	s.set(t, "other=1", "a=a1")
	c.ack(c.next("a1"))
}

func TestSotWWildcard(t *testing.T) {
	s := start(t)
	s.set(t)
	c := s.sotw(t)
	c.ask()
	c.ack(c.next(""))
	s.set(t, "a=a1", "b=b1")
	c.ack(c.next("a1 b1"))
	s.set(t, "b=b1")
	c.ack(c.next("b1"))
	s.acked(t, "b=b1")
	c.names = []string{"b"}
	c.ask()
	c.names = nil
	c.ask() // after names, an empty list means none
	c.none(s)
	s.set(t, "b=b2")
	c.none(s)
}

func TestSotWNack(t *testing.T) {
	s := start(t)
	s.set(t, "a=a1")
	c := s.sotw(t, "a")
	c.ask()
	first := c.next("a1")
	c.ack(first)
	s.acked(t, "a=a1")
	s.set(t, "a=a2")
	second := c.next("a2")
	if first.GetVersionInfo() == second.GetVersionInfo() {
		t.Error("another content has the same version")
	}
	c.nack(second, "bad key")
	eventually(t, "refusal", func() bool { return s.recorder.Records()[0].Nacked != "" })
	want := xds.Record{TypeURL: typeA, Name: "a", Acked: version(t, "a1"), Nacked: version(t, "a2"), Reason: "bad key"}
	if got := s.recorder.Records()[0]; got != want {
		t.Errorf("record %+v, want %+v", got, want)
	}
	c.none(s) // not sent again
	s.set(t, "a=a3")
	c.ack(c.next("a3"))
	s.acked(t, "a=a3")
}

func TestSotWStaleNonce(t *testing.T) {
	s := start(t)
	s.set(t, "a=a1", "b=b1")
	c := s.sotw(t, "a")
	c.ask()
	first := c.next("a1")
	c.ack(first)
	s.acked(t, "a=a1")
	s.set(t, "a=a2", "b=b1")
	second := c.next("a2")
	c.names = []string{"a", "b"}
	c.send(&discoveryv3.DiscoveryRequest{ResponseNonce: first.GetNonce()}) // sent before second was seen
	c.none(s)
	c.ack(second) // repeats the names
	c.ack(c.next("a2 b1"))
	s.acked(t, "a=a2", "b=b1")
}

func TestSotWReconnect(t *testing.T) {
	s := start(t)
	s.set(t, "a=a1")
	c := s.sotw(t, "a")
	c.ask()
	c.ack(c.next("a1"))
	again := s.sotw(t, "a")
	again.version = c.version
	again.ask()
	again.none(s) // it holds exactly this
	s.set(t, "a=a2")
	again.ack(again.next("a2"))
	old := s.sotw(t, "a")
	old.version = c.version
	old.ask()
	old.next("a2")
}

func TestFetch(t *testing.T) {
	table := xds.NewTable(typeA)
	cfg := xds.Config{Source: table, Types: []string{typeA}, Limits: xds.Limits{Names: 3}}
	_, err := xds.Fetch(&discoveryv3.DiscoveryRequest{}, cfg)
	if status.Code(err) != codes.Unavailable {
		t.Errorf("before anything is known: %v", err)
	}
	table.Set(typeA, snapshot(t, "a=a1", "b=b1"))
	resp, err := xds.Fetch(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"b", "missing"}}, cfg)
	if err != nil || values(t, resp) != "b1" {
		t.Errorf("got %v, %v", resp, err)
	}
	resp, err = xds.Fetch(&discoveryv3.DiscoveryRequest{TypeUrl: typeA}, cfg)
	if err != nil || values(t, resp) != "a1 b1" {
		t.Errorf("got %v, %v", resp, err)
	}
	if _, err = xds.Fetch(&discoveryv3.DiscoveryRequest{TypeUrl: typeB}, cfg); status.Code(err) != codes.InvalidArgument {
		t.Errorf("another type: %v", err)
	}
	if _, err = xds.Fetch(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"1", "2", "3", "4"}}, cfg); status.Code(err) != codes.InvalidArgument {
		t.Errorf("too many names: %v", err)
	}
}
