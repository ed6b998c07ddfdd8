package xds_test

import (
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"castellan.dev/internal/xds"
)

func TestDeltaWildcard(t *testing.T) {
	for name, first := range map[string][]string{"empty first request": nil, "star": {"*"}} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			s.set(t, "a=1", "b=1")
			d := s.delta(t)
			d.subscribe(first...)
			d.ack(d.next("a=1 b=1"))
			s.acked(t, "a=1", "b=1")
			s.set(t, "b=2", "c=1")
			d.ack(d.next("b=2 c=1 -a"))
			s.acked(t, "b=2", "c=1")
			if s.recorder.NodeID() != "raw" {
				t.Errorf("node id %q", s.recorder.NodeID())
			}
		})
	}
}

func TestDeltaWaitsUntilSomethingIsKnown(t *testing.T) {
	s := start(t)
	s.Set(typeB, xds.Snapshot{})
	d := s.delta(t)
	d.subscribe("a") // of typeA nothing is known: not said to be missing
	d.none(s)
	s.set(t, "a=1")
	d.next("a=1")
}

func TestDeltaEmptyWildcardIsAnswered(t *testing.T) {
	s := start(t)
	s.set(t)
	d := s.delta(t)
	d.subscribe()
	d.ack(d.next(""))
	s.set(t, "a=1")
	d.next("a=1")
}

func TestDeltaNamesAreIndependent(t *testing.T) {
	s := start(t)
	s.Set(typeB, xds.Snapshot{})
	s.set(t, "a=1", "b=1", "c=1")
	d := s.delta(t)
	d.subscribe("a", "missing")
	d.ack(d.next("a=1 -missing"))
	s.set(t, "a=1", "b=2", "c=1") // not subscribed
	d.none(s)
	d.subscribe("b")
	d.ack(d.next("b=2"))
	s.set(t, "a=1", "b=2", "missing=1")
	d.ack(d.next("missing=1"))
	d.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"a"}})
	d.none(s)
	s.set(t, "a=2", "b=2", "missing=1")
	d.none(s)
	d.subscribe("b") // the peer may have forgotten it
	d.ack(d.next("b=2"))
	s.set(t, "a=2", "missing=1")
	d.ack(d.next("-b"))
}

func TestDeltaWildcardAndNames(t *testing.T) {
	s := start(t)
	s.Set(typeB, xds.Snapshot{})
	s.set(t, "a=1", "b=1")
	d := s.delta(t)
	d.subscribe("a")
	d.ack(d.next("a=1"))
	d.subscribe("*")
	d.ack(d.next("b=1"))
	d.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"a"}})
	d.ack(d.next("a=1")) // dropped by name, still covered by the wildcard
	d.subscribe("b")
	d.ack(d.next("b=1"))
	d.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"*"}})
	d.none(s)
	s.set(t, "a=2", "b=1")
	d.none(s)
	s.set(t, "a=2", "b=2")
	d.ack(d.next("b=2"))
}

func TestDeltaNack(t *testing.T) {
	s := start(t)
	s.Set(typeB, xds.Snapshot{})
	s.set(t, "a=1")
	d := s.delta(t)
	d.subscribe()
	d.ack(d.next("a=1"))
	s.acked(t, "a=1")
	s.set(t, "a=2")
	d.nack(d.next("a=2"), "no such field")
	eventually(t, "refusal", func() bool { return s.recorder.Records()[0].Nacked != "" })
	want := xds.Record{TypeURL: typeA, Name: "a", Acked: version(t, "1"), Nacked: version(t, "2"), Reason: "no such field"}
	if got := s.recorder.Records()[0]; got != want {
		t.Errorf("record %+v, want %+v", got, want)
	}
	d.none(s) // not sent again
	s.set(t, "a=2", "b=1")
	d.ack(d.next("b=1")) // nor with the next change of something else
	s.set(t, "a=3", "b=1")
	d.ack(d.next("a=3"))
	s.acked(t, "a=3", "b=1")
}

// TestDeltaNackOfSeveral: what was refused for another's sake is sent again when
// that other has changed.
func TestDeltaNackOfSeveral(t *testing.T) {
	s := start(t)
	s.Set(typeB, xds.Snapshot{})
	s.set(t, "gone=1")
	d := s.delta(t)
	d.subscribe()
	d.ack(d.next("gone=1"))
	s.set(t, "bad=1", "good=1")
	d.nack(d.next("bad=1 good=1 -gone"), "bad")
	d.none(s)
	s.set(t, "bad=2", "good=1")
	d.ack(d.next("bad=2 good=1 -gone"))
	s.acked(t, "bad=2", "good=1")
	s.set(t, "bad=3", "good=1")
	d.ack(d.next("bad=3"))
}

func TestDeltaStaleNonce(t *testing.T) {
	s := start(t)
	s.Set(typeB, xds.Snapshot{})
	s.set(t, "a=1")
	d := s.delta(t)
	d.subscribe()
	resp := d.next("a=1")
	d.send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: "of-another-stream"})
	d.none(s)
	if got := s.recorder.Records(); len(got) != 0 && got[0].TypeURL == typeA {
		t.Errorf("a stale nonce was taken for an answer: %+v", got)
	}
	d.ack(resp)
	s.acked(t, "a=1")
	d.nack(resp, "too late") // its nonce has been answered
	d.none(s)
	s.acked(t, "a=1")
}

func TestDeltaInitialVersions(t *testing.T) {
	s := start(t)
	s.set(t, "same=1", "changed=2", "new=1")
	d := s.delta(t)
	d.send(&discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{
		"same": version(t, "1"), "changed": version(t, "1"), "gone": version(t, "1")}})
	resp := d.next("changed=2 new=1 -gone")
	s.acked(t, "same=1") // known without being sent
	d.ack(resp)
	s.acked(t, "same=1", "changed=2", "new=1")
}

func TestDeltaInitialVersionsInSeveralRequests(t *testing.T) {
	s := start(t)
	s.set(t, "a=1", "b=1", "d=1")
	d := s.delta(t)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeA, InitialResourceVersions: map[string]string{"a": version(t, "1")}})
	resp := d.next("b=1 d=1")
	// b was sent on this stream and is not acknowledged yet, whatever is said of it.
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeA, InitialResourceVersions: map[string]string{"b": version(t, "0"), "c": version(t, "1")}})
	d.nack(resp, "not liked")
	d.next("-c")
	s.acked(t, "a=1")
}

func TestDeltaInitialVersionsBeforeAnythingIsKnown(t *testing.T) {
	s := start(t)
	d := s.delta(t)
	d.send(&discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{"a": version(t, "1"), "gone": "x"}})
	eventually(t, "request", func() bool { return s.recorder.NodeID() != "" })
	s.set(t, "a=1")
	d.next("-gone")
	s.acked(t, "a=1")
}

func TestDeltaTypesAreIndependent(t *testing.T) {
	s := start(t)
	s.set(t, "a=1")
	b, err := xds.NewResource("b", wrapperspb.Bytes([]byte("1")))
	if err != nil {
		t.Fatal(err)
	}
	s.Set(typeB, xds.NewSnapshot(b))
	d := s.delta(t)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/no.such.Type"})
	d.subscribe()
	d.next("a=1") // never answered
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeB})
	select {
	case resp := <-d.got:
		if resp.GetTypeUrl() != typeB || len(resp.GetResources()) != 1 {
			t.Errorf("got %v", resp)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the other type waits for an answer to the first")
	}
}

func TestDeltaCoalesces(t *testing.T) {
	s := start(t, func(c *xds.Config) { c.Limits.AckWait = time.Hour })
	s.Set(typeB, xds.Snapshot{})
	s.set(t, "a=1")
	d := s.delta(t)
	d.subscribe()
	resp := d.next("a=1")
	s.set(t, "a=2")
	d.none(s)
	s.set(t, "a=3")
	d.none(s)
	d.ack(resp)
	d.ack(d.next("a=3"))
	d.none(s)
	s.acked(t, "a=3")
}

func TestDeltaCutsLargeResponses(t *testing.T) {
	s := start(t, func(c *xds.Config) { c.Limits.ResponseBytes = 1000 })
	long := strings.Repeat("x", 600)
	s.set(t, "a="+long, "b="+long, "c="+long)
	d := s.delta(t)
	d.subscribe()
	d.ack(d.next("a=" + long))
	d.ack(d.next("b=" + long))
	d.ack(d.next("c=" + long))
	s.acked(t, "a="+long, "b="+long, "c="+long)
}

func TestDeltaBounds(t *testing.T) {
	limits := func(c *xds.Config) { c.Limits = xds.Limits{Names: 3, NameBytes: 10, Held: 1} }
	for name, c := range map[string]struct {
		reqs []*discoveryv3.DeltaDiscoveryRequest
		want string
	}{
		"names over both types": {[]*discoveryv3.DeltaDiscoveryRequest{
			{ResourceNamesSubscribe: []string{"a", "b"}}, {TypeUrl: typeB, ResourceNamesSubscribe: []string{"c", "d"}}},
			"more than 3 resource names on one stream"},
		"long name": {[]*discoveryv3.DeltaDiscoveryRequest{{ResourceNamesSubscribe: []string{"elevenbytes"}}},
			"a resource name is longer than 10 bytes"},
		"held": {[]*discoveryv3.DeltaDiscoveryRequest{{InitialResourceVersions: map[string]string{"a": "1", "b": "1"}}},
			"more than 1 initial resource versions"},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, limits)
			d := s.delta(t)
			for _, req := range c.reqs {
				d.send(req)
			}
			select {
			case err := <-d.err:
				if st := status.Convert(err); st.Code() != codes.InvalidArgument || st.Message() != c.want {
					t.Errorf("got %v, want %s", err, c.want)
				}
			case <-time.After(10 * time.Second):
				t.Error("the stream did not end")
			}
		})
	}
	t.Run("the same name again is not one more", func(t *testing.T) {
		s := start(t, limits)
		s.set(t, "a=1")
		d := s.delta(t)
		d.subscribe("a", "b", "c")
		d.ack(d.next("a=1 -b -c"))
		d.subscribe("a", "b", "c")
		d.ack(d.next("a=1 -b -c"))
	})
}
