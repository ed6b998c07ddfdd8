package discovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// source is the text of a file, as it was when nothing in it was refused. It is
// immutable.
type source struct {
	File string `json:"file"`
	// ID tells the file from another one of the same name.
	ID   string `json:"id"`
	Text []byte `json:"text"`
}

// sourcesDir is where sources are kept, below the directory of last good documents.
const sourcesDir = "files"

func sourceName(file string) string {
	sum := sha256.Sum256([]byte(file))
	return hex.EncodeToString(sum[:16]) + goodSuffix
}

func (s *source) contentHash() string {
	sum := sha256.Sum256(s.Text)
	return s.File + "\x00" + s.ID + "\x00" + hex.EncodeToString(sum[:])
}

// readSources reads the texts that an earlier process left. Without one (it is
// damaged, or of a release that kept none) only its file's documents are known.
func (s *lastGood) readSources() {
	s.texts = map[string]*source{}
	entries, err := os.ReadDir(filepath.Join(s.dir, sourcesDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Error("last good policy files cannot be read", slog.Any("error", err))
	}
	for _, e := range entries {
		path := filepath.Join(s.dir, sourcesDir, e.Name())
		src := &source{}
		data, err := readSource(path)
		if err == nil {
			err = json.Unmarshal(data, src)
		}
		if err != nil || e.Name() != sourceName(src.File) || !strings.HasSuffix(e.Name(), goodSuffix) {
			s.log.Warn("kept text of a policy file cannot be used", slog.String("file", path), slog.Any("error", err))
			_ = os.Remove(path) // it is written anew
			continue
		}
		s.texts[src.File] = src
		s.storedTexts[e.Name()] = src.contentHash()
	}
}

// readSource reads what keepSources wrote, which is larger than its text.
func readSource(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > 2*maxFile {
		return nil, errors.New("no file that was kept here")
	}
	return os.ReadFile(path)
}

// lastSources returns the texts that the documents in force came from, by file.
// Where a text is missing, the documents themselves stand for it.
func (s *lastGood) lastSources(docs map[Ref]good) map[string]*source {
	out := map[string]*source{}
	parts := map[string][][]byte{}
	refs := slices.SortedFunc(maps.Keys(docs), func(x, y Ref) int { return strings.Compare(x.String(), y.String()) })
	for _, ref := range refs {
		file := docs[ref].File
		if src := s.texts[file]; src != nil {
			out[file] = src
		} else {
			parts[file] = append(parts[file], docs[ref].JSON)
		}
	}
	for file, objects := range parts {
		out[file] = &source{File: file, Text: bytes.Join(objects, []byte("\n---\n"))}
	}
	return out
}

// keepSources makes the texts on disk those of the files that docs came from: the
// present text where nothing in it is refused, else the one that was kept.
func (s *lastGood) keepSources(docs map[Ref]good, sources map[string]*source) error {
	if s.dir == "" {
		return nil
	}
	dir := filepath.Join(s.dir, sourcesDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("discovery: %w", err)
	}
	wanted := map[string]bool{}
	var failed error
	for _, g := range docs {
		name := sourceName(g.File)
		src := sources[g.File]
		if wanted[name] || src == nil {
			wanted[name] = true
			continue
		}
		wanted[name] = true
		if hash := src.contentHash(); s.storedTexts[name] != hash {
			if err := writeJSON(dir, name, src); err != nil {
				failed = fmt.Errorf("discovery: keeping %s: %w", g.File, err)
				continue
			}
			s.storedTexts[name] = hash
		}
	}
	for name := range s.storedTexts {
		if wanted[name] {
			continue
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			failed = fmt.Errorf("discovery: %w", err)
			continue
		}
		delete(s.storedTexts, name)
	}
	return failed
}
