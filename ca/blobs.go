package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"path/filepath"
	"slices"
	"strings"

	"castellan.dev/ca/ledger"
	"castellan.dev/internal/disk"
)

// Blobs keeps small secret documents by name, durably and atomically. All that
// the authority must not lose goes through it, so that its keys can live apart
// from the volume that holds the ledger.
type Blobs interface {
	// Read returns what was written last under name, or an error that is
	// fs.ErrNotExist.
	Read(ctx context.Context, name string) ([]byte, error)
	// Write replaces the document atomically and returns when that is durable. It
	// fails, and changes nothing, when somebody else wrote since it was read.
	Write(ctx context.Context, name string, data []byte) error
	// Where names the place of a document for messages; of all of them for "".
	Where(name string) string
}

// Beginner is Blobs that passes on an operator's word that a new root is wanted
// although there has been one.
type Beginner interface {
	// MayBegin reports whether that has been said; the next Write uses it up.
	MayBegin(ctx context.Context) (bool, error)
	// HowToBegin is how to say it.
	HowToBegin() string
}

// BlobNames are the documents that the authority keeps: roots and issuers with
// their keys, the JWT keys, and the bundle's sequence.
func BlobNames() []string {
	return []string{pairName(RoleRoot), pairName(RoleSVIDIssuer), pairName(RoleServingIssuer), keyRingFile, bundleFile}
}

// diskBlobs keeps each document in one file that its owner alone can read.
// Somebody else's writing is not noticed but prevented: by the directory's lock.
type diskBlobs struct{ dir string }

// DiskBlobs keeps documents in a directory, which must exist.
func DiskBlobs(dir string) Blobs { return diskBlobs{dir} }

// Where implements Blobs.
func (d diskBlobs) Where(name string) string { return filepath.Join(d.dir, name) }

// Read implements Blobs.
func (d diskBlobs) Read(ctx context.Context, name string) ([]byte, error) {
	if err := checkBlobName(ctx, name); err != nil {
		return nil, err
	}
	return disk.ReadSecret(d.Where(name))
}

// Write implements Blobs.
func (d diskBlobs) Write(ctx context.Context, name string, data []byte) error {
	if err := checkBlobName(ctx, name); err != nil {
		return err
	}
	return disk.Write(d.Where(name), data, 0o600)
}

// checkBlobName keeps names inside the directory.
func checkBlobName(ctx context.Context, name string) error {
	if name == "" || len(name) > 128 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" || name[0] == '.' {
		return fmt.Errorf("%q is no name of a document", name)
	}
	return ctx.Err()
}

// neverUsed refuses to make a root where there was one before: that would change
// trust silently. What an earlier root left behind tells, and where the keys are
// apart from the ledger and can so be lost alone, the ledger does.
func neverUsed(ctx context.Context, cfg Config, blobs Blobs) error {
	root := pairName(RoleRoot)
	for _, name := range slices.DeleteFunc(BlobNames(), func(n string) bool { return n == root }) {
		_, err := blobs.Read(ctx, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		return fmt.Errorf("%s is missing while %s exists; restore the root from a backup, or remove %s to begin with a new root that everybody must learn to trust",
			blobs.Where(root), blobs.Where(name), blobs.Where(""))
	}
	if cfg.Keys == nil {
		// On disk both are in one directory: who removed the keys alone has told.
		return nil
	}
	used, err := rootWasUsed(ctx, cfg.Ledger)
	if err != nil || !used {
		return err
	}
	hint := "restore it from a backup"
	if b, ok := blobs.(Beginner); ok {
		told, err := b.MayBegin(ctx)
		if err != nil {
			return err
		}
		if told {
			cfg.Log.Warn("the operator asked for a new root; everybody must learn to trust it", "keys", blobs.Where(""))
			return nil
		}
		hint += ", or, to begin with a new root that everybody must learn to trust, " + b.HowToBegin()
	}
	return fmt.Errorf("%s is missing while the ledger holds certificates issued under a root; %s", blobs.Where(root), hint)
}

// history is the part of a ledger that is asked for it.
type history interface {
	Query(ctx context.Context, f ledger.Filter) iter.Seq2[ledger.Entry, error]
}

// rootWasUsed looks for a row that some root signed other than itself: the root is
// durable before it signs anything else, while its own row is there even if the
// server ended before the root was kept.
func rootWasUsed(ctx context.Context, l ledger.Recorder) (bool, error) {
	h, ok := l.(history)
	if !ok {
		return false, errors.New("the ledger cannot tell whether there was a root before; with keys kept elsewhere it must")
	}
	for e, err := range h.Query(ctx, ledger.Filter{}) {
		if err != nil {
			return false, fmt.Errorf("ask the ledger whether there was a root before: %w", err)
		}
		if e.Attestor != ledger.AttestorAuthority || string(e.IssuerKeyID) != string(e.SubjectKeyID) {
			return true, nil
		}
	}
	return false, nil
}
