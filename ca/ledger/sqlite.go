package ledger

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite" // also the database driver "sqlite", without cgo
	sqlite3 "modernc.org/sqlite/lib"

	"castellan.dev/internal/disk"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Config opens a SQLite ledger.
type Config struct {
	// Path of the database; its folder must exist.
	Path string
	// Log receives the causes of failures; nil discards.
	Log *slog.Logger
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// SQLite is the ledger in one file. One goroutine writes; whatever waits is
// committed together.
type SQLite struct {
	log  *slog.Logger
	now  func() time.Time
	lock *disk.Lock

	db      *sql.DB // the writer's single connection
	readers *sql.DB

	queue    chan *intent
	flushes  chan chan struct{}
	stop     chan struct{}
	stopped  chan struct{}
	closing  sync.Once
	closeErr error
	failed   atomic.Pointer[error]

	mu      sync.Mutex
	results []pendingResult
}

var _ Ledger = (*SQLite)(nil)

// Open opens or creates the ledger, brings its schema up to date and starts its
// writer. A write-ahead log that a crash left half-written is recovered by
// SQLite: what had been acknowledged is there. Close ends it.
func Open(ctx context.Context, cfg Config) (_ *SQLite, err error) {
	s := &SQLite{
		log: cfg.Log, now: cfg.Now,
		queue:   make(chan *intent, maxBatch),
		flushes: make(chan chan struct{}),
		stop:    make(chan struct{}),
		stopped: make(chan struct{}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	path, err := filepath.Abs(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	if s.lock, err = disk.Acquire(path + ".lock"); err != nil {
		if errors.Is(err, disk.ErrLocked) {
			return nil, fmt.Errorf("ledger: %s is in use by another server; give each its own data directory", path)
		}
		return nil, fmt.Errorf("ledger: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.release())
		}
	}()
	if err := s.open(ctx, path); err != nil {
		return nil, fmt.Errorf("ledger: open %s: %w", path, advise(err))
	}
	w, err := newWriter(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("ledger: open %s: %w", path, advise(err))
	}
	go w.run()
	return s, nil
}

func (s *SQLite) open(ctx context.Context, path string) error {
	// Made here and not by SQLite, which would let others read it; its
	// companions take the mode of the file.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	pragmas := url.Values{"_pragma": {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "cache_size(-8192)", "temp_store(MEMORY)", "wal_autocheckpoint(4000)"}, "_txlock": {"immediate"}}
	if s.db, err = sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: pragmas.Encode()}).String()); err != nil {
		return err
	}
	s.db.SetMaxOpenConns(1)
	reading := url.Values{"_pragma": {"busy_timeout(5000)", "query_only(1)"}}
	if s.readers, err = sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: reading.Encode()}).String()); err != nil {
		return err
	}
	s.readers.SetMaxOpenConns(4)
	var mode string
	if err := s.db.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode); err != nil {
		return err
	}
	if mode != "wal" {
		return fmt.Errorf("journal mode is %q, want wal; the file system may not support it", mode)
	}
	return migrate(ctx, s.db)
}

// advise says what can be done about an error of SQLite's.
func advise(err error) error {
	var cause *sqlite.Error
	if !errors.As(err, &cause) {
		return err
	}
	switch cause.Code() & 0xff { // the primary code
	case sqlite3.SQLITE_FULL:
		return fmt.Errorf("%w; there is no space left on its disk: make room and start again, nothing is lost", err)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return fmt.Errorf("%w; the file is damaged: restore it from a backup, or move it away and accept that what was issued before is unknown", err)
	}
	return err
}

func migrate(ctx context.Context, db *sql.DB) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	provider, err := goose.NewProvider(goose.DialectSQLite3, db, files, goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return err
	}
	sources := provider.ListSources()
	known := sources[len(sources)-1].Version
	have, err := provider.GetDBVersion(ctx)
	if err != nil {
		return err
	}
	if have > known {
		return fmt.Errorf("its schema is version %d and this program knows %d; run the newer castellan-server", have, known)
	}
	_, err = provider.Up(ctx)
	return err
}

// Healthy implements Ledger.
func (s *SQLite) Healthy() error {
	if err := s.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// Close implements Ledger. Intents that wait are refused.
func (s *SQLite) Close() error {
	s.closing.Do(func() {
		close(s.stop)
		<-s.stopped
		s.closeErr = s.release()
	})
	return s.closeErr
}

func (s *SQLite) release() error {
	var errs []error
	for _, db := range []*sql.DB{s.readers, s.db} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(append(errs, s.lock.Close())...)
}
