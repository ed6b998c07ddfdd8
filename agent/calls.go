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

// Bounds of one pod, all its sockets together, and of one message. What they
// amount to in bytes is bounded for all pods in room.go.
const (
	maxStreams     = 128 // open at once
	maxUnary       = 32  // under way at once, those still arriving included
	streamsPerConn = 64
	// maxMessage holds Envoy's first request, which lists every extension it has.
	maxMessage = 256 << 10
	maxHeaders = 8 << 10
	// window is what a client may send that nobody has read yet; gRPC would let it
	// grow to 16 MiB. It is not less than gRPC's own, which would be taken instead.
	window = 64 << 10
	// writeBuffer is lent to a connection by gRPC while it is written to.
	writeBuffer = 8 << 10

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
		grpc.ReadBufferSize(0), // see conn.opened
		grpc.WriteBufferSize(writeBuffer),
		grpc.Creds(newPlain()),
		grpc.StatsHandler(reads{}),
		grpc.InTapHandle(s.calls.admit),
		grpc.WaitForHandlers(true), // what they use is taken away afterwards
		grpc.ForceServerCodecV2(frugal{encoding.GetCodecV2(protocodec.Name)}),
		grpc.ChainStreamInterceptor(s.stream),
		grpc.ChainUnaryInterceptor(answer),
		// Clients ping every 30 s and oftener; dead ones are found.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: clientIdlePing, Timeout: clientPingTimeout}),
	}
}

// calls counts a socket's calls from their first byte to their end.
type calls struct {
	deadlines deadlines
	refused   func(reason string)
	tenant    *tenant
	// methods are those of the server that are no unary ones; they are complete
	// before the socket serves.
	methods map[string]grpc.MethodInfo
}

// places are what calls of a kind may be under way.
type places struct {
	limit int64
	taken atomic.Int64
}

func (p *places) take() bool {
	if p.taken.Add(1) > p.limit {
		p.taken.Add(-1)
		return false
	}
	return true
}

func (p *places) give() { p.taken.Add(-1) }

func newCalls(d deadlines, t *tenant, refused func(string)) *calls {
	return &calls{deadlines: d, tenant: t, refused: refused, methods: map[string]grpc.MethodInfo{}}
}

// learn notes which of the server's methods are streams.
func (c *calls) learn(services map[string]grpc.ServiceInfo) {
	for name, info := range services {
		for _, m := range info.Methods {
			if m.IsClientStream || m.IsServerStream {
				c.methods["/"+name+"/"+m.Name] = m
			}
		}
	}
}

// admit runs when a call's headers are there, before anything of its message is
// held: interceptors run only once a message has arrived and is decoded. What
// exceeds a limit is refused; what does not arrive in time is ended. A method
// that is not known counts as a unary one.
func (c *calls) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	method, streaming := c.methods[info.FullMethodName]
	of := &c.tenant.unary
	if streaming {
		of = &c.tenant.streams
	}
	conn := connOf(ctx)
	if conn == nil || !of.take() {
		c.refused("calls")
		return ctx, status.Error(codes.Unavailable, "too many calls at once of this workload, try again")
	}
	begun := conn.begin(method.IsClientStream)
	if begun == nil {
		of.give()
		c.refused("room")
		return ctx, status.Error(codes.Unavailable, "no room for calls, try again")
	}
	ctx = context.WithValue(ctx, callKey{}, begun)
	// gRPC ends ctx when the call ends, in whatever way, and so what is made of it.
	leave := func() { of.give(); begun.end() }
	if !streaming {
		ctx, cancel := context.WithTimeout(ctx, c.deadlines.unary)
		context.AfterFunc(ctx, func() { cancel(); leave() })
		return ctx, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	first := time.AfterFunc(c.deadlines.first, cancel)
	begun.first = first
	context.AfterFunc(ctx, func() { first.Stop(); cancel(); leave() })
	return ctx, nil
}

type callKey struct{}

// callOf returns what was admitted.
func callOf(ctx context.Context) *call {
	b, _ := ctx.Value(callKey{}).(*call)
	return b
}
