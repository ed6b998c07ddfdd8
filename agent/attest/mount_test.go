package attest_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"castellan.dev/agent/attest"
)

// volume makes a directory deeper than a socket's address can be long.
func volume(t *testing.T) *os.File {
	t.Helper()
	path := filepath.Join(tempDir(t), strings.Repeat("deep", 30))
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return dir
}

func listenMount(t *testing.T, dir *os.File) *attest.Listener {
	t.Helper()
	l, err := attest.ListenMount(attest.MountConfig{Dir: dir, Name: "v"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// short is the path to a volume's socket that fits an address.
func short(dir *os.File) string { return fmt.Sprintf("/proc/self/fd/%d/socket", dir.Fd()) }

// answered reports whether somebody sends a byte.
func answered(t *testing.T, dir *os.File) bool {
	t.Helper()
	c, err := net.Dial("unix", short(dir))
	if err != nil {
		return false
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	n, _ := io.ReadFull(c, make([]byte, 1))
	return n == 1
}

// TestMountAdmitsAnyUID: the mount is the proof.
func TestMountAdmitsAnyUID(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root, to call as another uid")
		}
		t.Skip("needs root, to call as another uid")
	}
	dir := volume(t)
	greet(t, listenMount(t, dir))
	// The descriptor is the third of the child's: /proc/self/fd/3.
	path, err := filepath.EvalSymlinks(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(tempDir(t), "test")
	binary, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(copied)
	cmd.Env = append(os.Environ(), "ATTEST_TEST_CONNECT=/proc/self/fd/3/socket")
	cmd.ExtraFiles = []*os.File{dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("uid 65534 was turned away: %v %s", err, out)
	}
}

func TestMountSocket(t *testing.T) {
	dir := volume(t)
	l := listenMount(t, dir)
	greet(t, l)
	if !answered(t, dir) {
		t.Fatal("nobody answers")
	}
	info, err := os.Lstat(filepath.Join(dir.Name(), "socket"))
	if err != nil || info.Mode().Perm() != 0o666 || info.Mode().Type() != os.ModeSocket {
		t.Errorf("socket: %v %v", info, err)
	}
	if l.Lost() {
		t.Error("lost, though it is there")
	}
	entries, err := os.ReadDir(dir.Name())
	if err != nil || len(entries) != 1 {
		t.Errorf("%v %v, want the socket alone", entries, err)
	}
	l.Close()
	if entries, _ := os.ReadDir(dir.Name()); len(entries) != 0 {
		t.Errorf("%v stays", entries)
	}
	if !l.Lost() {
		t.Error("not lost, though it is gone")
	}
}

// TestMountReplacesWhatIsThere: what a killed agent left, finished or not.
func TestMountReplacesWhatIsThere(t *testing.T) {
	dir := volume(t)
	for _, name := range []string{"socket", ".socket.new"} {
		stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		stale.SetUnlinkOnClose(false)
		stale.Close()
	}
	first := listenMount(t, dir)
	greet(t, first)
	if !answered(t, dir) {
		t.Fatal("the stale socket was not replaced")
	}
	second := listenMount(t, dir)
	greet(t, second)
	if !first.Lost() || second.Lost() {
		t.Errorf("first lost %v, second lost %v", first.Lost(), second.Lost())
	}
	first.Close()
	if !answered(t, dir) {
		t.Error("the first one's end took the second one's socket away")
	}
}

func TestMountRefusesWhatIsNoSocket(t *testing.T) {
	dir := volume(t)
	if err := os.WriteFile(filepath.Join(dir.Name(), ".socket.new"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := attest.ListenMount(attest.MountConfig{Dir: dir, Name: "v"}); err == nil || !strings.Contains(err.Error(), `".socket.new" is no socket`) {
		t.Errorf("file: %v", err)
	}
	if err := os.Remove(filepath.Join(dir.Name(), ".socket.new")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir.Name(), "socket"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := attest.ListenMount(attest.MountConfig{Dir: dir, Name: "v"}); err == nil || !strings.Contains(err.Error(), "putting it in its place") {
		t.Errorf("directory: %v", err)
	}
	if err := attest.ClearMount(dir); err == nil || !strings.Contains(err.Error(), `"socket" is no socket`) {
		t.Errorf("clear: %v", err)
	}
	if entries, _ := os.ReadDir(dir.Name()); len(entries) != 1 {
		t.Errorf("%v, want the directory alone", entries)
	}
}

func TestMountLimit(t *testing.T) {
	dir := volume(t)
	var refused counter
	l, err := attest.ListenMount(attest.MountConfig{Dir: dir, Name: "v", Connections: 1, Refused: refused.count})
	if err != nil {
		t.Fatal(err)
	}
	greet(t, l)
	held, err := net.Dial("unix", short(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := io.ReadFull(held, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if answered(t, dir) {
		t.Error("a second connection was let in")
	}
	if refused.of("limit") != 1 {
		t.Errorf("refusals %v", refused.got)
	}
}

// TestMode: a socket of the operator's is its owner's alone.
func TestMode(t *testing.T) {
	path := filepath.Join(tempDir(t), "admin.sock")
	listen(t, attest.UnixConfig{Path: path, UIDs: []uint32{uid()}, Mode: 0o600})
	if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
}
