package jws

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"
)

// pollEvery is how often a file of keys is looked at.
const pollEvery = time.Second

// File keeps the key set of a file fresh. The last good set is kept while the
// file is missing or broken.
type File struct {
	*source
	path string
	log  *slog.Logger
}

// NewFile reads the file once; what is wrong with it is an error.
func NewFile(path string, log *slog.Logger, now func() time.Time) (*File, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	f := &File{path: path, log: log}
	f.source = newSource("file:"+path, now, func(context.Context) (*KeySet, error) { return readKeys(path) })
	return f, f.refresh(context.Background())
}

func readKeys(path string) (*KeySet, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("jws: %w", err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxJWKS+1))
	if err != nil {
		return nil, fmt.Errorf("jws: %w", err)
	}
	keys, err := ParseJWKS(data)
	if err != nil {
		return nil, fmt.Errorf("%w (file %s)", err, path)
	}
	return keys, nil
}

// Run follows the file until ctx ends. It reads it anew when its time, size or
// inode changed.
func (f *File) Run(ctx context.Context) error {
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	var last os.FileInfo
	for {
		info, err := os.Stat(f.path)
		same := err == nil && last != nil && os.SameFile(info, last) && info.ModTime().Equal(last.ModTime()) && info.Size() == last.Size()
		if !same {
			before := f.Err()
			if err := f.refresh(ctx); err != nil && (before == nil || before.Error() != err.Error()) {
				f.log.Warn("key file could not be read, the last good keys stay", "path", f.path, "error", err)
			}
		}
		last = info
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}
