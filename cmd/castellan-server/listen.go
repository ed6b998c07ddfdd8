package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/net/netutil"

	"castellan.dev/internal/config"
)

// maxConnections bounds the open connections of the gRPC listener: ten times as
// many as a large mesh has nodes.
const (
	maxConnections = 16384
	// maxConnectionsPerSource keeps one host from taking all of them. An agent needs
	// two or three; many may stand behind one address.
	maxConnectionsPerSource = 1024
	// Of the webhooks: an API server sends all its reviews over a few connections.
	maxReviewers          = 2048
	maxReviewersPerSource = 256
	// Of health and metrics.
	maxObservers          = 1024
	maxObserversPerSource = 128
)

// listeners are opened before anything else, so that a second server on the same
// addresses ends before it touches any file.
type listeners struct {
	grpc, http, admin net.Listener
	webhook           net.Listener // nil without one
}

func listen(cfg *config.Server) (l listeners, err error) {
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.grpc, err = listenTCP("listen", cfg.Listen); err != nil {
		return l, err
	}
	l.grpc = limitSources(netutil.LimitListener(l.grpc, maxConnections), maxConnectionsPerSource)
	if l.http, err = listenTCP("http", cfg.HTTP); err != nil {
		return l, err
	}
	l.http = limitSources(netutil.LimitListener(l.http, maxObservers), maxObserversPerSource)
	if cfg.Webhook != nil {
		if l.webhook, err = listenTCP("webhook.listen", cfg.Webhook.Listen); err != nil {
			return l, err
		}
		l.webhook = limitSources(netutil.LimitListener(l.webhook, maxReviewers), maxReviewersPerSource)
	}
	l.admin, err = listenUnix("adminSocket", cfg.AdminSocket)
	return l, err
}

func (l listeners) close() {
	for _, one := range []net.Listener{l.grpc, l.http, l.admin, l.webhook} {
		if one != nil {
			one.Close()
		}
	}
}

func listenTCP(field, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s: %s is in use by another process; stop that process (another castellan-server?) or set %q to a free port", field, address, field)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return l, nil
}

// listenUnix replaces a socket that nobody answers on (its process was killed),
// and refuses one that somebody does, or a file that is no socket.
func listenUnix(field, path string) (net.Listener, error) {
	if err := config.CheckSocketPath(path); err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("%s: %w", field, err)
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s: %s exists and is no socket; remove it or choose another path", field, path)
	default:
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			conn.Close()
			return nil, fmt.Errorf("%s: %s is in use by another process; stop that process (another castellan-server?) or choose another path", field, path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return l, nil
}
