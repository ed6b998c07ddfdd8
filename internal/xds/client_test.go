package xds_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"castellan.dev/internal/xds"
)

// follower applies updates of typeA to a map and notes them.
type follower struct {
	mu     sync.Mutex
	state  map[string]string
	notes  []string
	refuse string // a value that is refused
}

func (f *follower) apply(changed []xds.Resource, removed []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	values := map[string]string{}
	for _, r := range changed {
		var v wrapperspb.StringValue
		if err := r.Body.UnmarshalTo(&v); err != nil {
			return err
		}
		if v.GetValue() == f.refuse {
			return fmt.Errorf("value %q is not liked", v.GetValue())
		}
		values[r.Name] = v.GetValue()
	}
	var note []string
	for name, v := range values {
		f.state[name] = v
		note = append(note, name+"="+v)
	}
	for _, name := range removed {
		delete(f.state, name)
		note = append(note, "-"+name)
	}
	slices.Sort(note)
	f.notes = append(f.notes, strings.Join(note, " "))
	return nil
}

func (f *follower) is(want ...string) func() bool {
	return func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		got := []string{}
		for name, v := range f.state {
			got = append(got, name+"="+v)
		}
		slices.Sort(got)
		return slices.Equal(got, want)
	}
}

func (s *server) open(ctx context.Context) (xds.DeltaClientStream, error) {
	return s.client.DeltaAggregatedResources(ctx)
}

func follow(t *testing.T, open func(context.Context) (xds.DeltaClientStream, error), names []string) (*xds.Client, *follower) {
	t.Helper()
	f := &follower{state: map[string]string{}}
	c := xds.NewClient(xds.ClientConfig{Open: open, NodeID: "client", MinBackoff: time.Millisecond,
		Subscriptions: []xds.Subscription{{TypeURL: typeA, Names: names, Apply: f.apply}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return c, f
}

func TestClientFollows(t *testing.T) {
	s := start(t)
	s.set(t, "a=1")
	c, f := follow(t, s.open, nil)
	eventually(t, "first state", f.is("a=1"))
	if !c.Connected() {
		t.Error("not connected")
	}
	s.acked(t, "a=1")
	s.set(t, "b=1")
	eventually(t, "change", f.is("b=1"))
	s.acked(t, "b=1")
}

func TestClientIsToldThatThereIsNothing(t *testing.T) {
	s := start(t)
	s.set(t)
	_, f := follow(t, s.open, nil)
	eventually(t, "empty update", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return slices.Equal(f.notes, []string{""})
	})
}

func TestClientRefuses(t *testing.T) {
	s := start(t)
	s.set(t, "a=1")
	_, f := follow(t, s.open, nil)
	s.acked(t, "a=1")
	f.mu.Lock()
	f.refuse = "2"
	f.mu.Unlock()
	s.set(t, "a=2", "b=1")
	eventually(t, "refusal", func() bool { return s.recorder.Records()[0].Nacked != "" })
	if got, want := s.recorder.Records()[0].Reason, `value "2" is not liked`; got != want {
		t.Errorf("reason %q, want %q", got, want)
	}
	if !f.is("a=1")() {
		t.Error("a refused update was applied in part")
	}
	s.set(t, "a=3", "b=1")
	s.acked(t, "a=3", "b=1") // b too was in the refused update
	eventually(t, "change", f.is("a=3", "b=1"))
}

// TestClientReconnects: what was applied stays without a stream, and afterwards
// only differences come.
func TestClientReconnects(t *testing.T) {
	s := start(t)
	s.set(t, "kept=1", "changed=1", "gone=1")
	var away atomic.Bool
	var cut atomic.Pointer[context.CancelFunc]
	open := func(ctx context.Context) (xds.DeltaClientStream, error) {
		if away.Load() {
			return nil, errors.New("away")
		}
		ctx, cancel := context.WithCancel(ctx)
		cut.Store(&cancel)
		return s.open(ctx)
	}
	c, f := follow(t, open, nil)
	s.acked(t, "kept=1", "changed=1", "gone=1")
	away.Store(true)
	(*cut.Load())()
	eventually(t, "end of the stream", func() bool { return !c.Connected() })
	if !f.is("changed=1", "gone=1", "kept=1")() {
		t.Error("the state did not outlive the stream")
	}
	s.set(t, "kept=1", "changed=2", "new=1")
	away.Store(false)
	eventually(t, "state after reconnect", f.is("changed=2", "kept=1", "new=1"))
	f.mu.Lock()
	defer f.mu.Unlock()
	if got, want := f.notes[len(f.notes)-1], "-gone changed=2 new=1"; got != want {
		t.Errorf("last update %q, want %q", got, want)
	}
	(*cut.Load())()
}

func TestClientThatHoldsMuchReconnects(t *testing.T) {
	const messages = 100 << 10 // the server's bound
	s := start(t)
	var before, after []string
	for i := range 4000 {
		name := fmt.Sprintf("namespace-%04d/some-service-of-the-mesh", i)
		before = append(before, name+"=1")
		switch i % 1000 {
		case 1: // gone while there is no stream
			continue
		case 2:
			after = append(after, name+"=2")
		default:
			after = append(after, name+"=1")
		}
	}
	s.set(t, before...)
	var streams atomic.Int32
	first, cut := context.WithCancel(t.Context())
	changed := make(chan struct{})
	var again sizes
	_, f := follow(t, func(ctx context.Context) (xds.DeltaClientStream, error) {
		if streams.Add(1) == 1 {
			return s.open(first)
		}
		<-changed
		stream, err := s.open(ctx)
		return measured{stream, &again}, err
	}, nil)
	acked := func(pairs []string) func() bool {
		wanted := snapshot(t, pairs...)
		return func() bool {
			n := 0
			for _, r := range s.recorder.Records() {
				if r.Acked != "" && r.Acked != wanted[r.Name].Version {
					return false
				} else if r.Acked != "" {
					n++
				}
			}
			return n == len(wanted)
		}
	}
	eventually(t, "first state", f.is(before...))
	eventually(t, "first acknowledgements", acked(before))
	cut()
	s.set(t, after...)
	close(changed)
	eventually(t, "state after the reconnect", f.is(after...))
	if most, all := again.read(); most > messages || all < 2 {
		t.Errorf("the largest of %d requests has %d bytes, want %d at most", all, most, messages)
	}
	// Acknowledged is what was applied, and no more: those that are gone are gone.
	eventually(t, "acknowledgements after the reconnect", acked(after))
}

// sizes notes how large requests are.
type sizes struct {
	mu        sync.Mutex
	most, all int
}

func (s *sizes) read() (most, all int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.most, s.all
}

type measured struct {
	xds.DeltaClientStream
	sizes *sizes
}

func (m measured) Send(req *discoveryv3.DeltaDiscoveryRequest) error {
	m.sizes.mu.Lock()
	m.sizes.most, m.sizes.all = max(m.sizes.most, proto.Size(req)), m.sizes.all+1
	m.sizes.mu.Unlock()
	return m.DeltaClientStream.Send(req)
}

func TestClientSetNames(t *testing.T) {
	s := start(t)
	s.set(t, "a=1", "b=1", "c=1")
	c, f := follow(t, s.open, []string{})
	c.SetNames(typeA, []string{"a", "b"})
	eventually(t, "names", f.is("a=1", "b=1"))
	c.SetNames(typeA, []string{"b", "c"})
	eventually(t, "other names", f.is("b=1", "c=1"))
	c.SetNames(typeA, nil)
	eventually(t, "everything", f.is("a=1", "b=1", "c=1"))
	c.SetNames(typeA, []string{})
	eventually(t, "nothing", f.is())
	s.set(t, "a=2")
	c.SetNames(typeA, []string{"a"})
	eventually(t, "a again", f.is("a=2"))
}

func TestClientBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at []time.Time
		ctx, cancel := context.WithCancel(t.Context())
		c := xds.NewClient(xds.ClientConfig{Open: func(context.Context) (xds.DeltaClientStream, error) {
			at = append(at, time.Now())
			if len(at) == 10 {
				cancel()
			}
			return nil, errors.New("away")
		}})
		if err := c.Run(ctx); err != nil {
			t.Fatal(err)
		}
		for i := 1; i < len(at); i++ {
			most := min(100*time.Millisecond<<(i-1), 5*time.Second)
			if gap := at[i].Sub(at[i-1]); gap < most/2 || gap > most {
				t.Errorf("pause %d is %v, want between %v and %v", i, gap, most/2, most)
			}
		}
	})
}
