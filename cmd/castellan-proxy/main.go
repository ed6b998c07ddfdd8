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

	"castellan.dev/internal/config"
	"castellan.dev/internal/harden"
	"castellan.dev/internal/run"
	"castellan.dev/internal/telemetry"
	"castellan.dev/proxy"
	"castellan.dev/proxy/accesslog"
	"castellan.dev/proxy/health"
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
	memory, err := harden.Memory()
	if err != nil {
		log.Warn("serving without a limit of memory", "error", err)
	}
	cfg.Limits.Fit(memory)
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
	listeners, err := listenPlain(cfg)
	if err != nil {
		return err
	}
	admin := telemetry.NewAdmin(listeners.admin, registry, log)
	admin.AddCheck("identity", p.CheckIdentity)
	admin.AddCheck("policy", p.CheckPolicy)
	admin.AddCheck("services", p.CheckServices)
	admin.AddCheck("accepting", p.CheckDraining)
	if len(cfg.Probes) > 0 {
		admin.Handle("GET "+config.ProbePrefix, health.Probes(cfg.Probes, p.DialApp, log))
	}
	parts := []run.Part{admin.Run}
	if listeners.ready != nil {
		ready := health.Ready(p.CheckIdentity, p.CheckPolicy, p.CheckServices, p.CheckDraining)
		parts = append(parts, func(ctx context.Context) error { return telemetry.Serve(ctx, "ready", listeners.ready, ready, log) })
	}
	if err := p.Listen(); err != nil {
		listeners.close()
		return err
	}
	log.Info("serving", "inbound", len(cfg.Inbound), "outbound", len(cfg.Outbound), "captured", cfg.Capture != nil,
		"admin", listeners.admin.Addr().String(), "agent", cfg.AgentSocket)
	return serveAll(ctx, p, log, parts)
}

// plain are the listeners that answer without mutual TLS.
type plain struct{ admin, ready net.Listener }

func listenPlain(cfg config.Proxy) (l plain, err error) {
	if l.admin, err = net.Listen("tcp", cfg.Admin); err != nil {
		return l, fmt.Errorf("admin listener: %w", err)
	}
	if cfg.Ready == "" {
		return l, nil
	}
	if l.ready, err = net.Listen("tcp", cfg.Ready); err != nil {
		l.close()
		return l, fmt.Errorf("ready listener: %w", err)
	}
	return l, nil
}

func (l plain) close() {
	l.admin.Close()
	if l.ready != nil {
		l.ready.Close()
	}
}

// serveAll keeps what answers about the proxy until it has drained, so that
// readiness can be asked for meanwhile.
func serveAll(ctx context.Context, p *proxy.Proxy, log *slog.Logger, about []run.Part) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	err := run.All(background, append(about, func(background context.Context) error {
		defer stop()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(background, cancel)()
		return p.Run(ctx)
	})...)
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
