package main

import (
	"context"
	"flag"
	"io"

	"castellan.dev/internal/config"
	"castellan.dev/internal/telemetry"
	"castellan.dev/proxy/capture"
)

// redirect is a pod's init step. An error keeps the pod from starting, so that it
// never runs uncaptured.
func redirect(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("castellan-proxy capture", flag.ContinueOnError)
	flags.SetOutput(stderr)
	source := sourceFlags(flags)
	undo := flags.Bool("undo", false, "redirect no more, and leave nothing behind")
	if err := parse(flags, args); err != nil {
		return err
	}
	if *undo {
		if err := capture.Undo(); err != nil {
			return err
		}
		telemetry.NewLogger(stderr, config.Log{}).Info("capture undone")
		return nil
	}
	cfg, err := source.load()
	if err != nil {
		return err
	}
	c, err := capture.New(cfg, telemetry.NewLogger(stderr, cfg.Log))
	if err != nil {
		return err
	}
	return c.Apply(ctx)
}
