// Command castellan-proxy is the sidecar of one workload: mutual TLS, policy and
// secure naming around an application that knows nothing of them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"

	"castellan.dev/internal/harden"
	"castellan.dev/internal/run"
	"castellan.dev/internal/telemetry"
	"castellan.dev/proxy"
	"castellan.dev/proxy/accesslog"
)

func main() {
	ctx, stop := run.WithSignals(context.Background())
	err := harden.Process()
	if err == nil {
		err = command(ctx, os.Args[1:], os.Stdout, os.Stderr)
	}
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "castellan-proxy:", err)
		os.Exit(1)
	}
}

// command runs what the first argument says: the step that has the kernel redirect
// a pod's traffic, or else the proxy.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 0 && args[0] == "capture" {
		return redirect(ctx, args[1:], stderr)
	}
	return serve(ctx, args, stdout, stderr)
}

func serve(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("castellan-proxy", flag.ContinueOnError)
	flags.SetOutput(stderr)
	source := sourceFlags(flags)
	if err := parse(flags, args); err != nil {
		return err
	}
	cfg, err := source.load()
	if err != nil {
		return err
	}
	log := telemetry.NewLogger(stderr, cfg.Log)
	access, closeAccess, err := accessLog(cfg.AccessLog, stdout)
	if err != nil {
		return err
	}
	defer func() {
		if err := closeAccess(); err != nil {
			log.Warn("closing the access log", "error", err)
		}
	}()
	registry := telemetry.NewRegistry()
	p, err := proxy.New(proxy.Config{Proxy: cfg, AccessLog: access, Log: log, Registerer: registry})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.Admin)
	if err != nil {
		return fmt.Errorf("admin listener: %w", err)
	}
	admin := telemetry.NewAdmin(listener, registry, log)
	admin.AddCheck("identity", p.CheckIdentity)
	admin.AddCheck("policy", p.CheckPolicy)
	admin.AddCheck("accepting", p.CheckDraining)
	if err := p.Listen(); err != nil {
		listener.Close()
		return err
	}
	log.Info("serving", "inbound", len(cfg.Inbound), "outbound", len(cfg.Outbound), "admin", listener.Addr().String(), "agent", cfg.AgentSocket)
	return serveBoth(ctx, p, admin, log)
}

// serveBoth keeps the admin listener until the proxy has drained, so that
// readiness can be asked for meanwhile.
func serveBoth(ctx context.Context, p *proxy.Proxy, admin *telemetry.Admin, log *slog.Logger) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	err := run.All(background,
		func(background context.Context) error {
			defer stop()
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			defer context.AfterFunc(background, cancel)()
			return p.Run(ctx)
		},
		admin.Run,
	)
	if err == nil {
		log.Info("stopped")
	}
	return err
}

// accessLog opens what the configuration names; nil for "off".
func accessLog(name string, stdout io.Writer) (*accesslog.Log, func() error, error) {
	nothing := func() error { return nil }
	switch name {
	case "off":
		return nil, nothing, nil
	case "stdout":
		return accesslog.New(stdout), nothing, nil
	}
	f, err := os.OpenFile(name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, nil, fmt.Errorf("access log: %w", err)
	}
	return accesslog.New(f), f.Close, nil
}
