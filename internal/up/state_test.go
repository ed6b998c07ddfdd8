package up_test

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"castellan.dev/internal/up"
)

// isInput fails unless err is the caller's mistake and says all of texts.
func isInput(t *testing.T, err error, texts ...string) {
	t.Helper()
	var input *up.InputError
	if !errors.As(err, &input) {
		t.Fatalf("%v is no mistake of the caller's", err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("no %q in %q", text, err)
		}
	}
}

func TestStateStaysTheSame(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "state.json")
	names, uids := []string{"server/grpc", "server/http", "agent/admin"}, []string{"pod/a", "pod/b"}
	first, err := up.LoadState(path, "cluster.local", names, uids)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for _, n := range names {
		p := first.Ports[n]
		if p < up.FirstPort || p > up.LastPort || seen[p] || first.Addr(n) == "" {
			t.Errorf("%s has port %d", n, p)
		}
		seen[p] = true
	}
	uid := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	if a, b := first.UIDs["pod/a"], first.UIDs["pod/b"]; !uid.MatchString(a) || !uid.MatchString(b) || a == b {
		t.Errorf("%q, %q", a, b)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}

	second, err := up.LoadState(path, "cluster.local", names, uids)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if second.Ports[n] != first.Ports[n] {
			t.Errorf("%s moved from %d to %d", n, first.Ports[n], second.Ports[n])
		}
	}
	if second.UIDs["pod/a"] != first.UIDs["pod/a"] {
		t.Error("a UID changed")
	}
	// A later release has more parts: they get ports, and the others keep theirs.
	third, err := up.LoadState(path, "cluster.local", append(names, "new"), append(uids, "pod/c"))
	if err != nil || third.Ports["new"] == 0 || third.Ports["server/grpc"] != first.Ports["server/grpc"] || third.UIDs["pod/c"] == "" {
		t.Errorf("%+v, %v", third, err)
	}
}

func TestStateRefused(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	if _, err := up.LoadState(path, "cluster.local", []string{"a"}, nil); err != nil {
		t.Fatal(err)
	}
	_, err := up.LoadState(path, "other.example", []string{"a"}, nil)
	isInput(t, err, `--trust-domain: `+dir+` holds the trust domain "cluster.local", not "other.example"; give that one or another --data-dir`)
	if err := os.WriteFile(path, []byte(`{"ports": {"a"`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = up.LoadState(path, "cluster.local", []string{"a"}, nil)
	isInput(t, err, "up: "+path+" is damaged (", "restore it, or remove the data directory to start over")
}

func TestPortsInUse(t *testing.T) {
	s, err := up.LoadState(filepath.Join(t.TempDir(), "state.json"), "cluster.local", []string{"server/grpc"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.CheckPorts(0); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", s.Addr("server/grpc"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	want := "up: " + s.Addr("server/grpc") + ", the port of server/grpc in this data directory, is in use by another program; stop it, or remove state.json to get new ports"
	if err := s.CheckPorts(0); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	// A part of the run before may still be ending.
	freed := time.AfterFunc(100*time.Millisecond, func() { l.Close() })
	defer freed.Stop()
	if err := s.CheckPorts(30 * time.Second); err != nil {
		t.Error(err)
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b", "file")
	for _, mode := range []os.FileMode{0o600, 0o644} {
		if err := up.WriteFile(path, []byte("x"), mode); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%v, %v", st, err)
		}
	}
	// Nobody sees half of it.
	long, short := bytes.Repeat([]byte("l"), 1<<16), []byte("s")
	if err := up.WriteFile(path, long, 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if got, err := os.ReadFile(path); err != nil || len(got) != len(long) && len(got) != len(short) {
				t.Errorf("%d bytes, %v", len(got), err)
				return
			}
		}
	})
	for range 50 {
		for _, data := range [][]byte{short, long} {
			if err := up.WriteFile(path, data, 0o600); err != nil {
				t.Error(err)
			}
		}
	}
	close(done)
	wg.Wait()
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := up.WriteFile(filepath.Join(path, "below"), nil, 0o600); err == nil || !strings.HasPrefix(err.Error(), "up: ") {
		t.Errorf("%v", err)
	}
}
