package main

import (
	"context"
	"errors"
	"io"
	"os"

	"castellan.dev/internal/run"
)

// adminStdio is the command that lends its standard input and output to whoever
// may run programs here, and who could not reach the socket otherwise: an operator
// through the Kubernetes API.
const adminStdio = "admin-stdio"

func startStdio(ctx context.Context, args []string, stderr io.Writer) error {
	cfg, err := load("castellan-agent "+adminStdio, args, stderr)
	if err != nil {
		return err
	}
	if cfg.AdminSocket == "" {
		return errors.New("the configuration has no adminSocket")
	}
	return run.AdminSocket(ctx, cfg.AdminSocket, os.Stdin, os.Stdout)
}
