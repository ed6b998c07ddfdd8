package attest

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// SocketName is the socket's name in a pod's volume.
const SocketName = "socket"

// unfinished is its name until it listens.
const unfinished = ".socket.new"

// MountConfig sets up the socket of a volume that is mounted into one pod.
type MountConfig struct {
	// Dir is the volume's directory, open. The listener keeps a descriptor of its own.
	Dir *os.File
	// Name of the volume in logs.
	Name string
	// Connections bounds those open at once; 0 means 128.
	Connections int
	// Refused is told of each connection that was turned away: "limit".
	Refused func(reason string)
	Log     *slog.Logger
}

// ListenMount opens the socket of a volume. Whoever can reach it may connect,
// whatever his uid: inside of the pod that is for the pod to decide, and outside
// of it the directories above are root's.
//
// A socket that is there is replaced, at one stroke: a client finds the old one,
// which nobody answers, or this one listening. So the caller must know that no
// other agent serves the volume.
func ListenMount(cfg MountConfig) (*Listener, error) {
	// The path is longer than a socket's address can be (107 bytes, unix(7)); by the
	// descriptor it is short, and cannot lead anywhere else.
	fd, err := unix.FcntlInt(cfg.Dir.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("volume %q: %w", cfg.Name, err)
	}
	dir := os.NewFile(uintptr(fd), cfg.Name)
	l, err := listenMount(dir, cfg)
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("volume %q: %w", cfg.Name, err)
	}
	return l, nil
}

func listenMount(dir *os.File, cfg MountConfig) (*Listener, error) {
	fd := int(dir.Fd())
	if err := unlink(fd, unfinished); err != nil {
		return nil, fmt.Errorf("removing what was left unfinished: %w", err)
	}
	inner, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", fd, unfinished), Net: "unix"})
	if err != nil {
		return nil, err
	}
	f, err := place(dir)
	if err != nil {
		inner.SetUnlinkOnClose(false)
		_ = inner.Close()          // the error at hand counts
		_ = unlink(fd, unfinished) // so it does
		return nil, err
	}
	return newListener(inner, f, nil, limits{cfg.Name, cfg.Connections, cfg.Refused, cfg.Log}), nil
}

// place lets everybody connect and gives the socket its name.
func place(dir *os.File) (*mountFile, error) {
	fd := int(dir.Fd())
	if err := unix.Fchmodat(fd, unfinished, 0o666, 0); err != nil {
		return nil, fmt.Errorf("setting its mode: %w", err)
	}
	f := &mountFile{dir: dir}
	if err := unix.Fstatat(fd, unfinished, &f.stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, err
	}
	if err := unix.Renameat(fd, unfinished, fd, SocketName); err != nil {
		return nil, fmt.Errorf("putting it in its place: %w", err)
	}
	return f, nil
}

// ClearMount removes the socket of a volume that nobody serves.
func ClearMount(dir *os.File) error {
	for _, name := range []string{SocketName, unfinished} {
		if err := unlink(int(dir.Fd()), name); err != nil {
			return err
		}
	}
	return nil
}

// unlink removes a socket, if there is one; what is no socket is none of ours.
func unlink(dir int, name string) error {
	var stat unix.Stat_t
	err := unix.Fstatat(dir, name, &stat, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case stat.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return fmt.Errorf("%q is no socket", name)
	}
	if err := unix.Unlinkat(dir, name, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mountFile is a socket in an open directory.
type mountFile struct {
	dir  *os.File
	stat unix.Stat_t
}

func (f *mountFile) ours() bool {
	var now unix.Stat_t
	err := unix.Fstatat(int(f.dir.Fd()), SocketName, &now, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && now.Dev == f.stat.Dev && now.Ino == f.stat.Ino
}

func (f *mountFile) remove() {
	if f.ours() {
		_ = unix.Unlinkat(int(f.dir.Fd()), SocketName, 0) // a stale socket is replaced when the volume is published again
	}
	f.dir.Close()
}
