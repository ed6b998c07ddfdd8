// Command castellan-agent runs on every node: it keeps the identities of the
// node's workloads and serves each its own on a Unix socket.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"

	"castellan.dev/agent"
	"castellan.dev/internal/config"
	"castellan.dev/internal/harden"
	"castellan.dev/internal/run"
	"castellan.dev/internal/telemetry"
)

func main() {
	ctx, stop := run.WithSignals(context.Background())
	err := harden.Process()
	if err == nil {
		err = dispatch(ctx, os.Args[1:], os.Stderr)
	}
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "castellan-agent:", err)
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

// start runs the agent until ctx ends.
func start(ctx context.Context, args []string, stderr io.Writer) error {
	cfg, err := load("castellan-agent", args, stderr)
	if err != nil {
		return err
	}
	return serve(ctx, cfg, stderr)
}

// load reads the configuration that args name.
func load(command string, args []string, stderr io.Writer) (config.Agent, error) {
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("config", "", "configuration `FILE` (kind AgentConfig)")
	if err := flags.Parse(args); err != nil {
		return config.Agent{}, err
	}
	if *file == "" || flags.NArg() > 0 {
		return config.Agent{}, fmt.Errorf("usage: %s -config FILE", command)
	}
	var cfg config.Agent
	err := config.Load(*file, &cfg)
	return cfg, err
}

func serve(ctx context.Context, cfg config.Agent, stderr io.Writer) error {
	log := telemetry.NewLogger(stderr, cfg.Log)
	registry := telemetry.NewRegistry()
	if _, err := harden.Memory(); err != nil {
		log.Warn("serving without a limit of memory", "error", err)
	}
	a, err := agent.New(agent.Config{Agent: cfg, Log: log, Registerer: registry})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.Admin)
	if err != nil {
		return fmt.Errorf("admin: %w", err)
	}
	if cfg.CSI != nil {
		if err := confineFiles(cfg, log); err != nil {
			return err
		}
	}
	admin := telemetry.NewAdmin(listener, registry, log)
	for name, check := range a.Checks() {
		admin.AddCheck(name, check)
	}
	for name, check := range a.Notices() {
		admin.AddNotice(name, check)
	}
	return run.All(ctx, admin.Run, a.Run)
}
