package e2e_test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// process is one real binary of the product, started by a test and ended by its id.
type process struct {
	t        *testing.T
	name     string
	cmd      *exec.Cmd
	out, err *lockedBuffer
	done     chan struct{}
}

// launch starts a binary with its configuration file.
func launch(t *testing.T, name, config string) *process {
	t.Helper()
	p := &process{t: t, name: name, out: &lockedBuffer{}, err: &lockedBuffer{}, done: make(chan struct{})}
	p.cmd = exec.Command(filepath.Join(bin, name), "-config", config)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.err
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() {
		p.signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(patience):
			p.signal(syscall.SIGKILL)
			<-p.done
			t.Errorf("%s did not end on SIGTERM", name)
		}
		if t.Failed() {
			lines := strings.Split(strings.TrimSpace(p.err.String()), "\n")
			t.Logf("== %s\n%s", name, strings.Join(lines[max(0, len(lines)-15):], "\n"))
		}
	})
	return p
}

func (p *process) signal(s syscall.Signal) { _ = p.cmd.Process.Signal(s) } // it may have ended

func (p *process) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// wait returns the exit code once the process has ended.
func (p *process) wait(t *testing.T) int {
	t.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		t.Fatalf("%s does not end\n%s", p.name, p.err)
		return -1
	}
}

// refusesToStart asserts that the process ends by itself, with one clear error.
func (p *process) refusesToStart(t *testing.T, parts ...string) {
	t.Helper()
	if code := p.wait(t); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	text := strings.TrimSpace(p.err.String())
	last := text[strings.LastIndexByte(text, '\n')+1:]
	if !strings.HasPrefix(last, p.name+": ") || strings.Contains(text, "panic") {
		t.Errorf("the last line is no error of %s: %q", p.name, last)
	}
	for _, part := range parts {
		if !strings.Contains(last, part) {
			t.Errorf("%q is not in %q", part, last)
		}
	}
}

// logged returns the JSON records of a log that have all these fields.
func logged(log string, fields map[string]string) []map[string]any {
	var found []map[string]any
	for line := range strings.Lines(log) {
		var r map[string]any
		if json.Unmarshal([]byte(line), &r) != nil {
			continue
		}
		all := true
		for k, v := range fields {
			all = all && strings.Contains(fmt.Sprint(r[k]), v)
		}
		if all {
			found = append(found, r)
		}
	}
	return found
}

// Ports for what tests start themselves stand below those that castellan up and
// the kernel choose from, so that nobody takes one between its choice and its use.
const firstOwnPort, lastOwnPort = 12000, 19999

var nextPort atomic.Int64

// ownPort returns a loopback address that nobody listens on, and never the same twice.
func ownPort(t *testing.T) string {
	t.Helper()
	nextPort.CompareAndSwap(0, int64(os.Getpid()*97%(lastOwnPort-firstOwnPort)))
	for range lastOwnPort - firstOwnPort {
		port := firstOwnPort + int(nextPort.Add(1))%(lastOwnPort-firstOwnPort)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		defer l.Close()
		return l.Addr().String()
	}
	t.Fatal("no free port")
	return ""
}

func portOf(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }

func writeTo(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path+".tmp", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
	return path
}
