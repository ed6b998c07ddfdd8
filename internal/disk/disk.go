// Package disk reads and writes files that must survive a crash whole: atomically,
// secrets readable by the owner only, and under a lock that keeps a second process
// out.
//
// It refuses to read a secret that others may read. It assumes a local file
// system on which rename is atomic and flock works.
package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read; a chain and its key are a few kilobytes.
const maxFile = 1 << 20

const temporary = ".tmp-"

// MakeDir makes a directory of mode 0700. One that exists must not be writable
// by others: whoever can rename files in it can replace keys.
func MakeDir(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("directory %q may be written by others (mode %04o); run: chmod 700 %s", path, info.Mode().Perm(), path)
	}
	return nil
}

// Sweep removes what a crash in Write left behind.
func Sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), temporary) && e.Type().IsRegular() {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("sweep: %w", err)
			}
		}
	}
	return nil
}

// Write replaces path by data, so that after a crash at any point it holds the
// old content or the new: temporary file, fsync, rename, fsync of the directory.
func Write(path string, data []byte, mode os.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, temporary)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if err = f.Chmod(mode); err != nil {
		return err
	}
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Read returns a file's content, bounded. A file that is not there is
// fs.ErrNotExist.
func Read(path string) ([]byte, error) {
	data, _, err := read(path)
	return data, err
}

// ReadSecret is Read for private keys: it refuses a file that group or others
// may read, looking at the file it has open and not at a name that may change.
func ReadSecret(path string) ([]byte, error) {
	data, mode, err := read(path)
	if err != nil {
		return nil, err
	}
	if mode.Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s holds a private key and may be read by others (mode %04o); if it has not leaked, run: chmod 600 %s", path, mode.Perm(), path)
	}
	return data, nil
}

// ReadGroupSecret is ReadSecret where the group may read, too: on Kubernetes the
// files of a volume are root's, and its group is how a process that is not root
// reads them at all. Nobody else is in that group but the pod.
func ReadGroupSecret(path string) ([]byte, error) {
	data, mode, err := read(path)
	if err != nil {
		return nil, err
	}
	if mode.Perm()&0o037 != 0 {
		return nil, fmt.Errorf("%s holds a private key and may be read by everybody or written by its group (mode %04o); set the volume's defaultMode to 0440", path, mode.Perm())
	}
	return data, nil
}

func read(path string) ([]byte, os.FileMode, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, 0, err
	}
	if len(data) > maxFile {
		return nil, 0, fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	return data, info.Mode(), nil
}

// ErrLocked says that another process holds the lock.
var ErrLocked = errors.New("in use by another process")

// Lock is held until Close or the end of the process.
type Lock struct{ f *os.File }

// Acquire takes the lock at path, making the file if need be, without waiting.
func Acquire(path string) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &Lock{f: f}, nil
}

// Close releases the lock. The file stays: removing it would race.
func (l *Lock) Close() error { return l.f.Close() }
