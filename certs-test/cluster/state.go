package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"castellan.dev/certs-test/cluster/internal/layout"
)

// state is what is known of a running cluster, kept in its folder.
type state struct {
	Options layout.Options
	process // the first of the cluster
	Holders map[string]int
}

// process is one process. Its start tells it apart from a later one with its number.
type process struct {
	PID     int
	Started string
}

func dir(name string) string { return filepath.Join(root, name) }

func (s state) write() error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return os.WriteFile(s.Options.Path("state.json"), data, 0o600)
}

// readState finds a cluster that is running.
func readState(name string) (state, error) {
	var s state
	data, err := os.ReadFile(filepath.Join(dir(name), "state.json"))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, err
	}
	if !s.alive() {
		return s, errors.New("its process is gone")
	}
	return s, nil
}

// kill ends the process and waits until it is gone. When it is the first of a PID
// namespace, all others in it are gone by then.
func (p process) kill(ctx context.Context) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd: %w", err)
	}
	defer unix.Close(fd)
	// The descriptor stands for whoever has the number now; only then is it looked at.
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill: %w", err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for the end: %w", err)
		}
		if n > 0 {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("wait for the end: %w", ctx.Err())
		}
	}
}

func (p process) alive() bool {
	now, err := identify(p.PID)
	return err == nil && now == p
}

// identify reads when a process started, in the kernel's ticks since boot. A zombie
// counts as gone.
func identify(pid int) (process, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return process{}, err
	}
	// The name, in brackets, may hold anything; the state is the first field after it.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 || string(fields[0]) == "Z" || string(fields[0]) == "X" {
		return process{}, fs.ErrNotExist
	}
	return process{PID: pid, Started: string(fields[19])}, nil
}

// lock keeps others from starting or stopping the cluster of that name meanwhile. The
// file goes when the lock does.
func lock(name string) (unlock func(), err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	path := dir(name) + ".lock"
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			return nil, fmt.Errorf("cluster: %q is being started or stopped by another process: %w", name, err)
		}
		// Whoever had the lock before may have removed this very file.
		if same(path, f) {
			return func() { os.Remove(path); f.Close() }, nil
		}
		f.Close()
	}
}

func same(path string, f *os.File) bool {
	there, err := os.Stat(path)
	if err != nil {
		return false
	}
	here, err := f.Stat()
	return err == nil && os.SameFile(there, here)
}

// clean removes a cluster that is not running: its folder and its cgroups. Mounts and
// network namespaces went with its processes.
func clean(name string) error {
	return errors.Join(cleanCgroups(name), os.RemoveAll(dir(name)))
}

func cleanCgroups(name string) error {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/" + layout.Cgroup(name))
	for _, top := range append(hierarchies, "/sys/fs/cgroup/"+layout.Cgroup(name)) {
		err = errors.Join(err, removeCgroup(top))
	}
	return err
}

// removeCgroup removes a cgroup and those below it. The files in one are the kernel's
// and go with it.
func removeCgroup(path string) error {
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	return unix.Rmdir(path)
}
