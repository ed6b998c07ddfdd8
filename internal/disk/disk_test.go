package disk_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"castellan.dev/internal/disk"
)

func TestWriteReplacesWithMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	for _, want := range []string{"first, and longer", "second"} {
		if err := disk.Write(path, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := disk.ReadSecret(path)
		if err != nil || string(got) != want {
			t.Fatalf("read %q, %v; want %q", got, err, want)
		}
	}
	entries, _ := os.ReadDir(filepath.Dir(path))
	if len(entries) != 1 {
		t.Fatalf("temporary files left behind: %v", entries)
	}
}

func TestReadSecretRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660, 0o644, 0o620} {
		path := filepath.Join(dir, "key")
		if err := disk.Write(path, []byte("k"), mode); err != nil {
			t.Fatal(err)
		}
		_, err := disk.ReadSecret(path)
		if err == nil || !strings.Contains(err.Error(), "run: chmod 600 "+path) {
			t.Errorf("mode %04o: error %v", mode, err)
		}
	}
	if _, err := disk.ReadSecret(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := disk.Read(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("directory: %v", err)
	}
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, bytes.Repeat([]byte("x"), 1<<20+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Read(big); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("big file: %v", err)
	}
}

func TestMakeDirRefusesOneThatOthersMayWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	if err := disk.MakeDir(dir); err != nil {
		t.Fatal(err)
	}
	if info, _ := os.Stat(dir); info.Mode().Perm() != 0o700 {
		t.Fatalf("mode %04o", info.Mode().Perm())
	}
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	if err := disk.MakeDir(dir); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Fatalf("error %v", err)
	}
}

func TestSweepRemovesOnlyTemporaryFiles(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{".tmp-123", "root.pem"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := disk.Sweep(dir); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 || entries[0].Name() != "root.pem" {
		t.Fatalf("left: %v", entries)
	}
}

func TestLockKeepsSecondOut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l, err := disk.Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Acquire(path); !errors.Is(err, disk.ErrLocked) {
		t.Fatalf("second lock: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := disk.Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestReadGroupSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	for mode, ok := range map[os.FileMode]bool{0o400: true, 0o440: true, 0o640: true, 0o600: true, 0o444: false, 0o604: false, 0o660: false, 0o450: false} {
		_ = os.Remove(path)
		if err := os.WriteFile(path, []byte("key"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		data, err := disk.ReadGroupSecret(path)
		if ok != (err == nil) || ok && string(data) != "key" || !ok && !strings.Contains(err.Error(), "defaultMode to 0440") {
			t.Errorf("mode %04o: %q, %v", mode, data, err)
		}
	}
}
