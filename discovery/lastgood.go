package discovery

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/internal/disk"
)

// good is the last good version of a document.
type good struct {
	// File it came from: what a file that cannot be read any more held.
	File string `json:"file"`
	JSON []byte `json:"object"`

	doc policy.Document
	// hash is the version of JSON.
	hash string
}

// lastGood keeps good documents on disk, one file each, replaced atomically. A
// directory of "" keeps them in memory alone.
type lastGood struct {
	dir string
	log *slog.Logger
	// stored is what is on disk: file name → content hash; storedTexts the same of sources.
	stored, storedTexts map[string]string
	// texts are the sources that were found on disk.
	texts map[string]*source
}

const goodSuffix = ".json"

// openLastGood reads what an earlier process left. A file that is damaged or no
// longer valid is left out with a word in the log: its document then has no last
// good version, which denies.
func openLastGood(dir string, mesh policy.Mesh, log *slog.Logger) (*lastGood, map[Ref]good, error) {
	s := &lastGood{dir: dir, log: log, stored: map[string]string{}, storedTexts: map[string]string{}}
	docs := map[Ref]good{}
	if dir == "" {
		return s, docs, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("discovery: last good policies: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("discovery: last good policies: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.IsDir() {
			continue
		}
		if !strings.HasSuffix(e.Name(), goodSuffix) {
			_ = os.Remove(path) // left by a write that did not end
			continue
		}
		ref, g, err := readGood(path, mesh)
		if err != nil {
			log.Error("last good policy cannot be used", slog.String("file", path), slog.Any("error", err))
			continue
		}
		docs[ref] = g
		s.stored[e.Name()] = g.contentHash()
	}
	s.readSources()
	return s, docs, nil
}

func readGood(path string, mesh policy.Mesh) (Ref, good, error) {
	data, err := readFile(path)
	if err != nil {
		return Ref{}, good{}, err
	}
	var g good
	if err := json.Unmarshal(data, &g); err != nil {
		return Ref{}, good{}, fmt.Errorf("half-written or damaged: %w", err)
	}
	d := decode(g.File, 0, g.JSON)
	if d = Admit([]FileDocument{d}, mesh)[0]; d.Refused() {
		f := d.firstError()
		return Ref{}, good{}, fmt.Errorf("not valid any more: %s: %s", f.Field, f.Reason)
	}
	if filepath.Base(path) != goodName(d.Ref) {
		return Ref{}, good{}, errors.New("holds another document than its name says")
	}
	return d.Ref, newGood(d), nil
}

func newGood(d FileDocument) good {
	sum := sha256.Sum256(d.JSON)
	return good{File: d.File, JSON: d.JSON, doc: d.Document, hash: hex.EncodeToString(sum[:16])}
}

// of reports whether g is a version of what d is one of: an object that was made
// anew under the name of another inherits nothing.
func (g good) of(d FileDocument) bool { return d.UID == "" || d.UID == g.doc.Metadata.UID }

func (g good) contentHash() string { return g.File + "\x00" + g.hash }

func goodName(ref Ref) string {
	sum := sha256.Sum256([]byte(ref.Kind + "\x00" + ref.Namespace + "\x00" + ref.Name))
	return hex.EncodeToString(sum[:16]) + goodSuffix
}

// keep makes what is on disk equal docs. What could not be written is tried again
// at the next call; until then memory holds it.
func (s *lastGood) keep(docs map[Ref]good) error {
	if s.dir == "" {
		return nil
	}
	wanted := make(map[string]bool, len(docs))
	var failed error
	for ref, g := range docs {
		name := goodName(ref)
		wanted[name] = true
		if s.stored[name] == g.contentHash() {
			continue
		}
		if err := writeJSON(s.dir, name, g); err != nil {
			failed = fmt.Errorf("discovery: keeping %s: %w", ref, err)
			continue
		}
		s.stored[name] = g.contentHash()
	}
	for name := range s.stored {
		if wanted[name] {
			continue
		}
		if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			failed = fmt.Errorf("discovery: %w", err)
			continue
		}
		delete(s.stored, name)
	}
	return failed
}

// writeJSON replaces one file atomically and durably.
func writeJSON(dir, name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return disk.Write(filepath.Join(dir, name), data, 0o600)
}
