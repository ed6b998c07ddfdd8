package harden_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/internal/harden"
)

// TestMain is also the child that hardens itself: what Process does to a test
// process could not be undone.
func TestMain(m *testing.M) {
	if os.Getenv("HARDEN_CHILD") == "" {
		os.Exit(m.Run())
	}
	if err := harden.Process(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	fmt.Println("dumpable", dumpable, err)
	var core unix.Rlimit
	err = unix.Getrlimit(unix.RLIMIT_CORE, &core)
	fmt.Println("core", core.Cur, core.Max, err)
	os.Exit(0)
}

func TestProcess(t *testing.T) {
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), "HARDEN_CHILD=1")
	out, err := child.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if want := "dumpable 0 <nil>\ncore 0 0 <nil>\n"; string(out) != want {
		t.Errorf("%q, want %q", out, want)
	}
}

// TestBinaries: each of the binaries that hold keys is hardened on all threads
// before it reads its configuration, which here is a pipe that nobody writes to.
func TestBinaries(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"castellan-server", "castellan-agent", "castellan-proxy"} {
		t.Run(name, func(t *testing.T) {
			binary, pipe := filepath.Join(dir, name), filepath.Join(dir, name+".yaml")
			build := exec.CommandContext(t.Context(), "go", "build", "-tags", "grpcnotrace", "-o", binary, "castellan.dev/cmd/"+name)
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if err := unix.Mkfifo(pipe, 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), binary, "-config", pipe)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
			proc := fmt.Sprintf("/proc/%d", cmd.Process.Pid)
			hardened := func() (string, bool) {
				limits, err := os.ReadFile(proc + "/limits")
				if err != nil {
					t.Fatal(err)
				}
				threads, err := filepath.Glob(proc + "/task/*/status")
				if err != nil || len(threads) == 0 {
					t.Fatal(threads, err)
				}
				for _, thread := range threads {
					status, err := os.ReadFile(thread)
					if err != nil {
						continue // it has ended
					}
					if !strings.Contains(string(status), "\nNoNewPrivs:\t1\n") {
						return string(status), false
					}
				}
				for line := range strings.Lines(string(limits)) {
					if rest, ok := strings.CutPrefix(line, "Max core file size"); ok {
						f := strings.Fields(rest)
						return line, len(f) >= 2 && f[0] == "0" && f[1] == "0"
					}
				}
				return string(limits), false
			}
			for deadline := time.Now().Add(30 * time.Second); ; {
				what, ok := hardened()
				if ok {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("not hardened: %s", what)
				}
				<-time.After(10 * time.Millisecond)
			}
			if os.Geteuid() == 0 {
				return // root may read everything
			}
			if _, err := os.ReadFile(proc + "/environ"); err == nil {
				t.Error("its environment can be read: it is dumpable")
			}
		})
	}
}
