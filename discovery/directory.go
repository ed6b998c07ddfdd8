package discovery

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"castellan.dev/api/policy"
)

const (
	// debounce is how long after the last event a directory is read, debounceMost how
	// long after the first.
	debounce     = 50 * time.Millisecond
	debounceMost = 250 * time.Millisecond
	// pollEvery finds what no event tells: network and overlay file systems, links
	// whose target is elsewhere.
	pollEvery = 500 * time.Millisecond
	// settle is how long a file must stay refused or empty, unchanged, before that
	// counts: it may be half written.
	settle = 350 * time.Millisecond
	// gone is how long a file must be missing before that counts: editors move the
	// old one away before they write the new.
	gone = 150 * time.Millisecond
	// racy is how long after its last change a file may change again without any
	// other time stamp.
	racy = 100 * time.Millisecond
)

// DirectoryConfig configures a Directory.
type DirectoryConfig struct {
	Path string
	Mesh policy.Mesh
	Log  *slog.Logger
	Now  func() time.Time
}

// Directory is a Source: a watched directory of YAML and JSON files. A change is
// seen within a second; what looks half-written gets that long to be completed.
type Directory struct {
	cfg   DirectoryConfig
	files map[string]*file // of Run's goroutine (and, before it, the constructor and resume) alone
	// failure is why the directory as a whole could not be read.
	failure string
	// others are the visible entries that do not count, since when they are there,
	// and shown those of them that are reported.
	others map[string]time.Time
	shown  []string

	mu      sync.Mutex
	docs    []FileDocument
	changed chan struct{}
}

// file is what counts of one file, and what may take its place.
type file struct {
	stamp stamp
	hash  [sha256.Size]byte
	docs  []FileDocument
	// text is nil where the file could not be read. See content for the others.
	text    []byte
	id      string
	writers writers
	// good is the last text of which nothing was refused; nil if there was none.
	good *source
	// reread: it was read so soon after its last change that its stamp proves nothing.
	reread bool

	// candidate has not counted yet, since..., and does after enough.
	candidate *stamp
	since     time.Time
	enough    time.Duration
	// doubted is since when anything else in its place was doubtful, held why, once
	// that is to be reported.
	doubted time.Time
	held    string
}

// stamp tells versions of a file apart without reading it.
type stamp struct {
	info    fs.FileInfo // nil: cannot be looked at
	missing bool
}

func (s stamp) same(o stamp) bool {
	if s.missing || o.missing || s.info == nil || o.info == nil {
		return s.missing == o.missing && (s.info == nil) == (o.info == nil)
	}
	return os.SameFile(s.info, o.info) && s.info.Size() == o.info.Size() && s.info.ModTime().Equal(o.info.ModTime())
}

// NewDirectory reads the directory once; that it cannot be read is an error.
func NewDirectory(cfg DirectoryConfig) (*Directory, error) {
	if cfg.Path == "" {
		return nil, errors.New("discovery: no policy directory named")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	d := &Directory{cfg: cfg, files: map[string]*file{}, changed: make(chan struct{})}
	names, others, err := policyFiles(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("discovery: policy directory: %w", err)
	}
	for _, name := range names {
		// What is there at the start counts as it is, unless resume knows better.
		d.files[name] = d.read(name, d.look(name))
	}
	d.others = map[string]time.Time{}
	for _, name := range others {
		d.others[name] = time.Time{}
	}
	d.shown = others
	d.docs = d.collect()
	if n := len(d.docs); n > maxDocuments {
		return nil, fmt.Errorf("discovery: %s holds %d documents, %d are allowed", cfg.Path, n, maxDocuments)
	}
	return d, nil
}

// Documents implements Source. They are as Admit returns them.
func (d *Directory) Documents() ([]FileDocument, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.docs, d.changed
}

// Run follows the directory until ctx ends.
func (d *Directory) Run(ctx context.Context) error {
	w := &dirWatch{path: d.cfg.Path, log: d.cfg.Log}
	defer w.close()
	for {
		events := w.events()
		wait := d.scan()
		timer := time.NewTimer(min(wait, pollEvery))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-events:
			quiet(ctx, events)
		}
		timer.Stop()
	}
}

// quiet waits until no event has come for a while.
func quiet(ctx context.Context, events <-chan fsnotify.Event) {
	most := time.NewTimer(debounceMost)
	defer most.Stop()
	for {
		still := time.NewTimer(debounce)
		select {
		case <-ctx.Done():
		case <-still.C:
		case <-most.C:
		case _, ok := <-events:
			still.Stop()
			if ok {
				continue
			}
		}
		still.Stop()
		return
	}
}

// scan looks at every file, publishes what has changed, and returns when to look
// again at the latest.
func (d *Directory) scan() time.Duration {
	names, others, err := policyFiles(d.cfg.Path)
	if err != nil {
		d.fail(err)
		return pollEvery
	}
	changed := d.failure != ""
	d.failure = ""
	if d.passOver(others) {
		changed = true
	}
	wait := pollEvery
	for _, name := range d.union(names) {
		c, again := d.update(name)
		changed = changed || c
		wait = min(wait, again)
	}
	if changed {
		d.publish()
	}
	return wait
}

// union is the files that are there and those that were.
func (d *Directory) union(names []string) []string {
	all := slices.Concat(names, slices.Collect(maps.Keys(d.files)))
	slices.Sort(all)
	return slices.Compact(all)
}

// update looks at one file. again is when to look at the latest.
func (d *Directory) update(name string) (changed bool, again time.Duration) {
	now := d.cfg.Now()
	s := d.look(name)
	old := d.files[name]
	if old == nil && s.missing {
		return false, pollEvery
	}
	if old != nil && s.missing && old.stamp.missing {
		delete(d.files, name) // it never counted
		return old.held != "", pollEvery
	}
	if old != nil && s.same(old.stamp) && !old.reread {
		return old.clear(), pollEvery
	}
	if s.missing {
		if !d.moved(old) && !old.waited(s, now, gone) {
			return false, gone
		}
		delete(d.files, name)
		return len(old.docs) > 0 || old.held != "", pollEvery
	}
	next := d.read(name, s)
	again = pollEvery
	if next.reread {
		again = racy
	}
	if old != nil && old.hash == next.hash {
		old.stamp, old.id, old.reread = next.stamp, next.id, next.reread
		return old.clear(), again
	}
	if why := doubtOf(old, next); why != nil {
		if old == nil {
			// Counts as absent until there is no doubt: it was not in force before either.
			old = &file{stamp: stamp{missing: true}}
			d.files[name] = old
		}
		if !old.waited(s, now, why.wait) || why.wait == 0 {
			return old.report(why, now), settle / 4
		}
	}
	if next.good == nil && old != nil {
		next.good = old.good
	}
	d.files[name] = next
	return true, again
}

// waited notes that next would take f's place, and reports whether it has been
// the same long enough.
func (f *file) waited(next stamp, now time.Time, enough time.Duration) bool {
	if f.candidate == nil || !f.candidate.same(next) || f.enough != enough {
		f.candidate, f.since, f.enough = &next, now, enough
		return false
	}
	return now.Sub(f.since) >= enough
}

// doubtful: refused in part, or empty.
func (f *file) doubtful() bool {
	return len(f.docs) == 0 || slices.ContainsFunc(f.docs, FileDocument.Refused)
}

// moved reports whether the file that f was read from has another name now.
func (d *Directory) moved(f *file) bool {
	if f.stamp.info == nil {
		return false
	}
	names, _, err := policyFiles(d.cfg.Path)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(names, func(name string) bool {
		s := d.look(name)
		return s.info != nil && os.SameFile(s.info, f.stamp.info)
	})
}

func (d *Directory) look(name string) stamp {
	path := filepath.Join(d.cfg.Path, name)
	info, err := os.Stat(path)
	if err == nil {
		return stamp{info: info}
	}
	if _, lerr := os.Lstat(path); errors.Is(lerr, fs.ErrNotExist) {
		return stamp{missing: true}
	}
	return stamp{} // there, but not to be looked at; or a link to nowhere
}

func (d *Directory) read(name string, s stamp) *file {
	path := filepath.Join(d.cfg.Path, name)
	c, err := readContent(path)
	if err != nil {
		return &file{stamp: s, hash: sha256.Sum256([]byte("unreadable: " + err.Error())), docs: []FileDocument{unreadable(path, err)}}
	}
	f := d.parse(&source{File: path, ID: c.id, Text: c.data})
	f.stamp, f.writers = s, c.writers
	if s.info != nil {
		age := d.cfg.Now().Sub(s.info.ModTime())
		f.reread = age >= 0 && age < racy
	}
	return f
}

// parse makes a file of its text.
func (d *Directory) parse(src *source) *file {
	f := &file{id: src.ID, text: src.Text, hash: sha256.Sum256(src.Text), docs: Admit(parseFile(src.File, src.Text), d.cfg.Mesh)}
	if len(f.docs) > 0 && !f.doubtful() {
		f.good = src
		for i := range f.docs {
			f.docs[i].src = src
		}
	}
	return f
}

// resume takes up what an earlier process last read without refusing anything, by
// path, before Run is called: what looks half-written beside it does not count.
func (d *Directory) resume(sources map[string]*source) {
	resumed := false
	for name, next := range d.files {
		src := sources[filepath.Join(d.cfg.Path, name)]
		if src == nil {
			continue
		}
		old := d.parse(src)
		if why := doubtOf(old, next); why != nil && why.reason != "" && old.hash != next.hash {
			old.doubted, old.held = d.cfg.Now(), why.reason
			d.files[name] = old
			resumed = true
		}
	}
	if resumed {
		d.publish()
	}
}
