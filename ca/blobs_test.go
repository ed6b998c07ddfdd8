package ca_test

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"castellan.dev/ca"
	"castellan.dev/ca/blobstest"
	"castellan.dev/ca/ledger"
)

func TestDiskBlobs(t *testing.T) {
	blobstest.Run(t, func(t *testing.T) blobstest.Place {
		dir := t.TempDir()
		return blobstest.Place{Open: func(*testing.T) ca.Blobs { return ca.DiskBlobs(dir) }}
	})
}

func TestMemoryBlobs(t *testing.T) {
	blobstest.Run(t, func(*testing.T) blobstest.Place {
		var m blobstest.Memory
		return blobstest.Place{Open: func(*testing.T) ca.Blobs { return &m }}
	})
}

// TestKeysElsewhere: with a store of its own, nothing of the authority but the lock
// is in its directory, and a restart finds everything in the store.
func TestKeysElsewhere(t *testing.T) {
	var keys blobstest.Memory
	e := newEnv(t, func(c *ca.Config) { c.Keys = &keys })
	a := e.Open()
	issued, _ := issue(t, a, request(t))
	mint(t, a, 0, "a")
	root, svid, serving := byRole(t, a, ca.RoleRoot), byRole(t, a, ca.RoleSVIDIssuer), byRole(t, a, ca.RoleServingIssuer)
	bundle := a.Bundle()
	files, err := os.ReadDir(filepath.Join(e.cfg.DataDir, "ca"))
	if err != nil || len(files) != 1 || files[0].Name() != "lock" {
		t.Errorf("in the directory: %v, %v", files, err)
	}
	if got := slices.Sorted(maps.Keys(keys.Names())); !slices.Equal(got, slices.Sorted(slices.Values(ca.BlobNames()))) {
		t.Errorf("kept: %v", got)
	}
	e.cfg.DataDir = t.TempDir() // the volume is another, the keys are the same
	a = e.Open()
	if !root.Equal(byRole(t, a, ca.RoleRoot)) || !svid.Equal(byRole(t, a, ca.RoleSVIDIssuer)) || !serving.Equal(byRole(t, a, ca.RoleServingIssuer)) {
		t.Error("a restart changed the root or an issuer")
	}
	if got := a.Bundle(); got.Sequence != bundle.Sequence || len(got.JWTAuthorities) != len(bundle.JWTAuthorities) {
		t.Errorf("bundle %d, was %d", got.Sequence, bundle.Sequence)
	}
	if len(issued.Chain) == 0 {
		t.Error("no chain")
	}
}

// TestLostKeysAreNotReplaced: with keys that can be lost apart from the ledger, a
// used ledger without a root is refused, until the operator says that he wants a
// new one, which counts once.
func TestLostKeysAreNotReplaced(t *testing.T) {
	var keys blobstest.Memory
	e := newEnv(t, func(c *ca.Config) { c.Keys = &keys })
	root := byRole(t, e.Open(), ca.RoleRoot)
	keys.Remove()
	_, err := e.TryOpen()
	contains(t, err, "memory, document root.pem is missing while the ledger holds certificates issued under a root", "restore it from a backup", "that everybody must learn to trust, tell")
	if len(keys.Names()) != 0 {
		t.Error("something was written")
	}
	keys.Tell()
	fresh := byRole(t, e.Open(), ca.RoleRoot)
	if fresh.Equal(root) {
		t.Error("the same root")
	}
	if !strings.Contains(e.log.String(), "the operator asked for a new root") {
		t.Errorf("log: %s", e.log)
	}
	keys.Remove()
	if _, err := e.TryOpen(); err == nil {
		t.Error("what the operator said once counted twice")
	}
}

// TestFirstStartThatFailedIsNoHistory: a root's own row is in the ledger before the
// root is kept; when that fails, the next start makes another root unasked.
func TestFirstStartThatFailedIsNoHistory(t *testing.T) {
	var keys full
	e := newEnv(t, func(c *ca.Config) { c.Keys = &keys })
	keys.full = true
	_, err := e.TryOpen()
	contains(t, err, "make the root: no room")
	if rows, _ := e.ledger.Rows(t.Context()); rows != 1 {
		t.Fatalf("%d rows", rows)
	}
	keys.full = false
	e.Open()
}

// full is a store that can be read and, while full, not written.
type full struct {
	blobstest.Memory
	full bool
}

func (f *full) Write(ctx context.Context, name string, data []byte) error {
	if f.full {
		return errors.New("no room")
	}
	return f.Memory.Write(ctx, name, data)
}

// TestStoreAway: what is in memory goes on signing while the store fails, and what
// was due is made once it works.
func TestStoreAway(t *testing.T) {
	var keys blobstest.Memory
	e := newEnv(t, func(c *ca.Config) { c.Keys = &keys })
	a := e.Open()
	svid := byRole(t, a, ca.RoleSVIDIssuer)
	keys.Fail(errors.New("connection refused"))
	e.clock.Add(5 * day)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := ca.Renew(ctx, a); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Fatal(err)
	}
	issue(t, a, request(t))
	if err := a.Ready(); err != nil {
		t.Error(err)
	}
	if !svid.Equal(byRole(t, a, ca.RoleSVIDIssuer)) {
		t.Error("an issuer that is kept nowhere is in use")
	}
	keys.Fail(nil)
	if err := ca.Renew(ctx, a); err != nil {
		t.Fatal(err)
	}
	if svid.Equal(byRole(t, a, ca.RoleSVIDIssuer)) {
		t.Error("not renewed")
	}
	_, err := e.TryOpen()
	if err != nil {
		t.Fatal(err)
	}
	keys.Fail(errors.New("connection refused"))
	_, err = e.TryOpen()
	contains(t, err, "connection refused")
}

// blind is a ledger that cannot be asked.
type blind struct{ ledger.Recorder }

func TestLedgerMustTell(t *testing.T) {
	var keys blobstest.Memory
	e := newEnv(t, func(c *ca.Config) { c.Keys, c.Ledger = &keys, blind{c.Ledger} })
	_, err := e.TryOpen()
	contains(t, err, "the ledger cannot tell whether there was a root before")
}
