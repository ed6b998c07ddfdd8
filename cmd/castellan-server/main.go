// Command castellan-server is the certificate authority and the source of policy
// of one trust domain.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"castellan.dev/internal/config"
	"castellan.dev/internal/harden"
	"castellan.dev/internal/run"
)

func main() {
	ctx, stop := run.WithSignals(context.Background())
	err := harden.Process()
	if err == nil {
		err = start(ctx, os.Args[1:], os.Stderr)
	}
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "castellan-server:", err)
		os.Exit(1)
	}
}

// start runs the server until ctx ends.
func start(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("castellan-server", flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("config", "", "configuration `FILE` (kind ServerConfig)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *file == "" || flags.NArg() > 0 {
		return errors.New("usage: castellan-server -config FILE")
	}
	var cfg config.Server
	if err := config.Load(*file, &cfg); err != nil {
		return err
	}
	return serve(ctx, &cfg, stderr)
}
