package discovery

import (
	"context"
	"log/slog"

	"castellan.dev/api/policy"
)

// DirectoryConfig configures a Directory.
type DirectoryConfig struct {
	Path string
	Mesh policy.Mesh
	Log  *slog.Logger
}

// Directory is a Source: a watched directory of YAML and JSON files.
type Directory struct{}

// NewDirectory reads the directory once; that it cannot be read is an error.
func NewDirectory(cfg DirectoryConfig) (*Directory, error) { return &Directory{}, nil }

// Documents implements Source.
func (d *Directory) Documents() ([]FileDocument, <-chan struct{}) { return nil, nil }

// Run follows the directory until ctx ends.
func (d *Directory) Run(ctx context.Context) error { <-ctx.Done(); return nil }
