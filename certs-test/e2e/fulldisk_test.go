package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// smallDisk mounts a file system of its own at dir. Only root may; elsewhere the
// test is skipped by name, but never on CI.
func smallDisk(t *testing.T, dir, options string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,"+options); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("mounting a small disk: %v", err)
		}
		t.Skipf("a small disk cannot be mounted here (%v): run as root", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fill writes until there is no room left.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			size /= 2
		}
	}
}

// TestFullDisk: with the disk full nothing is signed, and everybody is told so;
// what was issued goes on working, also through a restart; with room again all
// goes on by itself, and the ledger is whole.
func TestFullDisk(t *testing.T) {
	s := newSite(t, "")
	smallDisk(t, s.data, "size=8m")
	s.start()
	client := s.client()
	first, firstChain := s.mustIssue(client)
	handed := []string{serialOf(first.SerialNumber)}

	ballast := filepath.Join(s.data, "ballast")
	for round := range 2 {
		fill(t, ballast)
		// Pages that the ledger already has may take a few more; all those count.
		var refused error
		for range 90 {
			leaf, chain, err := request(client, s.token(podOrders), s.token(podAgent), newCSR(t))
			if err != nil {
				refused = err
				break
			}
			s.verify(leaf, chain)
			handed = append(handed, serialOf(leaf.SerialNumber))
		}
		if refused == nil {
			t.Fatal("the disk is full and the server signs on")
		}
		s.wantRefused(t, refused, codes.Unavailable, textUnavailable, "full")
		s.verify(first, firstChain)
		if err := ready(s.http); err == nil || !strings.Contains(err.Error(), "[-] ledger") {
			t.Errorf("round %d: readiness says %v", round, err)
		}
		for serial := range issued(t, s.path("up.json")) {
			if serial == "" {
				t.Error("a row without a serial")
			}
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it signs again", func() error {
			leaf, chain, err := request(client, s.token(podOther), s.token(podAgent), newCSR(t))
			if err != nil {
				return fmt.Errorf("%w\n%s", err, status.Convert(err).Message())
			}
			s.verify(leaf, chain)
			handed = append(handed, serialOf(leaf.SerialNumber))
			return nil
		})
		eventually(t, "it is ready again", func() error { return ready(s.http) })
	}
	rows := issued(t, s.path("up.json"))
	for _, serial := range handed {
		if rows[serial].Outcome != "issued" {
			t.Errorf("%s was handed out and the ledger has %+v", serial, rows[serial])
		}
	}
	for serial, row := range rows {
		if row.Outcome == "issued" && row.PodUID == podOrders.UID && !contains(handed, serial) {
			t.Errorf("%s is in the ledger as issued, and nobody got it", serial)
		}
	}
	s.server.signal(syscall.SIGTERM)
	if code := s.server.wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	s.start()
	s.mustIssue(s.client())
}

func contains(list []string, s string) bool {
	for _, v := range list {
		if v == s {
			return true
		}
	}
	return false
}

// TestDiskFullAtFirstStart leaves nothing half-done: with room, the same
// directory serves.
func TestDiskFullAtFirstStart(t *testing.T) {
	s := newSite(t, "")
	smallDisk(t, s.data, "size=256k")
	fill(t, filepath.Join(s.data, "ballast"))
	s.launch().refusesToStart(t, s.data, "space")
	if err := os.Remove(filepath.Join(s.data, "ballast")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", s.data, "tmpfs", syscall.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.mustIssue(s.client())
}

// TestReadOnlyDataDirectory names the directory.
func TestReadOnlyDataDirectory(t *testing.T) {
	s := newSite(t, "")
	smallDisk(t, s.data, "size=1m")
	if err := syscall.Mount("tmpfs", s.data, "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	s.launch().refusesToStart(t, s.data, "read-only file system")
}

// TestFullDiskUnderAMesh: traffic does not notice that nothing can be signed, nor
// does a proxy that starts meanwhile: the agent has what it needs.
func TestFullDiskUnderAMesh(t *testing.T) {
	dir := shortDir(t)
	smallDisk(t, filepath.Join(dir, "server"), "size=8m")
	m := start(t, dir)
	ballast := m.path("server", "ballast")
	fill(t, ballast)
	stop := m.load(2)
	castellan(t, "cert", "inspect", "unix:"+m.file().Workloads["shop/orders"].Socket).want(t, 0, ordersID.String())
	m.wantStatus("guest/intruder", "orders", "GET", "/", 403)
	if requests, failed, first := stop(); failed > 0 || requests == 0 {
		t.Errorf("%d of %d requests failed, first: %s", failed, requests, first)
	}
	pid := m.file().Workloads["shop/orders"].PID
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the proxy of orders comes back", func() error {
		if m.file().Workloads["shop/orders"].PID == pid {
			return errors.New("not yet")
		}
		return nil
	})
	m.wantStatus("shop/frontend", "orders", "GET", "/", 200)
	// Policy needs no room to be enforced.
	m.write("90-extra.yaml", denyBench)
	m.wantStatus("shop/frontend", "orders", "GET", "/closed", 403)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "check is content", func() error {
		if r := castellan(t, "check", "--up", m.path("up.json")); r.code != 0 {
			return fmt.Errorf("%s", r.out)
		}
		return nil
	})
}
