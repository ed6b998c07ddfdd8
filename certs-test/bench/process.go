package main

import (
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
	"sigs.k8s.io/yaml"

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

// cpuTime returns the user and system time a process has used, its ended threads
// included: the clock of the process, which counts finer than /proc's ticks.
func cpuTime(pid int) (time.Duration, error) {
	const schedClock = 2 // CPUCLOCK_SCHED
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|schedClock), &t); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// rss returns a process's resident memory in MB (10^6 bytes).
func rss(pid int) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb * 1024 / 1e6, err
		}
	}
	return 0, errors.New("no VmRSS")
}

// start runs a program on one CPU and ends it, by its id, when stop is called.
// Should this program die without doing so, the kernel asks it to end.
func start(cpu int, path string, args ...string) (pid int, stop func(), err error) {
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	stop = func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-done
		}
	}
	if err := pin(cmd.Process.Pid, cpu); err != nil {
		stop()
		return 0, nil, err
	}
	return cmd.Process.Pid, stop, nil
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
			os.RemoveAll(dir)
			return nil, err
		}
		for name, text := range policies {
			if err := os.WriteFile(filepath.Join(pdir, name), []byte(text), 0o644); err != nil {
				os.RemoveAll(dir)
				return nil, err
			}
		}
		args = append(args, "--policy-dir", pdir)
	}
	_, stop, err := start(loadCPU, filepath.Join(opt.bin, "castellan"), args...)
	if err != nil {
		os.RemoveAll(dir)
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

// waitListen polls until the probe succeeds.
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

// editWorkloads changes the file in which a mesh declares pods and services.
func editWorkloads(m *mesh, change func(pods []any) []any) error {
	path := filepath.Join(m.dir, "workloads.yaml")
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var file map[string]any
	if err := yaml.Unmarshal(raw, &file); err != nil {
		return err
	}
	pods, _ := file["workloads"].([]any)
	file["workloads"] = change(pods)
	out, err := yaml.Marshal(file)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", out, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
