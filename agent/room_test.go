package agent_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"castellan.dev/agent"
	"castellan.dev/agent/agenttest"
	"castellan.dev/sds"
)

const deltaSecrets = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets"

// unix dials a workload's socket.
func (n *node) unix(i int) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.cfg.Workloads[i].Socket)
	}
}

// hoggish is what one socket is attacked with: 128 streams and 32 unary calls.
func hoggish(dial func(context.Context) (net.Conn, error)) []hog {
	const size = agent.MaxMessage - 1<<10
	return []hog{
		{dial: dial, method: deltaSecrets, streams: 64, size: size},
		{dial: dial, method: deltaSecrets, streams: 64, size: size},
		{dial: dial, method: fetchSecrets, streams: 32, size: size},
	}
}

// large is Envoy's first request with all of its extensions, and more.
func large() *discoveryv3.DeltaDiscoveryRequest {
	node := &corev3.Node{Id: "envoy-1"}
	for i := range 1500 {
		node.Extensions = append(node.Extensions, &corev3.Extension{
			Name: fmt.Sprintf("envoy.filters.network.of_some_length_%d", i), Category: "envoy.filters.network",
			TypeUrls: []string{fmt.Sprintf("envoy.extensions.filters.network.of_some_length.v3.Extension%d", i)},
		})
	}
	return &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: sds.TypeSecret, ResourceNamesSubscribe: []string{sds.NameRoot}}
}

// served opens a connection, as a proxy and its application would together, and
// returns what went wrong.
func served(ctx context.Context, dial func(context.Context) (net.Conn, error), request *discoveryv3.DeltaDiscoveryRequest, streams int) error {
	conn, err := grpc.NewClient("passthrough:///pod", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(withHeader(ctx), time.Minute)
	defer cancel()
	for range streams {
		secrets, err := secretv3.NewSecretDiscoveryServiceClient(conn).DeltaSecrets(ctx)
		if err != nil {
			return err
		}
		if err := secrets.Send(request); err != nil {
			return err
		}
		// Envoy says what it is once, and with it a pod is within its fair share.
		request = &discoveryv3.DeltaDiscoveryRequest{TypeUrl: request.GetTypeUrl(), ResourceNamesSubscribe: request.GetResourceNamesSubscribe()}
		if _, err := secrets.Recv(); err != nil {
			return fmt.Errorf("SDS: %w", err)
		}
		svids, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			return err
		}
		if _, err := svids.Recv(); err != nil {
			return fmt.Errorf("workload API: %w", err)
		}
	}
	return nil
}

// within fails the test if the agent holds, by its own count or by the heap's,
// more than it may.
func (n *node) within(before uint64) {
	n.t.Helper()
	held, ending, _ := n.agent.Held()
	if held > agent.MaxHeld || held+ending > agent.MaxHeld+agent.MaxEnding {
		n.t.Errorf("%d MiB held, %d MiB being cut", held>>20, ending>>20)
	}
	if most := n.agent.HeldMost(); most > agent.MaxHeldByPod {
		n.t.Errorf("one pod holds %d KiB", most>>10)
	}
	// Clients' buffers, and those that gRPC keeps for the next message, are in it.
	if grown := int64(heap()) - int64(before); grown > 200<<20 {
		n.t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
}

// heap is what is alive, clients' part included, with the stacks.
func heap() uint64 {
	runtime.GC()
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64() + s[1].Value.Uint64()
}

// empty waits until nothing is held any more: whatever was counted is given back.
func (n *node) empty() {
	n.t.Helper()
	eventually(n.t, func() error {
		if held, ending, pods := n.agent.Held(); held != 0 || ending != 0 || pods != 0 {
			return fmt.Errorf("%d bytes, %d bytes being cut, %d pods", held, ending, pods)
		}
		return nil
	})
}

// full waits until clients are cut for what they hold.
func (n *node) full(pods int64) {
	n.t.Helper()
	eventually(n.t, func() error {
		if held, _, _ := n.agent.Held(); held < pods*agent.MaxHeldByPod/2 && n.metric("castellan_agent_refused_total", "room") == 0 {
			return fmt.Errorf("%d KiB held", held>>10)
		}
		return nil
	})
}

// TestOnePodOfManySockets: 16 volumes with 160 messages of 256 KiB each, never
// finished, would be 640 MiB.
func TestOnePodOfManySockets(t *testing.T) {
	s := agenttest.New(t)
	k := startKube(t, s)
	victim := podOf("victim", "uid-victim")
	k.publish(victim)
	k.identity(victim)
	var all []hog
	for i := range 16 {
		p := podOf("greedy", "uid-greedy")
		p.Volume = fmt.Sprint("v", i)
		k.publish(p)
		all = append(all, hoggish(func(ctx context.Context) (net.Conn, error) { return k.kubelet.Dial(ctx, p) })...)
	}
	before := heap()
	stop := hogs(t, all...)
	k.full(1)
	for range 4 {
		if err := served(t.Context(), func(ctx context.Context) (net.Conn, error) { return k.kubelet.Dial(ctx, victim) }, large(), 5); err != nil {
			t.Errorf("the other pod: %v", err)
		}
		k.within(before)
	}
	stop()
}

// TestManyPodsOfANamespace take everything there is, and give way to others.
func TestManyPodsOfANamespace(t *testing.T) {
	s := agenttest.New(t)
	accounts := []string{account}
	for i := range 18 { // of 8 MiB each: more than there is for all
		accounts = append(accounts, fmt.Sprintf("greedy/g%d", i))
	}
	n := start(t, s, configure(t, s, accounts...))
	n.ready()
	var all []hog
	for i := 1; i < len(accounts); i++ {
		all = append(all, hoggish(n.unix(i))...)
	}
	before := heap()
	stop := hogs(t, all...)
	n.full(18)
	for range 4 {
		if err := served(t.Context(), n.unix(0), large(), 5); err != nil {
			t.Errorf("the other namespace: %v", err)
		}
		n.within(before)
	}
	stop()
	n.empty()
}

// TestFramesOfOneByte: each costs the agent a hundred.
func TestFramesOfOneByte(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account, "shop/victim"))
	n.ready()
	before := heap()
	all := hoggish(n.unix(0))
	for i := range all {
		all[i].frame = 1
	}
	stop := hogs(t, all...)
	eventually(t, func() error {
		if n.metric("castellan_agent_refused_total", "room") == 0 {
			return errors.New("nobody was cut")
		}
		return nil
	})
	n.within(before)
	if err := served(t.Context(), n.unix(1), large(), 5); err != nil {
		t.Error(err)
	}
	stop()
	n.empty()
}

// TestIdleConnections of one pod, over all its sockets, are bounded.
func TestIdleConnections(t *testing.T) {
	s := agenttest.New(t)
	k := startKube(t, s)
	victim := podOf("victim", "uid-victim")
	k.publish(victim)
	k.identity(victim)
	for i := range 3 {
		p := podOf("greedy", "uid-greedy")
		p.Volume = fmt.Sprint("v", i)
		k.publish(p)
		for range 100 {
			conn, err := k.kubelet.Dial(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
	}
	eventually(t, func() error {
		if k.metric("castellan_agent_refused_total", "room") < 300-agent.MaxHeldByPod/agent.ConnCost {
			return errors.New("not refused yet")
		}
		return nil
	})
	if err := served(t.Context(), func(ctx context.Context) (net.Conn, error) { return k.kubelet.Dial(ctx, victim) }, large(), 5); err != nil {
		t.Error(err)
	}
}

// TestAnswersThatNobodyReads count until they are read or cannot be any more.
func TestAnswersThatNobodyReads(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account))
	n.ready()
	conn, err := n.unix(0)(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	framer := http2.NewFramer(conn, conn)
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	if err := framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}); err != nil {
		t.Fatal(err)
	}
	const calls = 16
	for i := range calls {
		if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream(i), BlockFragment: hog{method: fetchSecrets}.headers(), EndHeaders: true}); err != nil {
			t.Fatal(err)
		}
		if err := framer.WriteData(stream(i), true, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
	}
	read := func(want http2.FrameType) { // one for each call
		for seen := 0; seen < calls; {
			f, err := framer.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if f.Header().Type == want {
				seen++
			}
		}
	}
	read(http2.FrameHeaders) // answered, but for the data and what follows it
	held, _, _ := n.agent.Held()
	if held < agent.ConnCost+calls*(agent.CallCost+1<<10) {
		t.Errorf("%d bytes for %d answers that nobody has read", held, calls)
	}
	done := make(chan struct{})
	defer func() { conn.Close(); <-done }()
	go func() {
		defer close(done)
		for {
			if _, err := framer.ReadFrame(); err != nil {
				return
			}
		}
	}()
	for i := range calls / 2 {
		if err := framer.WriteWindowUpdate(stream(i), 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	for i := calls / 2; i < calls; i++ {
		if err := framer.WriteRSTStream(stream(i), http2.ErrCodeCancel); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() error {
		if held, _, _ := n.agent.Held(); held != agent.ConnCost {
			return fmt.Errorf("%d bytes beside the connection", held-agent.ConnCost)
		}
		return nil
	})
	conn.Close()
	n.empty()
}

// TestWhatStreamsRemember counts until they end: names, and what a client says
// that it holds.
func TestWhatStreamsRemember(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account))
	n.ready()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(n.dial(0)).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range agent.MaxHeldByPod/(200<<10) + 1 {
		err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{
			TypeUrl:                 "type.googleapis.com/castellan.discovery.v1.Service",
			InitialResourceVersions: map[string]string{strings.Repeat("x", 200<<10): "1"},
		})
		if err != nil {
			break // the answer says why
		}
	}
	for err == nil {
		_, err = stream.Recv()
	}
	// The stream is refused or, if a request was on its way, the connection cut.
	if status.Code(err) != codes.Unavailable || n.metric("castellan_agent_refused_total", "room") == 0 {
		t.Errorf("got %v", err)
	}
}

// TestANodeFullOfPods: 250 pods with two connections and ten streams each are
// served at once, and nobody is cut.
func TestANodeFullOfPods(t *testing.T) {
	const pods = 250
	s := agenttest.New(t)
	accounts := make([]string, pods)
	for i := range accounts {
		accounts[i] = fmt.Sprintf("shop/p%d", i)
	}
	n := start(t, s, configure(t, s, accounts...))
	n.ready()
	before := heap()
	var done sync.WaitGroup
	ctx, cancel := context.WithCancel(withHeader(t.Context()))
	request := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: sds.TypeSecret, ResourceNamesSubscribe: []string{sds.NameRoot}}
	for i := range pods {
		first, second := n.dial(i), n.dial(i)
		done.Go(func() {
			for range 5 {
				secrets, err := secretv3.NewSecretDiscoveryServiceClient(first).DeltaSecrets(ctx)
				if err != nil {
					t.Error(err)
					return
				}
				if err := secrets.Send(request); err != nil {
					t.Error(err)
				}
				if _, err := secrets.Recv(); err != nil {
					t.Error(err)
				}
				svids, err := workload.NewSpiffeWorkloadAPIClient(second).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := svids.Recv(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done.Wait()
	held, _, _ := n.agent.Held()
	if held < pods*(2*agent.ConnCost+10*agent.CallCost) || held > agent.MaxHeld {
		t.Errorf("%d MiB held", held>>20)
	}
	if got := n.metric("castellan_agent_refused_total", "room"); got != 0 {
		t.Errorf("%v were cut", got)
	}
	t.Logf("%d MiB counted, heap and stacks, clients' too, grown by %d MiB", held>>20, (heap()-before)>>20)
	cancel()
	eventually(t, func() error {
		if held, _, _ := n.agent.Held(); held > pods*2*agent.ConnCost {
			return fmt.Errorf("%d bytes", held)
		}
		return nil
	})
}
