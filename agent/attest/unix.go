// Package attest tells which workload is calling: by the socket that was connected
// to. Off Kubernetes anybody may find a socket, so that the uid that the kernel
// vouches for has to be on a list too; on Kubernetes a socket is in a volume that
// is mounted into one pod only, and the mount is the proof.
//
// A connection of any other uid is closed before a byte of it is read. It
// assumes that the node's kernel tells the truth, that a uid on the list is the
// workload's alone, and that the kubelet mounts a pod's volume into no other.
package attest

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"castellan.dev/internal/config"
)

// defaultConnections bounds a socket's connections: one pod's clients.
const defaultConnections = 128

// UnixConfig sets up one workload's socket.
type UnixConfig struct {
	Path string
	// UIDs that may connect; an empty list admits nobody.
	UIDs []uint32
	// Mode of the socket; 0 means that anyone may connect, and the uid decides alone.
	Mode fs.FileMode
	// Connections bounds those open at once; 0 means 128.
	Connections int
	// Refused is told of each connection that was turned away, and why: "uid",
	// "limit" or "credentials". It may be nil.
	Refused func(reason string)
	Log     *slog.Logger
}

// Listener accepts the connections of one workload. It is a net.Listener.
type Listener struct {
	limits limits
	// uids that may connect; nil admits everybody who can reach the socket.
	uids   []uint32
	inner  *net.UnixListener
	file   file
	slots  chan struct{}
	closed sync.Once
	// A uid that keeps knocking must not fill the log; the metric counts it all.
	logging rate.Sometimes
}

// limits is what every socket has.
type limits struct {
	name        string // in logs
	connections int
	refused     func(reason string)
	log         *slog.Logger
}

// file is where a listener's socket is.
type file interface {
	// remove takes the socket away, unless it is another's by now.
	remove()
	// ours reports whether the socket is still there.
	ours() bool
}

func newListener(inner *net.UnixListener, f file, uids []uint32, l limits) *Listener {
	// Removed by Close, and only if it is still ours.
	inner.SetUnlinkOnClose(false)
	if l.connections <= 0 {
		l.connections = defaultConnections
	}
	if l.refused == nil {
		l.refused = func(string) {}
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	return &Listener{
		limits: l, uids: uids, inner: inner, file: f, slots: make(chan struct{}, l.connections),
		logging: rate.Sometimes{First: 3, Interval: time.Second},
	}
}

// Listen opens the socket. A stale one, which no process listens on, is
// replaced; one that is in use is an error, and so is anything that is no socket.
func Listen(cfg UnixConfig) (*Listener, error) {
	if err := config.CheckSocketPath(cfg.Path); err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	if !filepath.IsAbs(cfg.Path) {
		return nil, fmt.Errorf("socket %q: the path must be absolute", cfg.Path)
	}
	if cfg.Mode == 0 {
		cfg.Mode = 0o666
	}
	dir := filepath.Dir(cfg.Path)
	if err := makeDir(dir); err != nil {
		return nil, fmt.Errorf("socket %q: %w", cfg.Path, err)
	}
	if err := checkDir(dir); err != nil {
		return nil, fmt.Errorf("socket %q: %w", cfg.Path, err)
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, fmt.Errorf("socket %q: %w", cfg.Path, err)
	}
	defer unlock()
	if err := clearStale(cfg.Path); err != nil {
		return nil, err
	}
	inner, err := net.ListenUnix("unix", &net.UnixAddr{Name: cfg.Path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket %q: %w", cfg.Path, err)
	}
	// Who may talk is decided by uid at Accept, whatever the mode.
	if err := os.Chmod(cfg.Path, cfg.Mode); err != nil {
		_ = inner.Close() // the error at hand counts
		return nil, fmt.Errorf("socket %q: %w", cfg.Path, err)
	}
	inode, err := os.Lstat(cfg.Path)
	if err != nil {
		_ = inner.Close() // the error at hand counts
		return nil, fmt.Errorf("socket %q: %w", cfg.Path, err)
	}
	uids := append([]uint32{}, cfg.UIDs...) // never nil, which would admit everybody
	return newListener(inner, pathFile{cfg.Path, inode}, uids, limits{cfg.Path, cfg.Connections, cfg.Refused, cfg.Log}), nil
}

// pathFile is a socket by its path.
type pathFile struct {
	path  string
	inode os.FileInfo
}

func (f pathFile) ours() bool {
	info, err := os.Lstat(f.path)
	return err == nil && os.SameFile(info, f.inode)
}

func (f pathFile) remove() {
	if f.ours() {
		_ = os.Remove(f.path) // a stale socket is replaced at the next start
	}
}

// makeDir makes the directory and its parents, passable for everybody whatever
// the umask; what exists is left as it is.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := makeDirParent(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(dir, 0o755)
}

func makeDirParent(dir string) error {
	parent := filepath.Dir(dir)
	if parent == dir {
		return nil
	}
	return makeDir(parent)
}

// checkDir refuses a directory in which others could put a socket of their own in
// the place of ours, and be taken for the agent. The sticky bit keeps them from it.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("the directory %q may be written by others (mode %v), who could replace the socket; chmod go-w it, or choose another", dir, info.Mode())
	}
	return nil
}

// A lock is tried for a second: another agent may be opening a socket here.
const (
	lockTries = 100
	lockPause = 10 * time.Millisecond
)

// lockDir keeps two agents from judging the same path at once. The lock goes
// with the descriptor and leaves nothing behind. Whoever can read the directory
// can hold it: so it is waited for only so long, and then done without, which
// opens no more than the race it is there for.
func lockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for range lockTries {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			d.Close()
			return nil, fmt.Errorf("locking the directory: %w", err)
		}
		time.Sleep(lockPause)
	}
	return func() { d.Close() }, nil
}

// clearStale removes a socket nobody listens on.
func clearStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("socket %q: %w", path, err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("socket %q: something else is in its place (%s); move it away or choose another path", path, info.Mode().Type())
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		conn.Close()
		return fmt.Errorf("socket %q is in use by a live process; stop it, or choose another path", path)
	case errors.Is(err, syscall.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("socket %q: removing the stale one: %w", path, err)
		}
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return nil
	default:
		// Full backlog or no right to connect: somebody may be there. Ours is
		// not to take it from them.
		return fmt.Errorf("socket %q: cannot tell whether it is in use: %w", path, err)
	}
}

// Accept returns the next connection of a uid that may connect. Others are
// closed, and so is what exceeds the limit.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.inner.AcceptUnix()
		if err != nil {
			if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
				// gRPC backs off on temporary errors and tries again.
				return nil, temporary{err}
			}
			return nil, err
		}
		if c := l.admit(conn); c != nil {
			return c, nil
		}
		_ = conn.Close() // refused: there is nobody to tell
	}
}

func (l *Listener) admit(conn *net.UnixConn) net.Conn {
	if l.uids != nil {
		cred, err := peer(conn)
		if err != nil {
			// Not knowing who calls refuses the call.
			l.refuse("credentials", "error", err)
			return nil
		}
		if !slices.Contains(l.uids, cred.Uid) {
			l.refuse("uid", "uid", cred.Uid, "pid", cred.Pid)
			return nil
		}
	}
	select {
	case l.slots <- struct{}{}:
		return &admitted{UnixConn: conn, release: sync.OnceFunc(func() { <-l.slots })}
	default:
		l.refuse("limit", "limit", l.limits.connections)
		return nil
	}
}

func (l *Listener) refuse(reason string, attrs ...any) {
	l.limits.refused(reason)
	l.logging.Do(func() {
		l.limits.log.Warn("connection refused", append([]any{"socket", l.limits.name, "reason", reason}, attrs...)...)
	})
}

func peer(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, credErr
}

// Addr returns the socket's address.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// Close ends the listener and removes the socket, unless another process has
// put its own in the place.
func (l *Listener) Close() error {
	err := net.ErrClosed
	l.closed.Do(func() {
		l.file.remove()
		err = l.inner.Close()
	})
	return err
}

// Lost reports whether the socket was taken away, or replaced, by somebody else:
// nobody can find the listener any more.
func (l *Listener) Lost() bool { return !l.file.ours() }

// admitted gives its slot back when closed.
type admitted struct {
	*net.UnixConn
	release func()
}

func (a *admitted) Close() error {
	a.release()
	return a.UnixConn.Close()
}

type temporary struct{ error }

func (t temporary) Unwrap() error { return t.error }

// Temporary makes the server's accept loop wait and go on.
func (temporary) Temporary() bool { return true }
