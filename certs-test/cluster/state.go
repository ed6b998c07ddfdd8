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
	// PID and Started name the first process of the cluster: a number alone may be
	// somebody else's by now.
	PID     int
	Started string
	Holders map[string]int
}

func dir(name string) string { return filepath.Join(root, name) }

func newState(opts layout.Options, pid int, ready layout.Ready) (state, error) {
	started, err := startTime(pid)
	return state{Options: opts, PID: pid, Started: started, Holders: ready.Holders}, err
}

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
	if started, err := startTime(s.PID); err != nil || started != s.Started {
		return s, errors.New("its process is gone")
	}
	return s, nil
}

func (s state) process() process { return process{pid: s.PID, started: s.Started} }

// process is one process, told apart from a later one with its number.
type process struct {
	pid     int
	started string
}

// kill ends the process and waits until it is gone. When it is the first of a PID
// namespace, all others in it are gone by then.
func (p process) kill(ctx context.Context) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd: %w", err)
	}
	defer unix.Close(fd)
	// The descriptor stands for whoever has the number now; only then is it looked at.
	if started, err := startTime(p.pid); err != nil || started != p.started {
		return nil //nolint:nilerr // gone already
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

// startTime is when a process started, in the kernel's ticks since boot. A zombie
// counts as gone.
func startTime(pid int) (string, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", err
	}
	// The name, in brackets, may hold anything; the state is the first field after it.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 || string(fields[0]) == "Z" || string(fields[0]) == "X" {
		return "", fs.ErrNotExist
	}
	return string(fields[19]), nil
}

// lock keeps others from starting or stopping the cluster of that name meanwhile.
func lock(name string) (unlock func(), err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir(name)+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("cluster: %q is being started or stopped by another process: %w", name, err)
	}
	return func() { f.Close() }, nil
}

// clean removes a cluster that is not running: its folder and its cgroups. Mounts and
// network namespaces went with its processes.
func clean(name string) error {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/" + layout.Cgroup(name))
	if err != nil {
		return err
	}
	for _, top := range append(hierarchies, "/sys/fs/cgroup/"+layout.Cgroup(name)) {
		if err := removeCgroup(top); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir(name))
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
