package ledger_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/ca/ledger"
	"castellan.dev/ca/ledger/ledgertest"
)

// childLedger makes the test binary write to the ledger it names until killed.
const childLedger = "CASTELLAN_TEST_LEDGER"

func writeUntilKilled(path string) {
	l, err := ledger.Open(context.Background(), ledger.Config{Path: path})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	var mu sync.Mutex
	for w := range 8 {
		go func() {
			for i := 0; ; i++ {
				e := ledgertest.Entry(w*1_000_000 + i)
				seq, err := l.Intent(context.Background(), e)
				if err != nil {
					continue
				}
				mu.Lock()
				fmt.Println(seq, e.Serial) // acknowledged: must survive
				mu.Unlock()
				l.Result(seq, ledger.Result{Outcome: ledger.Issued})
			}
		}()
	}
	select {}
}

func TestKilledProcessLosesNoAcknowledgedIntent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childLedger+"="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	acked := map[string]string{}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		seq, serial, ok := strings.Cut(lines.Text(), " ")
		if !ok || seq == "error" {
			t.Fatalf("child: %s", lines.Text())
		}
		acked[serial] = seq
		if len(acked) == 300 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait()
	if len(acked) < 300 {
		t.Fatalf("only %d intents were acknowledged", len(acked))
	}
	l := open(t, path, nil)
	found := 0
	var last uint64
	for e, err := range l.Query(t.Context(), ledger.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Sequence != last+1 {
			t.Fatalf("sequence %d after %d", e.Sequence, last)
		}
		last = e.Sequence
		if acked[e.Serial] == fmt.Sprint(e.Sequence) {
			found++
		}
	}
	// A last line may have been cut by the kill; every whole one counts.
	if found < len(acked)-1 {
		t.Fatalf("%d of %d acknowledged intents are in the ledger", found, len(acked))
	}
	if seq, err := l.Intent(t.Context(), ledgertest.Entry(-1)); err != nil || seq != last+1 {
		t.Fatalf("after recovery: sequence %d, %v", seq, err)
	}
}

func copyFile(t *testing.T, from, to string) []byte {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return data
}

func TestHalfWrittenLogRecovers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	l := open(t, path, nil)
	for i := range 20 {
		if _, err := l.Intent(t.Context(), ledgertest.Entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	// As a crash leaves it: the database and a log cut in the middle of a frame.
	crashed := filepath.Join(t.TempDir(), "ledger.db")
	copyFile(t, path, crashed)
	wal := copyFile(t, path+"-wal", crashed+"-wal")
	for _, cut := range []int{1, 100, 3000, 10000} {
		if err := os.WriteFile(crashed+"-wal", wal[:len(wal)-cut], 0o600); err != nil {
			t.Fatal(err)
		}
		copyFile(t, path, crashed)
		os.Remove(crashed + "-shm")
		again := open(t, crashed, nil)
		n, err := again.Rows(t.Context())
		if err != nil || n == 0 || n >= 20 {
			t.Fatalf("cut by %d: %d rows, %v", cut, n, err)
		}
		if seq, err := again.Intent(t.Context(), ledgertest.Entry(100)); err != nil || seq != n+1 {
			t.Fatalf("cut by %d: sequence %d, %v", cut, seq, err)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRestartKeepsRowsAndSequence(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	for want := uint64(1); want <= 3; want++ {
		l := open(t, path, nil)
		seq, err := l.Intent(t.Context(), ledgertest.Entry(int(want)))
		if err != nil || seq != want {
			t.Fatalf("sequence %d, %v; want %d", seq, err, want)
		}
		l.Result(seq, ledger.Result{Outcome: ledger.Issued})
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	l := open(t, path, nil)
	for e := range l.Query(t.Context(), ledger.Filter{}) {
		if e.Outcome != ledger.Issued {
			t.Errorf("row %d lost its result at close", e.Sequence)
		}
	}
}

func TestSecondServerIsKeptOut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	open(t, path, nil)
	_, err := ledger.Open(t.Context(), ledger.Config{Path: path})
	want := "ledger: " + path + " is in use by another server; give each its own data directory"
	if err == nil || err.Error() != want {
		t.Fatalf("error %v, want %s", err, want)
	}
}

func TestDamagedFileIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := os.WriteFile(path, []byte(strings.Repeat("not a database ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := ledger.Open(t.Context(), ledger.Config{Path: path})
	if err == nil || !strings.Contains(err.Error(), "restore it from a backup") {
		t.Fatalf("error %v", err)
	}
}

func TestFileIsPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	open(t, path, nil)
	for _, p := range []string{path, path + "-wal", path + "-shm"} {
		info, err := os.Stat(p)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", p, info.Mode(), err)
		}
	}
}

// TestFullDiskStopsAndRecovers uses a real file system with no room left.
func TestFullDiskStopsAndRecovers(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=700"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("no small file system to fill: mounting tmpfs needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	l := open(t, filepath.Join(dir, "ledger.db"), nil)
	t.Cleanup(func() { l.Close() })
	if _, err := l.Intent(t.Context(), ledgertest.Entry(0)); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 2<<20), 0o600); err == nil {
		t.Fatal("the file system is not full")
	}
	acked := uint64(1)
	var err error
	for i := 1; err == nil; i++ {
		if i > 100_000 {
			t.Fatal("the disk is full and intents are still taken")
		}
		var seq uint64
		if seq, err = l.Intent(t.Context(), ledgertest.Entry(i)); err == nil {
			acked = seq
		}
	}
	if !errors.Is(err, ledger.ErrUnavailable) || !strings.Contains(err.Error(), "full") {
		t.Fatalf("error %v", err)
	}
	if l.Healthy() == nil {
		t.Fatal("healthy with a full disk")
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	// It finds out by itself, and goes on where it was.
	for deadline := time.Now().Add(20 * time.Second); l.Healthy() != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still unhealthy: %v", l.Healthy())
		}
	}
	seq, err := l.Intent(t.Context(), ledgertest.Entry(-1))
	if err != nil || seq != acked+1 {
		t.Fatalf("after room was made: sequence %d, %v; want %d", seq, err, acked+1)
	}
	if n, err := l.Rows(t.Context()); err != nil || n != seq {
		t.Fatalf("rows %d, %v", n, err)
	}
}
