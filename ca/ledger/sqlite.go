package ledger

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"time"
)

// Config opens a SQLite ledger.
type Config struct {
	// Path of the database; its folder must exist.
	Path string
	// Log receives the causes of failures; nil discards.
	Log *slog.Logger
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// SQLite is the ledger in one file.
type SQLite struct{}

var _ Ledger = (*SQLite)(nil)

// Open opens or creates the ledger and brings its schema up to date. Close ends it.
func Open(ctx context.Context, cfg Config) (*SQLite, error) {
	return nil, errors.New("ledger: not yet")
}

// Intent implements Recorder.
func (s *SQLite) Intent(ctx context.Context, e Entry) (uint64, error) { return 0, ErrUnavailable }

// Result implements Recorder.
func (s *SQLite) Result(sequence uint64, r Result) {}

// Query implements Reader.
func (s *SQLite) Query(ctx context.Context, f Filter) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) { yield(Entry{}, ErrUnavailable) }
}

// BySerial implements Reader.
func (s *SQLite) BySerial(ctx context.Context, serial string) (Entry, error) {
	return Entry{}, ErrNotFound
}

// Rows implements Reader.
func (s *SQLite) Rows(ctx context.Context) (uint64, error) { return 0, ErrUnavailable }

// Healthy implements Ledger.
func (s *SQLite) Healthy() error { return ErrUnavailable }

// Close implements Ledger.
func (s *SQLite) Close() error { return nil }
