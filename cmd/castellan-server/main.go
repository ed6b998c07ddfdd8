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
		err = dispatch(ctx, os.Args[1:], os.Stderr)
	}
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "castellan-server:", err)
		os.Exit(1)
	}
}

// dispatch runs what args ask for, until ctx ends.
func dispatch(ctx context.Context, args []string, stderr io.Writer) error {
	if len(args) > 0 && args[0] == adminStdio {
		return startStdio(ctx, args[1:], stderr)
	}
	return start(ctx, args, stderr)
}

// start runs the server until ctx ends.
func start(ctx context.Context, args []string, stderr io.Writer) error {
	cfg, err := load("castellan-server", args, stderr)
	if err != nil {
		return err
	}
	return serve(ctx, &cfg, stderr)
}

// load reads the configuration that args name.
func load(command string, args []string, stderr io.Writer) (cfg config.Server, err error) {
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("config", "", "configuration `FILE` (kind ServerConfig)")
	if err := flags.Parse(args); err != nil {
		return cfg, err
	}
	if *file == "" || flags.NArg() > 0 {
		return cfg, fmt.Errorf("usage: %s -config FILE", command)
	}
	err = config.Load(*file, &cfg)
	return cfg, err
}
