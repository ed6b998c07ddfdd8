package ca_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"castellan.dev/ca"
)

// TestFullDiskLosesNothing uses a real file system with no room left: a renewal
// that cannot be written leaves the old files whole and the old issuers at work,
// over a restart too.
func TestFullDiskLosesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,mode=700"); err != nil {
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
	e := newEnv(t, func(c *ca.Config) { c.DataDir = dir })
	issuer := byRole(t, e.Open(), ca.RoleSVIDIssuer)
	files := map[string][]byte{}
	for _, name := range []string{"root.pem", "svid-issuer.pem", "serving-issuer.pem", "jwt-keys.json", "bundle.json"} {
		data, err := os.ReadFile(e.path(name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = data
	}
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("the file system is not full")
	}
	e.clock.Add(5 * day) // everything under the root is due
	a := e.Open()
	if !strings.Contains(e.log.String(), "renewal failed; what is valid stays in use") || !strings.Contains(e.log.String(), "no space left on device") {
		t.Errorf("log: %s", e.log)
	}
	if !issuer.Equal(byRole(t, a, ca.RoleSVIDIssuer)) {
		t.Error("an issuer that is not on disk is in use")
	}
	issue(t, a, request(t))
	mint(t, a, 0, "a")
	for name, want := range files {
		if got, err := os.ReadFile(e.path(name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s changed: %v", name, err)
		}
	}
	if left, _ := filepath.Glob(e.path(".tmp-*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	if issuer.Equal(byRole(t, e.Open(), ca.RoleSVIDIssuer)) {
		t.Error("not renewed once there was room")
	}
}
