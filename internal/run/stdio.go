package run

import (
	"context"
	"fmt"
	"io"
	"net"
)

// AdminSocket copies in to a process's admin socket and the socket to out, until the
// process's side ends. The end of in is passed on: what is still to come is waited for.
func AdminSocket(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
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
