package attest_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"castellan.dev/agent/attest"
)

func TestMain(m *testing.M) {
	// The test binary calls itself, as another uid, to be turned away.
	if path := os.Getenv("ATTEST_TEST_CONNECT"); path != "" {
		os.Exit(connect(path))
	}
	goleak.VerifyTestMain(m)
}

// connect says what a client sees: 0 a byte, 3 the end.
func connect(path string) int {
	c, err := net.Dial("unix", path)
	if err != nil {
		return 4
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if n, _ := io.ReadFull(c, make([]byte, 1)); n == 1 {
		return 0
	}
	return 3
}

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "at")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func uid() uint32 { return uint32(os.Getuid()) }

func listen(t *testing.T, cfg attest.UnixConfig) *attest.Listener {
	t.Helper()
	l, err := attest.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// greet sends one byte on every accepted connection and keeps it open.
func greet(t *testing.T, l *attest.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			_, _ = c.Write([]byte{1})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
		for _, c := range conns {
			c.Close()
		}
	})
}

// counter counts refusals.
type counter struct {
	mu  sync.Mutex
	got map[string]int
}

func (c *counter) count(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.got == nil {
		c.got = map[string]int{}
	}
	c.got[reason]++
}

func (c *counter) of(reason string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got[reason]
}

func TestOnlyListedUIDsGetAByte(t *testing.T) {
	var refused counter
	var log bytes.Buffer
	path := filepath.Join(tempDir(t), "pod", "socket")
	l := listen(t, attest.UnixConfig{Path: path, UIDs: []uint32{uid()}, Refused: refused.count, Log: slog.New(slog.NewTextHandler(&log, nil))})
	greet(t, l)
	t.Run("trust-04 the uid of the socket's workload is served", func(t *testing.T) {
		if code := connect(path); code != 0 {
			t.Errorf("got %d", code)
		}
	})
	t.Run("trust-04 another uid is closed without a byte", func(t *testing.T) {
		if os.Getuid() != 0 {
			if os.Getenv("CI") == "true" {
				t.Fatal("becoming another uid needs root")
			}
			t.Skip("becoming another uid needs root")
		}
		anotherUID(t, path)
		if refused.of("uid") != 1 {
			t.Errorf("refusals counted: %v", refused.got)
		}
		l.Close()
		if !strings.Contains(log.String(), "uid=65534") {
			t.Errorf("log does not name the uid: %s", log.String())
		}
	})
}

// anotherUID connects as nobody and wants to be turned away.
func anotherUID(t *testing.T, path string) {
	t.Helper()
	// A copy of this binary that another uid can run.
	exe := filepath.Join(filepath.Dir(filepath.Dir(path)), "client")
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, data, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = []string{"ATTEST_TEST_CONNECT=" + path}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	err = cmd.Run()
	exit := &exec.ExitError{}
	if !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("uid 65534: %v, want the connection closed without a byte", err)
	}
}

func TestAnEmptyListAdmitsNobody(t *testing.T) {
	path := filepath.Join(tempDir(t), "socket")
	greet(t, listen(t, attest.UnixConfig{Path: path}))
	t.Run("trust-04 a socket without a uid serves nobody", func(t *testing.T) {
		if code := connect(path); code != 3 {
			t.Errorf("got %d, want the connection closed without a byte", code)
		}
	})
}

func TestConnectionsAreBounded(t *testing.T) {
	var refused counter
	path := filepath.Join(tempDir(t), "socket")
	greet(t, listen(t, attest.UnixConfig{Path: path, UIDs: []uint32{uid()}, Connections: 2, Refused: refused.count}))
	open := func() (net.Conn, bool) {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		n, _ := c.Read(make([]byte, 1))
		return c, n == 1
	}
	_, first := open()
	_, second := open()
	_, third := open()
	if !first || !second || third {
		t.Errorf("admitted: %v %v %v, want the third refused", first, second, third)
	}
	if refused.of("limit") != 1 {
		t.Errorf("refusals counted: %v", refused.got)
	}
}

func TestSocketAndDirectoryModes(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	path := filepath.Join(tempDir(t), "a", "b", "socket")
	listen(t, attest.UnixConfig{Path: path, UIDs: []uint32{uid()}})
	for p, want := range map[string]fs.FileMode{
		path: fs.ModeSocket | 0o666, filepath.Dir(path): fs.ModeDir | 0o755, filepath.Dir(filepath.Dir(path)): fs.ModeDir | 0o755,
	} {
		info, err := os.Lstat(p)
		if err != nil || info.Mode() != want {
			t.Errorf("%s: %v %v, want %v", p, info.Mode(), err, want)
		}
	}
}

func TestWhatIsInTheWay(t *testing.T) {
	dir := tempDir(t)
	t.Run("a stale socket is replaced", func(t *testing.T) {
		path := filepath.Join(dir, "stale")
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd) // the file stays, as after a crash
		greet(t, listen(t, attest.UnixConfig{Path: path, UIDs: []uint32{uid()}}))
		if code := connect(path); code != 0 {
			t.Errorf("got %d", code)
		}
	})
	t.Run("a live one is left alone", func(t *testing.T) {
		path := filepath.Join(dir, "live")
		greet(t, listen(t, attest.UnixConfig{Path: path, UIDs: []uint32{uid()}}))
		_, err := attest.Listen(attest.UnixConfig{Path: path})
		if want := `socket "` + path + `" is in use by a live process; stop it, or choose another path`; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		if code := connect(path); code != 0 {
			t.Errorf("the live one answers %d", code)
		}
	})
	t.Run("something else is left alone", func(t *testing.T) {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := attest.Listen(attest.UnixConfig{Path: path})
		if err == nil || !strings.Contains(err.Error(), "something else is in its place") {
			t.Errorf("got %v", err)
		}
		if data, _ := os.ReadFile(path); string(data) != "precious" {
			t.Errorf("the file is %q now", data)
		}
	})
	t.Run("a directory that others may write to", func(t *testing.T) {
		for mode, want := range map[os.FileMode]string{
			0o777: "may be written by others (mode drwxrwxrwx), who could replace the socket; chmod go-w it, or choose another",
			0o775: "may be written by others (mode drwxrwxr-x)", 0o777 | os.ModeSticky: "", 0o755: "",
		} {
			dir := filepath.Join(tempDir(t), "run")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(dir, mode); err != nil {
				t.Fatal(err)
			}
			l, err := attest.Listen(attest.UnixConfig{Path: filepath.Join(dir, "socket")})
			if err == nil {
				l.Close()
			}
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%v: got %v, want %q", mode, err, want)
			}
		}
	})
	t.Run("too long a path", func(t *testing.T) {
		path := "/tmp/" + strings.Repeat("x", 103)
		_, err := attest.Listen(attest.UnixConfig{Path: path})
		if err == nil || !strings.Contains(err.Error(), "has 108 bytes and the kernel takes 107; choose a shorter directory") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a path that is not absolute", func(t *testing.T) {
		if _, err := attest.Listen(attest.UnixConfig{Path: "socket"}); err == nil || err.Error() != `socket "socket": the path must be absolute` {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a lock that somebody holds does not stop the start", func(t *testing.T) {
		sub := filepath.Join(dir, "locked")
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		d, err := os.Open(sub)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		listen(t, attest.UnixConfig{Path: filepath.Join(sub, "socket")})
	})
}

func TestCloseRemovesOnlyItsOwnSocket(t *testing.T) {
	path := filepath.Join(tempDir(t), "socket")
	l := listen(t, attest.UnixConfig{Path: path})
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other := listen(t, attest.UnixConfig{Path: path})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("closing the first removed the second's socket: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}
