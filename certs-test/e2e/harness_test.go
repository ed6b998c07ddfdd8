// Package e2e runs the real binaries, as `castellan up` starts them, against real
// clients: go-spiffe, Envoy, curl, openssl, Istio's certificate requests. Everything
// stays on loopback, and every process a test starts is ended by its id.
package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"castellan.dev/internal/up"
)

// bin is the directory of the binaries under test, built once.
var bin string

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "castellan-e2e-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("go", "build", "-tags", "grpcnotrace", "-o", dir+"/", "./cmd/castellan", "./cmd/castellan-server", "./cmd/castellan-agent", "./cmd/castellan-proxy")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		return 1
	}
	bin = dir
	return m.Run()
}

// patience is how long a condition may take before a test gives up. It is far
// beyond what anything promises: tests do not fail on time.
const patience = 30 * time.Second

// eventually polls until check is content.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// mesh is one `castellan up`.
type mesh struct {
	t      *testing.T
	dir    string
	cmd    *exec.Cmd
	done   chan struct{}
	stdout *lockedBuffer
	stderr *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// shortDir is a directory whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cst")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// start starts a mesh in dir and waits until it is ready.
func start(t *testing.T, dir string, flags ...string) *mesh {
	t.Helper()
	m := &mesh{t: t, dir: dir, stdout: &lockedBuffer{}, stderr: &lockedBuffer{}, done: make(chan struct{})}
	m.cmd = exec.Command(filepath.Join(bin, "castellan"), append([]string{"up", "--data-dir", dir}, flags...)...)
	m.cmd.Stdout, m.cmd.Stderr = m.stdout, m.stderr
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = m.cmd.Wait(); close(m.done) }()
	t.Cleanup(m.stop)
	eventually(t, "the mesh becomes ready", func() error {
		select {
		case <-m.done:
			t.Fatalf("castellan up ended: %s\n%s", m.stderr, m.logs())
		default:
		}
		if _, err := m.read(); err != nil {
			return fmt.Errorf("%w\n%s", err, m.stderr)
		}
		// A run that was killed leaves its up.json; this one's is printed when it is ready.
		if m.stdout.String() == "" {
			return errors.New("nothing printed yet")
		}
		return nil
	})
	return m
}

func (m *mesh) stop() {
	select {
	case <-m.done:
		return
	default:
	}
	_ = m.cmd.Process.Signal(syscall.SIGINT)
	select {
	case <-m.done:
	case <-time.After(patience):
		_ = m.cmd.Process.Kill()
		<-m.done
		m.t.Errorf("castellan up did not end on SIGINT")
	}
	if m.t.Failed() {
		m.t.Log(m.logs())
	}
}

// logs returns the last lines of every part.
func (m *mesh) logs() string {
	var b strings.Builder
	files, _ := filepath.Glob(filepath.Join(m.dir, "logs", "*.log"))
	for _, f := range files {
		data, _ := os.ReadFile(f)
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(&b, "== %s\n%s\n", filepath.Base(f), strings.Join(lines[max(0, len(lines)-8):], "\n"))
	}
	return b.String()
}

func (m *mesh) path(elem ...string) string { return filepath.Join(append([]string{m.dir}, elem...)...) }

func (m *mesh) read() (*up.File, error) { return up.ReadFile(m.path("up.json")) }

func (m *mesh) file() *up.File {
	m.t.Helper()
	f, err := m.read()
	if err != nil {
		m.t.Fatal(err)
	}
	return f
}

// result is what a command printed and how it ended.
type result struct {
	code     int
	out, err string
}

// castellan runs the command; a mesh's commands get its up.json by --up.
func castellan(t *testing.T, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "castellan"), args...)
	var out, errw bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errw
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("castellan %v: %v", args, err)
	}
	return result{code: cmd.ProcessState.ExitCode(), out: out.String(), err: errw.String()}
}

func (r result) want(t *testing.T, code int, parts ...string) result {
	t.Helper()
	if r.code != code {
		t.Fatalf("exit code %d, want %d\nstdout: %s\nstderr: %s", r.code, code, r.out, r.err)
	}
	for _, p := range parts {
		if !strings.Contains(r.out+r.err, p) {
			t.Fatalf("output lacks %q\nstdout: %s\nstderr: %s", p, r.out, r.err)
		}
	}
	return r
}

func decodeJSON[T any](t *testing.T, s string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%v in %s", err, s)
	}
	return v
}

var plainClient = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{Proxy: nil, MaxIdleConnsPerHost: 4}}

// ask sends a request through the caller's own outbound listener.
func (m *mesh) ask(from, to, method, path string, header ...string) (int, string, error) {
	req, err := http.NewRequest(method, m.file().Workloads[from].Outbound[to]+path, nil)
	if err != nil {
		return 0, "", err
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := plainClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// wantStatus asks until the status is as wanted.
func (m *mesh) wantStatus(from, to, method, path string, want int, header ...string) {
	m.t.Helper()
	eventually(m.t, fmt.Sprintf("%s -> %s %s %s is %d", from, to, method, path, want), func() error {
		got, body, err := m.ask(from, to, method, path, header...)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%d %q", got, body)
		}
		return nil
	})
}

func bearer(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return "Bearer " + string(data)
}

func ready(addr string) error {
	resp, err := plainClient.Get("http://" + addr + "/readyz?verbose")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, body)
	}
	return nil
}

// write replaces a policy file in one step.
func (m *mesh) write(name, text string) {
	m.t.Helper()
	path := filepath.Join(m.file().PolicyDir, name)
	if err := os.WriteFile(path+".tmp", []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		m.t.Fatal(err)
	}
}
