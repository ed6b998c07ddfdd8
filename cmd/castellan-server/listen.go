package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"castellan.dev/internal/config"
	"castellan.dev/internal/crowd"
)

// How many connections each port may have. Memory is what counts: an idle one of
// HTTP/2 takes 34 KB, and as much again with a head that never ends.
var (
	// agents are ten times as many as a large mesh has nodes. One needs two or three.
	// Where more stand behind one address, those above are like callers.
	agents = crowd.Bounds{Total: 16384, PerSource: 64}
	// callers of the same port have shown no agent's certificate: agents that have none
	// yet, and whoever else.
	callers = crowd.Bounds{Total: 2048, PerSource: 256}
	// reviewers are of the webhooks: an API server sends all its reviews over a few,
	// and each of them may hold the heads of many.
	reviewers = crowd.Bounds{Total: 128, PerSource: 16}
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
	l.grpc = crowd.Limit(l.grpc, callers, agents)
	if l.http, err = listenTCP("http", cfg.HTTP); err != nil {
		return l, err
	}
	if cfg.Webhook != nil {
		if l.webhook, err = listenTCP("webhook.listen", cfg.Webhook.Listen); err != nil {
			return l, err
		}
		l.webhook = crowd.Limit(l.webhook, reviewers, crowd.Bounds{})
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
