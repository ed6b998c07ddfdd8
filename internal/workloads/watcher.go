package workloads

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// pollEvery finds changes that no notification came for (network file systems).
	pollEvery = 500 * time.Millisecond
	// settle is waited after a notification, so that a writer can finish.
	settle = 20 * time.Millisecond
)

// Watcher keeps the last good reading of a file.
type Watcher struct {
	path  string
	log   *slog.Logger
	state atomic.Pointer[state]

	mu      sync.Mutex
	changed chan struct{}
	last    os.FileInfo
}

// state is immutable.
type state struct {
	file *File
	err  error // why the file as it is now is not in force
}

// NewWatcher reads the file once; what is wrong with it is an error.
func NewWatcher(path string, log *slog.Logger) (*Watcher, error) {
	if path == "" {
		return nil, errors.New("workloads: no file named")
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	info, file, err := read(path)
	if err != nil {
		return nil, err
	}
	w := &Watcher{path: path, log: log, changed: make(chan struct{}), last: info}
	w.state.Store(&state{file: file})
	return w, nil
}

// Current returns the last good reading, never nil.
func (w *Watcher) Current() *File { return w.state.Load().file }

// Err returns why the file as it is now was refused, nil if it is in force.
func (w *Watcher) Err() error { return w.state.Load().err }

// Changed returns a channel that is closed at the next change of Current. Take
// it before Current, so that no change is missed.
func (w *Watcher) Changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

// Run follows the file until ctx ends. The folder is watched, because a file that
// is replaced (as it should be, atomically) takes its own watch away with it.
func (w *Watcher) Run(ctx context.Context) error {
	var events <-chan fsnotify.Event
	notify, err := fsnotify.NewWatcher()
	if err == nil {
		defer notify.Close()
		if err = notify.Add(filepath.Dir(w.path)); err == nil {
			events = notify.Events
		}
	}
	if err != nil {
		w.log.Warn("workloads file cannot be watched, it is looked at from time to time", "path", w.path, "error", err)
	}
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		w.check()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		case _, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			timer := time.NewTimer(settle)
			select {
			case <-ctx.Done():
				timer.Stop()
				return ctx.Err()
			case <-timer.C:
			}
		}
	}
}

// check reads the file if it is another than last time.
func (w *Watcher) check() {
	info, err := os.Stat(w.path)
	if err == nil && w.last != nil && os.SameFile(info, w.last) && info.ModTime().Equal(w.last.ModTime()) && info.Size() == w.last.Size() {
		return
	}
	info, file, err := read(w.path)
	if err != nil {
		// Keeps the last good reading: a broken file must not delete every pod.
		w.last = nil
		w.refuse(err)
		return
	}
	w.last = info
	w.publish(file)
}

func (w *Watcher) refuse(err error) {
	old := w.state.Load()
	if old.err != nil && old.err.Error() == err.Error() {
		return
	}
	w.log.Error("workloads file refused, its last good version stays in force", "path", w.path, "error", err)
	w.state.Store(&state{file: old.file, err: err})
}

func (w *Watcher) publish(file *File) {
	old := w.state.Load()
	if reflect.DeepEqual(old.file, file) {
		w.state.Store(&state{file: old.file})
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state.Store(&state{file: file})
	close(w.changed)
	w.changed = make(chan struct{})
	w.log.Info("workloads file read", "path", w.path, "workloads", len(file.Workloads), "services", len(file.Services))
}

func read(path string) (os.FileInfo, *File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("workloads: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("workloads: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, nil, fmt.Errorf("workloads: %w", err)
	}
	file, err := Parse(data)
	if err != nil {
		return nil, nil, fmt.Errorf("%w (file %s)", err, path)
	}
	return info, file, nil
}
