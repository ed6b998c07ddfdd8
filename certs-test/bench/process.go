package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/internal/up"
)

const (
	testCPU = 0
	loadCPU = 1
)

// pin moves every thread of a process to one CPU; threads made later inherit it.
func pin(pid, cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return err
	}
	for _, t := range tasks {
		tid, _ := strconv.Atoi(t.Name())
		if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// cpuTime returns the user and system time a process has used, its ended threads included.
func cpuTime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The command's name may hold spaces; fields count from behind its closing bracket.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	const tick = 10 * time.Millisecond // USER_HZ is 100 on Linux
	return time.Duration(user+system) * tick, nil
}

// rss returns a process's resident memory in MB.
func rss(pid int) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb / 1024, err
		}
	}
	return 0, errors.New("no VmRSS")
}

// start runs a program on one CPU and ends it, by its id, when stop is called.
func start(cpu int, env []string, path string, args ...string) (pid int, stop func(), err error) {
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	if err := pin(cmd.Process.Pid, cpu); err != nil {
		return 0, nil, err
	}
	return cmd.Process.Pid, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-done
		}
	}, nil
}

// mesh is a running `castellan up`.
type mesh struct {
	up.File
	dir  string
	stop func()
}

// startMesh starts a mesh with the given policies (by file name) and flags.
func startMesh(ctx context.Context, opt options, policies map[string]string, flags ...string) (*mesh, error) {
	dir, err := os.MkdirTemp("", "cb")
	if err != nil {
		return nil, err
	}
	args := append([]string{"up", "--data-dir", dir}, flags...)
	if policies != nil {
		pdir := filepath.Join(dir, "bench-policy")
		if err := os.Mkdir(pdir, 0o755); err != nil {
			return nil, err
		}
		for name, text := range policies {
			if err := os.WriteFile(filepath.Join(pdir, name), []byte(text), 0o644); err != nil {
				return nil, err
			}
		}
		args = append(args, "--policy-dir", pdir)
	}
	bin, err := filepath.Abs(opt.bin)
	if err != nil {
		return nil, err
	}
	_, stop, err := start(loadCPU, []string{"GOMAXPROCS=1"}, filepath.Join(bin, "castellan"), args...)
	if err != nil {
		return nil, err
	}
	m := &mesh{dir: dir, stop: func() { stop(); os.RemoveAll(dir) }}
	deadline := time.Now().Add(60 * time.Second)
	for {
		data, err := os.ReadFile(filepath.Join(dir, "up.json"))
		if err == nil {
			if err := json.Unmarshal(data, &m.File); err != nil {
				m.stop()
				return nil, err
			}
			return m, nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			m.stop()
			return nil, errors.New("the mesh did not become ready")
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// waitHTTP polls until something listens and answers.
func waitListen(ctx context.Context, probe func() error) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := probe()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("not ready: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func getOK(url string) error {
	resp, err := http.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}
