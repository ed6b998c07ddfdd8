package server

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"castellan.dev/internal/crowd"
)

const (
	// maxAgentMessage bounds what an agent sends: its report of a whole node.
	maxAgentMessage = 4 << 20
	// maxMessage bounds what is received of anybody else, above maxRequest so that
	// what is somewhat larger gets our own answer.
	maxMessage = 128 << 10
	// maxHeaders has room for two tokens of the greatest size.
	maxHeaders = 32 << 10
	// maxStreams bounds the calls under way on one connection; a client with more
	// waits before it sends them.
	maxStreams = 100

	handshakeTimeout = 10 * time.Second
	// unaryTimeout bounds a call from its head to its answer, so that a request
	// which never ends arriving is let go.
	unaryTimeout     = 15 * time.Second
	agentIdleTimeout = 15 * time.Minute
	otherIdleTimeout = 2 * time.Minute
)

// Front serves one listener by two gRPC servers with the same services and
// different bounds: one for connections whose client certificate is an agent's,
// one for all others, who are nobody until they have proved themselves in a call.
// What such a one sends is neither kept in large amounts nor decoded before the
// gate has let it in. The connection's certificate decides about bounds only; every
// call is admitted by itself.
type Front struct {
	gate           *Gate
	agents, others *grpc.Server
	handed         *handover
	done           chan struct{} // closed when others has ended
	start          sync.Once
}

// NewFront returns the gRPC servers behind gate. tlsConfig must ask for client
// certificates without wanting them; the gate judges them.
func NewFront(tlsConfig *tls.Config, gate *Gate) *Front {
	f := &Front{
		gate:   gate,
		handed: &handover{conns: make(chan *handedConn), closed: make(chan struct{})},
		done:   make(chan struct{}),
	}
	dispatch := dispatcher{TransportCredentials: credentials.NewTLS(tlsConfig), front: f}
	f.agents = grpc.NewServer(f.options(dispatch, maxAgentMessage, agentIdleTimeout)...)
	f.others = grpc.NewServer(append(f.options(received{dispatch.TransportCredentials}, maxMessage, otherIdleTimeout),
		// gRPC would let them grow to 16 MiB for who sends much.
		grpc.StaticStreamWindowSize(64<<10), grpc.StaticConnWindowSize(1<<20))...)
	return f
}

func (f *Front) options(creds credentials.TransportCredentials, message int, idle time.Duration) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(creds),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.StreamInterceptor(f.gate.stream),
		grpc.InTapHandle(f.limitTime),
		grpc.MaxRecvMsgSize(message),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTimeout),
		// Kept goroutines keep their grown stacks: signing runs deep, and growing a
		// fresh stack for every call costs about a fortieth of it.
		grpc.NumStreamWorkers(uint32(4 * runtime.GOMAXPROCS(0))),
		// ztunnel pings every 30 s; gRPC's default of 5 minutes would end its connections.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 15 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idle, Time: time.Minute, Timeout: 20 * time.Second}),
	}
}

// RegisterService implements grpc.ServiceRegistrar: unary methods get the gate
// before the decoder. (An interceptor runs after it, when a message of empty
// elements has already become a hundred times its size.)
func (f *Front) RegisterService(desc *grpc.ServiceDesc, impl any) {
	guarded := *desc
	guarded.Methods = make([]grpc.MethodDesc, len(desc.Methods))
	for i, m := range desc.Methods {
		method, next := "/"+desc.ServiceName+"/"+m.MethodName, m.Handler
		m.Handler = func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			return f.gate.unary(ctx, method, decode, func(ctx context.Context, decode func(any) error) (any, error) {
				return next(srv, ctx, decode, interceptor)
			})
		}
		guarded.Methods[i] = m
		f.gate.unaryMethods[method] = true
		f.gate.methods[method] = true
	}
	for _, st := range desc.Streams {
		f.gate.methods["/"+desc.ServiceName+"/"+st.StreamName] = true
	}
	f.agents.RegisterService(&guarded, impl)
	f.others.RegisterService(&guarded, impl)
}

// limitTime gives unary calls their deadline before anything of the message is
// read. The context's end is the stream's, which frees what it holds. Of methods that
// there are not nothing is taken in, not even their name.
func (f *Front) limitTime(ctx context.Context, info *tap.Info) (context.Context, error) {
	if !f.gate.methods[info.FullMethodName] {
		return nil, status.Error(codes.Unimplemented, "unknown method")
	}
	if !f.gate.unaryMethods[info.FullMethodName] {
		return ctx, nil
	}
	ctx, end := context.WithCancelCause(ctx)
	ctx, cancel := context.WithTimeout(withEnd(ctx, end), f.gate.cfg.UnaryTimeout)
	// At the end of the call, when gRPC cancels the parent.
	context.AfterFunc(ctx, func() { cancel(); end(nil) })
	return ctx, nil
}

// Serve serves l until Stop or GracefulStop.
func (f *Front) Serve(l net.Listener) error {
	f.start.Do(func() {
		go func() {
			defer close(f.done)
			_ = f.others.Serve(f.handed)
		}()
	})
	err := f.agents.Serve(l)
	_ = f.handed.Close()
	<-f.done
	return err
}

// Stop ends every connection and call.
func (f *Front) Stop() { f.both((*grpc.Server).Stop) }

// GracefulStop waits for calls under way.
func (f *Front) GracefulStop() { f.both((*grpc.Server).GracefulStop) }

func (f *Front) both(stop func(*grpc.Server)) {
	var wg sync.WaitGroup
	wg.Go(func() { stop(f.agents) })
	wg.Go(func() { stop(f.others) })
	wg.Wait()
}

// dispatcher shakes hands for both servers and hands to the second one who is no
// agent.
type dispatcher struct {
	credentials.TransportCredentials
	front *Front
}

// ServerHandshake implements credentials.TransportCredentials.
func (d dispatcher) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := d.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	if tlsInfo, ok := info.(credentials.TLSInfo); ok {
		if _, _, err := d.front.gate.judge(&tlsInfo.State); err == nil {
			crowd.Known(raw)
			return conn, info, nil
		}
	}
	if !d.front.handed.give(&handedConn{Conn: conn, info: info}) {
		return nil, nil, errors.New("server: stopping")
	}
	return nil, nil, credentials.ErrConnDispatched
}

// Clone implements credentials.TransportCredentials.
func (d dispatcher) Clone() credentials.TransportCredentials {
	return dispatcher{d.TransportCredentials.Clone(), d.front}
}

// received are the credentials of connections that have shaken hands already.
type received struct {
	credentials.TransportCredentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (received) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	h, ok := conn.(*handedConn)
	if !ok {
		return nil, nil, errors.New("server: connection without a handshake")
	}
	return h.Conn, h.info, nil
}

// Clone implements credentials.TransportCredentials.
func (r received) Clone() credentials.TransportCredentials {
	return received{r.TransportCredentials.Clone()}
}

type handedConn struct {
	net.Conn
	info credentials.AuthInfo
}

// handover is the listener of the second server.
type handover struct {
	conns  chan *handedConn
	closed chan struct{}
	once   sync.Once
}

func (h *handover) give(c *handedConn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.closed:
		return false
	}
}

// Accept implements net.Listener.
func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handover) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

// Addr implements net.Listener.
func (h *handover) Addr() net.Addr { return handoverAddr{} }

type handoverAddr struct{}

func (handoverAddr) Network() string { return "handover" }
func (handoverAddr) String() string  { return "handover" }
