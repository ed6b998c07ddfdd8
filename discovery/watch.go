package discovery

import (
	"io/fs"
	"log/slog"
	"os"

	"github.com/fsnotify/fsnotify"
)

// dirWatch has the kernel tell of changes in a directory, where it can; without,
// polling finds them.
type dirWatch struct {
	path    string
	log     *slog.Logger
	notify  *fsnotify.Watcher
	watched fs.FileInfo
	warned  bool
}

// events returns the channel to listen on until the next call. It follows the
// path to another directory when a link has been pointed there.
func (w *dirWatch) events() <-chan fsnotify.Event {
	info, err := os.Stat(w.path)
	if err == nil && w.notify != nil && os.SameFile(info, w.watched) {
		return w.notify.Events
	}
	w.close()
	if err != nil {
		return nil
	}
	notify, err := fsnotify.NewWatcher()
	if err == nil {
		if err = notify.Add(w.path); err == nil {
			w.notify, w.watched, w.warned = notify, info, false
			// Unread errors would hold up the events. What is lost to one, polling finds.
			go func() {
				for range notify.Errors {
				}
			}()
			return notify.Events
		}
		notify.Close()
	}
	if !w.warned {
		w.log.Warn("policy directory cannot be watched, it is looked at from time to time", slog.String("path", w.path), slog.Any("error", err))
		w.warned = true
	}
	return nil
}

func (w *dirWatch) close() {
	if w.notify != nil {
		w.notify.Close()
		w.notify = nil
	}
}
