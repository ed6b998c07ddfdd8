package server

import (
	"crypto/tls"
	"runtime"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

const (
	// maxMessage is gRPC's own default; agents' reports need more than requests
	// for certificates, which are bounded apart.
	maxMessage = 4 << 20
	// maxHeaders has room for two tokens of the greatest size.
	maxHeaders = 32 << 10
	// maxStreams bounds the calls under way on one connection: an agent that
	// starts over asks for every pod of its node.
	maxStreams = 512

	handshakeTimeout = 10 * time.Second
	idleTimeout      = 15 * time.Minute
)

// NewGRPC returns a gRPC server behind gate, with bounds. tlsConfig must ask for
// client certificates without wanting them; the gate judges them.
func NewGRPC(tlsConfig *tls.Config, gate *Gate, more ...grpc.ServerOption) *grpc.Server {
	options := []grpc.ServerOption{
		grpc.Creds(credentials.NewTLS(tlsConfig)),
		grpc.UnaryInterceptor(gate.Unary),
		grpc.StreamInterceptor(gate.Stream),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTimeout),
		// Kept goroutines keep their grown stacks: signing runs deep, and growing a
		// fresh stack for every call costs about a fortieth of it.
		grpc.NumStreamWorkers(uint32(4 * runtime.GOMAXPROCS(0))),
		// ztunnel pings every 30 s; gRPC's default of 5 minutes would end its connections.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 15 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout, Time: time.Minute, Timeout: 20 * time.Second}),
	}
	return grpc.NewServer(append(options, more...)...)
}
