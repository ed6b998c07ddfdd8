package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"castellan.dev/agent/attest"
	"castellan.dev/internal/config"
)

// TestMain is also the agent that confines itself, which cannot be undone.
func TestMain(m *testing.M) {
	if dir := os.Getenv("AGENT_TEST_CONFINE"); dir != "" {
		os.Exit(confined(dir))
	}
	os.Exit(m.Run())
}

func confined(dir string) int {
	cfg := config.Agent{
		TokenFile: filepath.Join(dir, "token", "token"), AdminSocket: filepath.Join(dir, "run", "admin.sock"),
		Server: config.ServerTarget{BundleFile: filepath.Join(dir, "bundle", "bundle.pem")},
		CSI:    &config.AgentCSI{KubeletDir: filepath.Join(dir, "kubelet"), StateDir: filepath.Join(dir, "run", "agent")},
	}
	if err := confineFiles(cfg, slog.New(slog.NewTextHandler(os.Stdout, nil))); err != nil {
		fmt.Println(err)
		return 1
	}
	volume := filepath.Join(dir, "kubelet/pods/uid/volumes/kubernetes.io~csi/uds")
	read := func(path string) error { _, err := os.ReadFile(filepath.Join(dir, path)); return err }
	for name, try := range map[string]func() error{
		"read its token":            func() error { return read("token/token") },
		"read the roots":            func() error { return read("bundle/bundle.pem") },
		"read a pod's token":        func() error { return read("kubelet/pods/uid/volumes/kubernetes.io~projected/token") },
		"write into a pod's volume": func() error { return os.WriteFile(filepath.Join(volume, "x"), nil, 0o600) },
		"read the node's files":     func() error { return read("shadow") },
		"write beside its state":    func() error { return os.WriteFile(filepath.Join(dir, "run/x"), nil, 0o600) },
		"keep state":                func() error { return os.WriteFile(filepath.Join(dir, "run/agent/x"), nil, 0o600) },
		"make a pod's socket":       func() error { return listenIn(filepath.Join(volume, "mount")) },
		"make the operator's socket": func() error {
			l, err := attest.Listen(attest.UnixConfig{Path: cfg.AdminSocket, UIDs: []uint32{0}})
			if err == nil {
				err = l.Close()
			}
			return err
		},
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
	return 0
}

func listenIn(path string) error {
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	dir, err := os.OpenFile(path, unix.O_PATH, 0) // which needs no right to read
	if err != nil {
		return err
	}
	defer dir.Close()
	l, err := attest.ListenMount(attest.MountConfig{Dir: dir, Name: "v"})
	if err != nil {
		return err
	}
	if err := l.Close(); err != nil {
		return err
	}
	return os.Remove(path)
}

func TestConfinedAgent(t *testing.T) {
	dir, err := os.MkdirTemp("", "c") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for _, file := range []string{"token/token", "bundle/bundle.pem", "shadow", "kubelet/pods/uid/volumes/kubernetes.io~projected/token", "kubelet/pods/uid/volumes/kubernetes.io~csi/uds/vol_data.json"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), "AGENT_TEST_CONFINE="+dir)
	out, err := child.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if strings.Contains(string(out), "no Landlock") {
		if os.Getenv("CI") == "true" {
			t.Fatal("this kernel has no Landlock")
		}
		t.Skip("this kernel has no Landlock")
	}
	for name, want := range map[string]string{
		"read its token": "done", "read the roots": "done", "keep state": "done", "make a pod's socket": "done", "make the operator's socket": "done",
		"read a pod's token": "refused", "write into a pod's volume": "refused", "read the node's files": "refused", "write beside its state": "refused",
	} {
		if !strings.Contains(string(out), name+" "+want+"\n") {
			t.Errorf("%s: want %s\n%s", name, want, out)
		}
	}
}
