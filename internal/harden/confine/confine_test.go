package confine_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"castellan.dev/internal/harden/confine"
)

// TestMain is also the child that confines itself, which cannot be undone.
func TestMain(m *testing.M) {
	dir := os.Getenv("CONFINE_CHILD")
	if dir == "" {
		os.Exit(m.Run())
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	version, err := confine.Files(confine.Read(at("read"), at("missing")), confine.Keep(at("keep")), confine.Listen(at("listen")))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("version", version > 0)
	for name, try := range map[string]func() error{
		"read what is granted":   func() error { _, err := os.ReadFile(at("read/file")); return err },
		"write what is to read":  func() error { return os.WriteFile(at("read/file"), nil, 0o600) },
		"read elsewhere":         func() error { _, err := os.ReadFile(at("other/file")); return err },
		"list elsewhere":         func() error { _, err := os.ReadDir(at("other")); return err },
		"replace what is kept":   func() error { return replace(at("keep/file")) },
		"remove what is kept":    func() error { return os.Remove(at("keep/old")) },
		"listen":                 func() error { return listen(at("listen/s")) },
		"make a directory there": func() error { return os.Mkdir(at("listen/new"), 0o755) },
		"read there":             func() error { _, err := os.ReadFile(at("listen/file")); return err },
		"write there":            func() error { return os.WriteFile(at("listen/new-file"), nil, 0o600) },
		"listen elsewhere":       func() error { return listen(at("other/s")) },
		"write elsewhere":        func() error { return os.WriteFile(at("other/new"), nil, 0o600) },
	} {
		switch err := try(); {
		case err == nil:
			fmt.Println(name, "done")
		case errors.Is(err, fs.ErrPermission):
			fmt.Println(name, "refused")
		default:
			fmt.Println(name, err)
		}
	}
	os.Exit(0)
}

func replace(path string) error {
	if err := os.WriteFile(path+".new", []byte("x"), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func listen(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	return l.Close() // removes it
}

func TestFiles(t *testing.T) {
	dir, err := os.MkdirTemp("", "c")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"read/file", "other/file", "keep/file", "keep/old", "listen/file"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), "CONFINE_CHILD="+dir)
	out, err := child.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if strings.Contains(string(out), "version false") {
		if os.Getenv("CI") == "true" {
			t.Fatal("this kernel has no Landlock")
		}
		t.Skip("this kernel has no Landlock")
	}
	for name, want := range map[string]string{
		"read what is granted": "done", "write what is to read": "refused", "read elsewhere": "refused", "list elsewhere": "refused",
		"replace what is kept": "done", "remove what is kept": "done", "listen": "done", "make a directory there": "done",
		"read there": "refused", "write there": "refused", "listen elsewhere": "refused", "write elsewhere": "refused",
	} {
		if !strings.Contains(string(out), name+" "+want+"\n") {
			t.Errorf("%s: want %s\n%s", name, want, out)
		}
	}
}

func TestFilesRefusesWhatIsNotThere(t *testing.T) {
	if _, err := confine.Files(confine.Keep("/no/such/directory")); err == nil || !strings.Contains(err.Error(), "/no/such/directory") {
		t.Error(err)
	}
}
