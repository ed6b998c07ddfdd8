package agent

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

// Bounds of one socket: one pod's clients. Together they bound what a workload
// can make the agent hold: (maxStreams + maxUnary) messages of maxMessage with a
// window each, about 50 MiB, and nobody else's calls are touched by it.
const (
	maxStreams     = 128 // open at once
	maxUnary       = 32  // under way at once, those still arriving included
	streamsPerConn = 64
	// maxMessage holds Envoy's first request, which lists every extension it has.
	maxMessage = 256 << 10
	maxHeaders = 16 << 10
	// window is what a client may send that nobody has read yet; gRPC would let it
	// grow to 16 MiB.
	window = 64 << 10

	handshakeTimeout  = 10 * time.Second
	drainTimeout      = 2 * time.Second
	clientIdlePing    = 2 * time.Minute
	clientPingTimeout = 20 * time.Second
)

// deadlines are variables for tests alone.
type deadlines struct {
	// first is how long the first message of a call may take to arrive.
	first time.Duration
	// unary is how long a unary call may take, its arrival included. Minting a
	// JWT-SVID asks the server, which has 10 s.
	unary time.Duration
}

func defaultDeadlines() deadlines {
	return deadlines{first: 10 * time.Second, unary: 30 * time.Second}
}

func (s *socket) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxConcurrentStreams(streamsPerConn),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(4 * window),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.InTapHandle(s.calls.admit),
		grpc.WaitForHandlers(true), // what they use is taken away afterwards
		grpc.ForceServerCodecV2(frugal{encoding.GetCodecV2(protocodec.Name)}),
		grpc.ChainStreamInterceptor(s.stream),
		// Clients ping every 30 s and oftener; dead ones are found.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: clientIdlePing, Timeout: clientPingTimeout}),
	}
}

// calls counts a socket's calls from their first byte to their end.
type calls struct {
	deadlines deadlines
	refused   func(reason string)
	// streaming holds the methods that are no unary ones; it is complete before
	// the socket serves.
	streaming map[string]bool

	streams, unary atomic.Int64
}

func newCalls(d deadlines, refused func(string)) *calls {
	return &calls{deadlines: d, refused: refused, streaming: map[string]bool{}}
}

// learn notes which of the server's methods are streams.
func (c *calls) learn(services map[string]grpc.ServiceInfo) {
	for name, info := range services {
		for _, m := range info.Methods {
			if m.IsClientStream || m.IsServerStream {
				c.streaming["/"+name+"/"+m.Name] = true
			}
		}
	}
}

// admit runs when a call's headers are there, before anything of its message is
// held: interceptors run only once a message has arrived and is decoded. What
// exceeds a limit is refused; what does not arrive in time is ended. A method
// that is not known counts as a unary one.
func (c *calls) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	streaming := c.streaming[info.FullMethodName]
	count, limit := &c.unary, int64(maxUnary)
	if streaming {
		count, limit = &c.streams, maxStreams
	}
	if count.Add(1) > limit {
		count.Add(-1)
		c.refused("calls")
		return ctx, status.Error(codes.Unavailable, "too many calls at once on this socket, try again")
	}
	// gRPC ends ctx when the call ends, in whatever way, and so what is made of it.
	leave := func() { count.Add(-1) }
	if !streaming {
		ctx, cancel := context.WithTimeout(ctx, c.deadlines.unary)
		context.AfterFunc(ctx, func() { cancel(); leave() })
		return ctx, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	first := time.AfterFunc(c.deadlines.first, cancel)
	context.AfterFunc(ctx, func() { first.Stop(); cancel(); leave() })
	return context.WithValue(ctx, arrivalKey{}, first), nil
}

type arrivalKey struct{}

// arrived stops the clock that the call's first message runs against.
func arrived(ctx context.Context) {
	if first, ok := ctx.Value(arrivalKey{}).(*time.Timer); ok {
		first.Stop()
	}
}
