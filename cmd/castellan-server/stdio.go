package main

import (
	"context"
	"io"
	"os"

	"castellan.dev/internal/run"
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
	return run.AdminSocket(ctx, cfg.AdminSocket, os.Stdin, os.Stdout)
}
