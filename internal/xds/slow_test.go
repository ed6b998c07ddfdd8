package xds_test

import (
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/internal/xds"
)

// pipe is the server's side of a delta stream whose peer reads when it likes.
type pipe struct {
	ctx context.Context
	in  chan *discoveryv3.DeltaDiscoveryRequest
	out chan *discoveryv3.DeltaDiscoveryResponse
}

func (p pipe) Context() context.Context { return p.ctx }

func (p pipe) Send(r *discoveryv3.DeltaDiscoveryResponse) error {
	select {
	case p.out <- r:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

func (p pipe) Recv() (*discoveryv3.DeltaDiscoveryRequest, error) {
	select {
	case r, ok := <-p.in:
		if !ok {
			return nil, io.EOF
		}
		return r, nil
	case <-p.ctx.Done():
		return nil, p.ctx.Err()
	}
}

func serve(t *testing.T, table *xds.Table) (pipe, <-chan error, context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	p := pipe{ctx, make(chan *discoveryv3.DeltaDiscoveryRequest), make(chan *discoveryv3.DeltaDiscoveryResponse)}
	ended := make(chan error, 1)
	go func() { ended <- xds.ServeDelta(p, xds.Config{Source: table, Types: []string{typeA}}) }()
	return p, ended, cancel
}

func TestSlowPeerIsLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := xds.NewTable(typeA)
		table.Set(typeA, snapshot(t, "a=1"))
		p, ended, cancel := serve(t, table)
		defer cancel()
		began := time.Now()
		p.in <- &discoveryv3.DeltaDiscoveryRequest{}
		p.in <- &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"a"}} // still heard
		err := <-ended
		if st := status.Convert(err); st.Code() != codes.Unavailable || st.Message() != "responses are not being read" {
			t.Errorf("ended with %v", err)
		}
		if got := time.Since(began); got != 30*time.Second {
			t.Errorf("ended after %v", got)
		}
	})
}

func TestSilentPeerIsStillTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := xds.NewTable(typeA)
		table.Set(typeA, snapshot(t, "a=1"))
		p, ended, cancel := serve(t, table)
		p.in <- &discoveryv3.DeltaDiscoveryRequest{}
		<-p.out // and never answers
		began := time.Now()
		table.Set(typeA, snapshot(t, "a=2"))
		synctest.Wait()
		table.Set(typeA, snapshot(t, "a=3"))
		if got := describe(t, <-p.out); got != "a=3" {
			t.Errorf("got %q", got)
		}
		if got := time.Since(began); got != 2*time.Second {
			t.Errorf("told after %v", got)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

func TestStreamEndsWithItsPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, ended, cancel := serve(t, xds.NewTable(typeA))
		p.in <- &discoveryv3.DeltaDiscoveryRequest{}
		close(p.in)
		if err := <-ended; err != nil {
			t.Errorf("ended with %v", err)
		}
		cancel()
	})
}
