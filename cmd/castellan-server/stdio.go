package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
)

// adminStdio is the command that lends its standard input and output to whoever
// may run programs here, and who could not reach the socket otherwise: an operator
// through the Kubernetes API. The socket asks for the peer's uid, which is this
// process's own.
const adminStdio = "admin-stdio"

func startStdio(ctx context.Context, args []string, stderr io.Writer) error {
	cfg, err := load("castellan-server "+adminStdio, args, stderr)
	if err != nil {
		return err
	}
	return stdio(ctx, cfg.AdminSocket, os.Stdin, os.Stdout)
}

// stdio copies in to the socket and the socket to out until the server's side ends.
// The end of in is passed on: what is still to come is waited for.
func stdio(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	go func() {
		// Not waited for: in may never end, and the process does after out.
		_, _ = io.Copy(conn, in)
		if c, ok := conn.(*net.UnixConn); ok {
			_ = c.CloseWrite()
		}
	}()
	if _, err := io.Copy(out, conn); err != nil && ctx.Err() == nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	return nil
}
