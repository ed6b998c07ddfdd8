// Package up runs a whole mesh on one machine: server, token issuer, agent and a
// sample of four workloads, each a real process on loopback, under one
// directory. It supervises them, keeps their tokens fresh, and writes up.json,
// from which people and commands learn where everything is. It refuses a
// directory that another run holds, or that belongs to another trust domain.
package up

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/identity"
	"castellan.dev/internal/run"
)

// Config says what to run and where.
type Config struct {
	// DataDir holds all state; made if missing.
	DataDir string
	// TrustDomain of the mesh; a directory keeps the one it was made with.
	TrustDomain string
	// SVIDTTL is the lifetime of workload certificates; zero means the server's default.
	SVIDTTL time.Duration
	// PolicyDir is the directory of policies; empty: DataDir/policy, filled with the samples at first start.
	PolicyDir string
	// BinDir is where the sibling binaries are; empty: beside this one.
	BinDir string
	// Self is the path of the castellan binary, which also is the sample application; empty: this one.
	Self string

	Log *slog.Logger
	Now func() time.Time
	// Progress takes lines for people while it starts.
	Progress io.Writer
	// Ready is called once, when everything answers and up.json is written.
	Ready func(File)
}

// InputError is a mistake of the caller's: a flag's value or the state of a directory.
type InputError struct{ Err error }

func (e *InputError) Error() string { return e.Err.Error() }
func (e *InputError) Unwrap() error { return e.Err }

func inputErrorf(format string, args ...any) error {
	return &InputError{Err: fmt.Errorf(format, args...)}
}

// readyTimeout bounds the first start; a started mesh takes two or three seconds.
const readyTimeout = 60 * time.Second

// Run starts the mesh and supervises it until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	m, err := newMesh(cfg)
	if err != nil {
		return err
	}
	if err := m.checkSockets(); err != nil {
		return err
	}
	if err := m.layout.make(); err != nil {
		return err
	}
	lock, err := lockDir(m.layout.dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := m.prepare(); err != nil {
		return err
	}
	// Nobody is to be led to a mesh that has ended.
	defer os.Remove(m.layout.path("up.json"))
	sup := newSupervisor(m.log, m.layout.path("logs"))
	return run.All(ctx,
		sup.Run,
		m.issuers.Run,
		func(ctx context.Context) error { return m.start(ctx, sup) },
	)
}

// start brings the parts up in their order, then rewrites up.json whenever one is restarted.
func (m *mesh) start(ctx context.Context, sup *supervisor) error {
	startCtx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for _, stage := range m.stages() {
		for _, p := range stage {
			if err := sup.Start(startCtx, p); err != nil {
				return err
			}
		}
		for _, p := range stage {
			if err := sup.WaitReady(startCtx, p.name); err != nil {
				return err
			}
			fmt.Fprintf(m.progress, "ready: %s\n", p.name)
		}
	}
	file := m.file(sup.PIDs())
	if err := file.write(m.layout.path("up.json")); err != nil {
		return err
	}
	if m.ready != nil {
		m.ready(file)
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case name := <-sup.Restarted():
			m.log.Info("restarted", "part", name)
			if err := m.file(sup.PIDs()).write(m.layout.path("up.json")); err != nil {
				m.log.Error("up.json could not be rewritten", "error", err)
			}
		}
	}
}

// lockDir holds dir for this process: two runs on one directory would fight over
// keys and ports.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("up: %s is in use by another `castellan up`; stop that one or choose another --data-dir", dir)
		}
		return nil, fmt.Errorf("up: lock %s: %w", path, err)
	}
	return f, nil
}

func newMesh(cfg Config) (*mesh, error) {
	td, err := identity.ParseTrustDomain(cfg.TrustDomain)
	if err != nil {
		return nil, inputErrorf("--trust-domain: %w", err)
	}
	if cfg.SVIDTTL != 0 && (cfg.SVIDTTL < minSVIDTTL || cfg.SVIDTTL > maxSVIDTTL) {
		return nil, inputErrorf("--svid-ttl: %v is outside %v to %v", cfg.SVIDTTL, minSVIDTTL, maxSVIDTTL)
	}
	dir, err := filepath.Abs(cfg.DataDir)
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	m := &mesh{
		trustDomain: td,
		ttl:         cfg.SVIDTTL,
		layout:      layout{dir: dir},
		log:         cfg.Log,
		now:         cfg.Now,
		progress:    cfg.Progress,
		ready:       cfg.Ready,
		self:        cfg.Self,
		binDir:      cfg.BinDir,
	}
	if m.now == nil {
		m.now = time.Now
	}
	if m.progress == nil {
		m.progress = io.Discard
	}
	if m.self == "" {
		if m.self, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("up: %w", err)
		}
	}
	if m.binDir == "" {
		m.binDir = filepath.Dir(m.self)
	}
	if cfg.PolicyDir != "" {
		if m.policyDir, err = filepath.Abs(cfg.PolicyDir); err != nil {
			return nil, fmt.Errorf("up: %w", err)
		}
		if st, err := os.Stat(m.policyDir); err != nil || !st.IsDir() {
			return nil, inputErrorf("--policy-dir: %s is not a directory", m.policyDir)
		}
	} else {
		m.policyDir = m.layout.path("policy")
	}
	return m, m.checkBinaries()
}

func (m *mesh) checkBinaries() error {
	for _, name := range []string{"castellan-server", "castellan-agent", "castellan-proxy"} {
		if _, err := os.Stat(filepath.Join(m.binDir, name)); err != nil {
			return inputErrorf("up: %s is not beside castellan in %s; run `make build`", name, m.binDir)
		}
	}
	return nil
}
