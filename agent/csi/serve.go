package csi

import (
	"context"
	"fmt"
	"path"
	"runtime/debug"
	"sync"
	"time"

	csiv1 "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	registerv1 "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"castellan.dev/agent/attest"
	"castellan.dev/internal/run"
)

// Bounds of the two sockets. Callers are root; the bounds are against mishaps.
const (
	maxConnections = 512 // the kubelet opens one for each call
	maxMessage     = 256 << 10
	maxHeaders     = 16 << 10
	callTimeout    = 30 * time.Second
	drainTimeout   = 5 * time.Second
	// watchEvery is how often the sockets are looked for: whoever empties the
	// kubelet's directories, at its start say, would leave us unheard.
	watchEvery = time.Second
)

func (d *Driver) socketPath() string {
	return path.Join(d.cfg.KubeletDir, "plugins", Name, "csi.sock")
}

func (d *Driver) registrationPath() string {
	return path.Join(d.cfg.KubeletDir, "plugins_registry", Name+"-reg.sock")
}

// serve serves both sockets until ctx ends. The registration's comes last: the
// kubelet calls the other as soon as it finds it.
func (d *Driver) serve(ctx context.Context) error {
	calls := grpc.NewServer(d.options()...)
	csiv1.RegisterIdentityServer(calls, identityService{})
	csiv1.RegisterNodeServer(calls, &node{Driver: d})
	first, err := d.listen(d.socketPath())
	if err != nil {
		return err
	}
	registering := grpc.NewServer(d.options()...)
	registerv1.RegisterRegistrationServer(registering, &registrationService{driver: d})
	second, err := d.listen(d.registrationPath())
	if err != nil {
		_ = first.Close() // the error at hand counts
		return err
	}
	return run.All(ctx,
		func(ctx context.Context) error { return d.keepServing(ctx, calls, d.socketPath(), first) },
		func(ctx context.Context) error { return d.keepServing(ctx, registering, d.registrationPath(), second) },
	)
}

func (d *Driver) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxHeaderListSize(maxHeaders), grpc.MaxConcurrentStreams(maxConnections),
		grpc.ConnectionTimeout(callTimeout), grpc.WaitForHandlers(true), grpc.UnaryInterceptor(d.call),
	}
}

// call bounds and counts a call. A fault that one volume meets must not end the
// others: it is an internal error of its call.
func (d *Driver) call(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	defer func() {
		if r := recover(); r != nil {
			// The request holds a token: the panic's own text only.
			d.cfg.Log.ErrorContext(ctx, "call panicked", "method", info.FullMethod, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			resp, err = nil, status.Error(codes.Internal, "internal error")
		}
		d.metrics.called(path.Base(info.FullMethod), status.Code(err))
	}()
	return next(ctx, req)
}

func (d *Driver) listen(p string) (*attest.Listener, error) {
	return attest.Listen(attest.UnixConfig{Path: p, UIDs: d.cfg.Peers, Mode: 0o600, Connections: maxConnections, Log: d.cfg.Log})
}

// keepServing serves on l, and on a new socket whenever somebody takes it away.
func (d *Driver) keepServing(ctx context.Context, server *grpc.Server, p string, l *attest.Listener) error {
	stopped := make(chan struct{})
	context.AfterFunc(ctx, func() {
		defer close(stopped)
		cut := time.AfterFunc(drainTimeout, server.Stop)
		defer cut.Stop()
		server.GracefulStop()
	})
	for {
		err := serveUntilLost(ctx, server, l)
		if ctx.Err() != nil {
			<-stopped
			return nil
		}
		d.cfg.Log.Warn("socket was taken away; making it again", "socket", p, "error", err)
		if l, err = d.listen(p); err != nil {
			// The end of the agent: its next start finds the directories as they are now.
			return err
		}
	}
}

// serveUntilLost serves on l until its socket is gone.
func serveUntilLost(ctx context.Context, server *grpc.Server, l *attest.Listener) error {
	var watching sync.WaitGroup
	defer watching.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watching.Go(func() {
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		for !l.Lost() {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
		_ = l.Close() // closed already where serving has ended
	})
	return server.Serve(l)
}
