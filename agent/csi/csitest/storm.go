package csitest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func sum(s string) [sha256.Size]byte { return sha256.Sum256([]byte(s)) }

// Certificate waits for the first X509-SVID on a pod's socket, as any SPIFFE
// program would, and returns its SPIFFE ID.
func Certificate(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	for {
		id, err := certificate(ctx, conn)
		switch status.Code(err) {
		case codes.OK:
			return id, nil
		case codes.Unavailable, codes.PermissionDenied: // not yet: come again
		default:
			return "", err
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("no certificate: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func certificate(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"))
	defer cancel()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return "", err
	}
	resp, err := stream.Recv()
	if err != nil {
		return "", err
	}
	if len(resp.GetSvids()) != 1 || len(resp.GetSvids()[0].GetX509SvidKey()) == 0 {
		return "", errors.New("no certificate in the answer")
	}
	return resp.GetSvids()[0].GetSpiffeId(), nil
}

// Arrival is one pod of a storm.
type Arrival struct {
	Pod   Pod
	Token string
}

// Storm publishes every pod at once, with so many calls under way as a kubelet
// would have, and waits until each has its certificate. It returns how long after
// the start of all each had it, the soonest first.
func (k *Kubelet) Storm(ctx context.Context, pods []Arrival, calls int) ([]time.Duration, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	start := time.Now() //nolint:forbidigo // a measurement
	took := make([]time.Duration, len(pods))
	turn := make(chan struct{}, calls)
	var all sync.WaitGroup
	for i, a := range pods {
		all.Go(func() {
			turn <- struct{}{}
			err := k.Publish(ctx, a.Pod, a.Token)
			<-turn
			if err == nil {
				err = k.arrived(ctx, a.Pod)
			}
			if err != nil {
				cancel(fmt.Errorf("pod %s/%s: %w", a.Pod.Namespace, a.Pod.Name, err))
				return
			}
			took[i] = time.Since(start)
		})
	}
	all.Wait()
	slices.Sort(took)
	return took, context.Cause(ctx)
}

// arrived waits for a pod's certificate, which must name its account.
func (k *Kubelet) arrived(ctx context.Context, p Pod) error {
	conn, err := k.Conn(p)
	if err != nil {
		return err
	}
	defer conn.Close()
	id, err := Certificate(ctx, conn)
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("/ns/%s/sa/%s", p.Namespace, p.ServiceAccount); len(id) < len(want) || id[len(id)-len(want):] != want {
		return fmt.Errorf("certificate of %q", id)
	}
	return nil
}
