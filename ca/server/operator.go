package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// OperatorCredentials admits to a Unix socket the peers whose user id, as the
// kernel tells it (SO_PEERCRED), is in uids. It is the transport credentials of a
// server only. The socket file's own mode is the first line; this is the second.
func OperatorCredentials(uids ...uint32) credentials.TransportCredentials {
	return operatorCredentials{uids: uids}
}

type operatorCredentials struct{ uids []uint32 }

// OperatorInfo is the AuthInfo of such a peer.
type OperatorInfo struct {
	credentials.CommonAuthInfo
	UID uint32
}

// AuthType implements credentials.AuthInfo.
func (OperatorInfo) AuthType() string { return "unix" }

// ServerHandshake implements credentials.TransportCredentials.
func (c operatorCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uid, err := peerUID(conn)
	if err != nil {
		return nil, nil, fmt.Errorf("server: admin socket: %w", err)
	}
	if !slices.Contains(c.uids, uid) {
		return nil, nil, fmt.Errorf("server: admin socket: uid %d is not admitted", uid)
	}
	// The kernel vouches for both ends of the same host.
	return conn, OperatorInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, UID: uid}, nil
}

func peerUID(conn net.Conn) (uint32, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%T is no Unix socket", conn)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

var errServerOnly = errors.New("server: operator credentials are a server's")

// ClientHandshake implements credentials.TransportCredentials.
func (operatorCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errServerOnly
}

// Info implements credentials.TransportCredentials.
func (operatorCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (c operatorCredentials) Clone() credentials.TransportCredentials {
	return operatorCredentials{uids: slices.Clone(c.uids)}
}

// OverrideServerName implements credentials.TransportCredentials.
func (operatorCredentials) OverrideServerName(string) error { return errServerOnly }
