package csi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/internal/disk"
)

// store keeps the published volumes, tokens with them and never a key, so that the
// next agent serves them without waiting for the kubelet. One agent has it at a
// time. It assumes a directory that a restart of the machine empties.
type store struct {
	dir  string
	lock *os.File
}

const (
	recordSuffix = ".json"
	lockName     = "lock"
	lockPause    = 50 * time.Millisecond
)

// openStore waits, for so long, until no other agent has the directory. It refuses
// one that others can read or write.
func openStore(ctx context.Context, dir string, wait time.Duration, log *slog.Logger) (*store, error) {
	if err := disk.MakeDir(dir); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(owner.Uid) != os.Geteuid() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("state: directory %q (mode %04o) holds tokens and must be its owner's alone, and ours; run: chmod 700 %s", dir, info.Mode().Perm(), dir)
	}
	if !inMemory(dir) {
		log.Warn("the state directory is not on a tmpfs; pods' tokens reach the disk", "dir", dir)
	}
	s := &store{dir: dir}
	if s.lock, err = lockDir(ctx, filepath.Join(dir, lockName), wait, log); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if err := disk.Sweep(dir); err != nil {
		s.close()
		return nil, fmt.Errorf("state: %w", err)
	}
	return s, nil
}

func inMemory(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC)
}

// lockDir takes the lock, which goes with the process that holds it.
func lockDir(ctx context.Context, path string, wait time.Duration, log *slog.Logger) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %q: %w", path, err)
		}
		if !told {
			log.Info("another agent of this node is still running; waiting for its end", "lock", path)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-timeout.C:
			f.Close()
			return nil, fmt.Errorf("another agent of this node still runs after %s (lock %q)", wait, path)
		case <-time.After(lockPause):
		}
	}
}

// close gives the lock back.
func (s *store) close() { s.lock.Close() }

func (s *store) path(volume string) string { return filepath.Join(s.dir, volume+recordSuffix) }

// save replaces a volume's record.
func (s *store) save(r record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if err := disk.Write(s.path(r.Volume), data, 0o600); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// drop removes a volume's record, token and all.
func (s *store) drop(volume string) error {
	if err := os.Remove(s.path(volume)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// load returns what the agent before has published. What cannot be read is removed:
// the kubelet publishes every volume again.
func (s *store) load(log *slog.Logger) ([]record, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	var records []record
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			continue
		}
		r, err := s.read(id)
		if err != nil {
			log.Warn("record of a volume is unusable, waiting for the kubelet to publish it again", "volume", id, "error", err)
			_ = os.Remove(filepath.Join(s.dir, e.Name())) // replaced when it is published
			continue
		}
		records = append(records, r)
	}
	return records, nil
}

func (s *store) read(id string) (record, error) {
	data, err := disk.ReadSecret(s.path(id))
	if err != nil {
		return record{}, err
	}
	var r record
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if dec.Decode(&r) != nil {
		return record{}, errors.New("not the JSON of one") // the cause could quote the token
	}
	if r.Volume != id {
		return record{}, errors.New("it is of another volume")
	}
	return r, nil
}
