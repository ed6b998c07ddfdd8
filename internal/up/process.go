package up

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is one supervised child.
type process struct {
	name string
	path string
	args []string
	// readyURL answers 200 when the part is ready.
	readyURL string
}

const (
	// A child that lived this long starts over at once; one that dies sooner waits.
	longLife   = 10 * time.Second
	minBackoff = 100 * time.Millisecond
	maxBackoff = 5 * time.Second
	// stopGrace is what children get between SIGTERM and SIGKILL.
	stopGrace = 8 * time.Second
	// maxDeaths is how often a part may end while it is waited for.
	maxDeaths = 3
	// maxLog is where a log begins anew, so that no flood of lines fills the disk
	// that the ledger needs.
	maxLog   = 64 << 20
	logCheck = 5 * time.Second
)

// supervisor starts children, restarts those that die, and ends all with its context.
type supervisor struct {
	log       *slog.Logger
	logDir    string
	start     chan startRequest
	restarted chan string
	client    *http.Client

	mu   sync.Mutex
	pids map[string]int
	urls map[string]string
	last map[string]error
	// deaths counts the ends of a part since it was last ready.
	deaths map[string]int
}

type startRequest struct {
	process process
	done    chan error
}

func newSupervisor(log *slog.Logger, logDir string) *supervisor {
	return &supervisor{
		log: log, logDir: logDir,
		start:     make(chan startRequest),
		restarted: make(chan string, 64),
		client:    &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil}},
		pids:      map[string]int{}, urls: map[string]string{}, last: map[string]error{}, deaths: map[string]int{},
	}
}

// Run serves Start until ctx ends, then ends the children in the reverse order of their start.
func (s *supervisor) Run(ctx context.Context) error {
	// Children outlive ctx by the time it takes to stop them in order.
	var children []*child
	logs := time.NewTicker(logCheck)
	defer logs.Stop()
	for {
		select {
		case <-logs.C:
			for _, c := range children {
				s.trimLog(c.process.name)
			}
		case req := <-s.start:
			c := &child{process: req.process, sup: s, stop: make(chan struct{}), done: make(chan struct{}), started: make(chan error, 1)}
			go c.loop()
			err := <-c.started
			if err == nil {
				children = append(children, c)
			}
			req.done <- err
		case <-ctx.Done():
			for i := len(children) - 1; i >= 0; i-- {
				close(children[i].stop)
				<-children[i].done
			}
			return ctx.Err()
		}
	}
}

// Start starts p and returns when its first process runs.
func (s *supervisor) Start(ctx context.Context, p process) error {
	req := startRequest{process: p, done: make(chan error, 1)}
	select {
	case s.start <- req:
		return <-req.done
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Restarted tells the names of parts that died and are ready again.
func (s *supervisor) Restarted() <-chan string { return s.restarted }

// PIDs returns the process ids by part.
func (s *supervisor) PIDs() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]int, len(s.pids))
	for k, v := range s.pids {
		out[k] = v
	}
	return out
}

// WaitReady polls the part's readiness until it answers 200. A part that keeps
// dying is given up, with the last line it said.
func (s *supervisor) WaitReady(ctx context.Context, name string) error {
	for {
		s.mu.Lock()
		url, last, deaths := s.urls[name], s.last[name], s.deaths[name]
		s.mu.Unlock()
		if s.probe(ctx, url) {
			s.mu.Lock()
			s.deaths[name] = 0
			s.mu.Unlock()
			return nil
		}
		if deaths >= maxDeaths {
			return fmt.Errorf("up: %s does not stay up (%w): %s; see %s", name, last, lastLine(s.logFile(name)), s.logFile(name))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("up: %s is not ready; see %s and %s?verbose", name, s.logFile(name), url)
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// lastLine returns the last line of a log, shortened.
func lastLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	text := strings.TrimSpace(string(data))
	line := text[strings.LastIndexByte(text, '\n')+1:]
	return line[:min(len(line), 500)]
}

func (s *supervisor) probe(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 4096))
	return resp.StatusCode == http.StatusOK
}

func (s *supervisor) logFile(name string) string {
	return filepath.Join(s.logDir, strings.ReplaceAll(name, "/", ".")+".log")
}

// trimLog empties a log that has grown too large. Parts append to it, so they go
// on at its new end; what it held is given up.
func (s *supervisor) trimLog(name string) {
	path := s.logFile(name)
	st, err := os.Lstat(path)
	if err != nil || st.Size() <= maxLog {
		return
	}
	s.log.Warn("log is emptied", "part", name, "bytes", st.Size())
	if err := os.Truncate(path, 0); err != nil {
		s.log.Error("log could not be emptied", "part", name, "error", err)
	}
}

// child is one part over its successive processes.
type child struct {
	process process
	sup     *supervisor
	stop    chan struct{}
	done    chan struct{}
	started chan error
}

// loop keeps to one locked thread: the kernel sends the parent-death signal when
// the thread that forked ends, and the runtime may end any other.
func (c *child) loop() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(c.done)
	backoff := minBackoff
	for first := true; ; first = false {
		began := time.Now() //nolint:forbidigo // measures how long a child lived
		cmd, err := c.spawn()
		if first {
			c.started <- err
			if err != nil {
				return
			}
		}
		if err == nil {
			if !first {
				go c.announce(cmd)
			}
			if c.wait(cmd) {
				return
			}
		} else {
			c.sup.log.Error("part could not be started", "part", c.process.name, "error", err)
		}
		if time.Since(began) > longLife {
			backoff = minBackoff
		}
		select {
		case <-c.stop:
			return
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

func (c *child) spawn() (*exec.Cmd, error) {
	name := c.sup.logFile(c.process.name)
	c.sup.trimLog(c.process.name)
	out, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	defer out.Close()
	cmd := exec.Command(c.process.path, c.process.args...)
	cmd.Stdout, cmd.Stderr = out, out
	// Own group: a terminal's Ctrl-C reaches this process alone, which then stops
	// the parts in their order. Should it be killed, the kernel ends them.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("up: start %s: %w", c.process.name, err)
	}
	c.sup.mu.Lock()
	c.sup.pids[c.process.name] = cmd.Process.Pid
	c.sup.urls[c.process.name] = c.process.readyURL
	c.sup.mu.Unlock()
	return cmd, nil
}

// wait returns true when the part was stopped on purpose.
func (c *child) wait(cmd *exec.Cmd) bool {
	exited := make(chan struct{})
	var err error
	go func() { err = cmd.Wait(); close(exited) }()
	select {
	case <-exited:
		if err == nil {
			err = errors.New("it ended by itself")
		}
		c.sup.mu.Lock()
		c.sup.last[c.process.name] = err
		c.sup.deaths[c.process.name]++
		c.sup.mu.Unlock()
		c.sup.log.Warn("part ended", "part", c.process.name, "cause", err)
		return false
	case <-c.stop:
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(stopGrace):
			_ = cmd.Process.Kill()
			<-exited
		}
		return true
	}
}

// announce tells that a restarted part is ready, or still not after a while: its
// new process id must be known either way.
func (c *child) announce(cmd *exec.Cmd) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_ = c.sup.WaitReady(ctx, c.process.name)
	select {
	case c.sup.restarted <- c.process.name:
	case <-c.stop:
	case <-time.After(time.Second):
		c.sup.log.Warn("restart not announced", "part", c.process.name, "pid", cmd.Process.Pid)
	}
}
