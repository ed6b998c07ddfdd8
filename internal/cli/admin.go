package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"castellan.dev/internal/kube"
)

// maxMessage is room for what a server with tens of thousands of workloads says of them.
const maxMessage = 64 << 20

// tunnelTimeout bounds a question to a server or agent, the way into its pod included.
const tunnelTimeout = 30 * time.Second

// admin is a connection to an admin socket.
type admin struct {
	*grpc.ClientConn
	// tunnel is what it runs through, nil on this machine.
	tunnel net.Conn
}

// Close ends the connection and what it runs through.
func (a *admin) Close() {
	a.ClientConn.Close()
	if a.tunnel != nil {
		a.tunnel.Close()
	}
}

// failed says what a failed call means.
func (a *admin) failed(err error) error {
	switch {
	case status.Code(err) == codes.Unimplemented:
		return fmt.Errorf("what answers at the admin socket is of a version that does not know this: %w", err)
	case a.tunnel != nil:
		return fmt.Errorf("through the admin socket in the pod: %w", err)
	}
	return fmt.Errorf("the server's admin socket does not answer: %w; is the mesh running, and are you its user?", err)
}

func dialSocket(path string) (*grpc.ClientConn, error) {
	// The socket is on this machine and admits by uid: there is nothing to encrypt.
	return grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
}

// agentOf connects to the admin socket of the agent on a node of a cluster.
func agentOf(ctx context.Context, client *kube.Client, node string) (*admin, error) {
	return tunnelled(client.DialAgent(ctx, node))
}

// tunnelled speaks gRPC over one connection, which is not made anew when it ends:
// its own end says why.
func tunnelled(conn net.Conn, err error) (*admin, error) {
	if err != nil {
		return nil, err
	}
	once := make(chan net.Conn, 1)
	once <- conn
	client, err := grpc.NewClient("passthrough:///castellan", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the connection into the pod has ended")
			}
		}))
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &admin{ClientConn: client, tunnel: conn}, nil
}
