package up_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"castellan.dev/internal/up"
)

// running is a supervisor that runs until the test ends.
type running struct {
	*up.Supervisor
	t    *testing.T
	logs string
	end  func()
}

func supervise(t *testing.T) *running {
	t.Helper()
	logs := t.TempDir()
	s := up.NewSupervisor(discard(), logs)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	ended := false
	r := &running{Supervisor: s, t: t, logs: logs}
	r.end = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(r.end)
	return r
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// serving starts a child that serves, and waits for it.
func (r *running) serving(name, file string) {
	r.t.Helper()
	addr := freeAddr(r.t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.Start(ctx, up.Child(name, "http://"+addr+"/", self(r.t), "child-serve", addr, name, file)); err != nil {
		r.t.Fatal(err)
	}
	if err := r.WaitReady(ctx, name); err != nil {
		r.t.Fatal(err)
	}
}

// gone reports whether a process of ours has ended.
func gone(pid int) bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }

func TestSupervisorRestarts(t *testing.T) {
	r := supervise(t)
	file := filepath.Join(t.TempDir(), "ended")
	r.serving("shop/orders/proxy", file)
	first := r.PIDs()["shop/orders/proxy"]
	for range 2 {
		if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		select {
		case name := <-r.Restarted():
			if name != "shop/orders/proxy" {
				t.Fatalf("%q restarted", name)
			}
		case <-time.After(time.Minute):
			t.Fatal("not restarted")
		}
		// Told when it is ready again, on the same port, with its new id.
		second := r.PIDs()["shop/orders/proxy"]
		if second == first || gone(second) {
			t.Fatalf("pid %d, before %d", second, first)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if err := r.WaitReady(ctx, "shop/orders/proxy"); err != nil {
			t.Error(err)
		}
		cancel()
		first = second
	}
	r.end()
	if !gone(first) {
		t.Errorf("%d lives on", first)
	}
}

func TestSupervisorStopsInReverse(t *testing.T) {
	r := supervise(t)
	file := filepath.Join(t.TempDir(), "ended")
	for _, name := range []string{"server", "agent", "proxy"} {
		r.serving(name, file)
	}
	pids := r.PIDs()
	r.end()
	got, err := os.ReadFile(file)
	if err != nil || string(got) != "proxy\nagent\nserver\n" {
		t.Errorf("%q, %v", got, err)
	}
	for name, pid := range pids {
		if !gone(pid) {
			t.Errorf("%s (%d) lives on", name, pid)
		}
	}
	// None is started any more.
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := r.Start(ctx, up.Child("late", "", self(t), "child-die")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestSupervisorKillsTheStubborn(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the grace of 8 s")
	}
	r := supervise(t)
	addr := freeAddr(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.Start(ctx, up.Child("stubborn", "http://"+addr+"/", self(t), "child-stubborn", addr)); err != nil {
		t.Fatal(err)
	}
	if err := r.WaitReady(ctx, "stubborn"); err != nil {
		t.Fatal(err)
	}
	pid := r.PIDs()["stubborn"]
	began := time.Now()
	r.end()
	if took := time.Since(began); took < up.StopGrace || !gone(pid) {
		t.Errorf("ended after %v", took)
	}
}

// A part that keeps dying is given up, with the last thing it said.
func TestSupervisorGivesUp(t *testing.T) {
	r := supervise(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.Start(ctx, up.Child("agent", "http://"+freeAddr(t)+"/", self(t), "child-die")); err != nil {
		t.Fatal(err)
	}
	err := r.WaitReady(ctx, "agent")
	log := filepath.Join(r.logs, "agent.log")
	want := "up: agent does not stay up (exit status 3): cannot open /nothing: no such file; see " + log
	if err == nil || err.Error() != want {
		t.Fatalf("%v, want %s", err, want)
	}
	data, err := os.ReadFile(log)
	if n := strings.Count(string(data), "first line\n"); err != nil || n < 3 {
		t.Errorf("%d starts, %v", n, err)
	}
	if st, err := os.Stat(log); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

func TestSupervisorCannotStart(t *testing.T) {
	r := supervise(t)
	err := r.Start(context.Background(), up.Child("server", "", "/nothing/castellan-server"))
	if err == nil || !strings.HasPrefix(err.Error(), "up: start server: fork/exec /nothing/castellan-server: no such file") {
		t.Errorf("%v", err)
	}
}

func TestSupervisorNotReadyInTime(t *testing.T) {
	r := supervise(t)
	addr := freeAddr(t)
	file := filepath.Join(t.TempDir(), "ended")
	// It serves, but not where it is asked.
	if err := r.Start(context.Background(), up.Child("server", "http://"+freeAddr(t)+"/readyz", self(t), "child-serve", addr, "server", file)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	err := r.WaitReady(ctx, "server")
	if err == nil || !strings.HasPrefix(err.Error(), "up: server is not ready; see "+filepath.Join(r.logs, "server.log")+" and http://") || !strings.HasSuffix(err.Error(), "/readyz?verbose") {
		t.Errorf("%v", err)
	}
}

// A log is never followed through a link, and begins anew when it has grown too large.
func TestSupervisorLogs(t *testing.T) {
	r := supervise(t)
	log := filepath.Join(r.logs, "a.log")
	f, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(up.MaxLog+1), f.Close()); err != nil { // sparse
		t.Fatal(err)
	}
	r.serving("a", filepath.Join(t.TempDir(), "ended"))
	if st, err := os.Stat(log); err != nil || st.Size() > 4096 {
		t.Errorf("%d bytes, %v", st.Size(), err)
	}
	target := filepath.Join(t.TempDir(), "target")
	if err := os.Symlink(target, filepath.Join(r.logs, "b.log")); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(context.Background(), up.Child("b", "", self(t), "child-die")); err == nil {
		t.Error("a log behind a link is written")
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("the link's target was made")
	}
}
