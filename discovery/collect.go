package discovery

import (
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"castellan.dev/authz"
)

// passOver notes the entries that do not count, and says whether there is news to
// tell: of those that stay, since a file is often written beside the one it is to
// replace.
func (d *Directory) passOver(others []string) (news bool) {
	now := d.cfg.Now()
	var shown []string
	since := make(map[string]time.Time, len(others))
	for _, name := range others {
		since[name] = now
		if t, ok := d.others[name]; ok {
			since[name] = t
		}
		if now.Sub(since[name]) >= settle {
			shown = append(shown, name)
		}
	}
	news = !slices.Equal(shown, d.shown)
	d.others, d.shown = since, shown
	return news
}

// collect puts the documents of all files together, and refuses what stands in
// several.
func (d *Directory) collect() []FileDocument {
	docs := []FileDocument{}
	for _, name := range slices.Sorted(maps.Keys(d.files)) {
		f := d.files[name]
		docs = append(docs, f.docs...)
		if f.held != "" {
			docs = append(docs, heldNotice(filepath.Join(d.cfg.Path, name), f.held))
		}
	}
	docs = append(docs, d.passedOver()...)
	// Within a file duplicates have been found already; across files they have not.
	docs = slices.Clone(docs)
	refuseAcross(docs)
	if d.failure != "" {
		docs = append(docs, FileDocument{File: d.cfg.Path, notice: true, kept: true, Findings: []authz.Finding{{
			Severity: authz.SeverityError, Field: wholeDirectory, Reason: d.failure}}})
	}
	return docs
}

// maxShownOthers bounds the notices of one directory.
const maxShownOthers = 50

// passedOver warns of the entries that do not count.
func (d *Directory) passedOver() []FileDocument {
	var docs []FileDocument
	for i, name := range d.shown {
		reason := "is not read: policy stands in files named *.yaml, *.yml or *.json (lower case) of the directory itself"
		if i == maxShownOthers {
			reason, name = fmt.Sprintf("%d more entries are not read", len(d.shown)-i), ""
		}
		docs = append(docs, FileDocument{File: filepath.Join(d.cfg.Path, name), notice: true, Findings: []authz.Finding{{
			Severity: authz.SeverityWarning, Field: wholeFile, Reason: reason}}})
		if i == maxShownOthers {
			break
		}
	}
	return docs
}

func (d *Directory) publish() {
	docs := d.collect()
	if len(docs) > maxDocuments {
		d.fail(fmt.Errorf("%d documents, %d are allowed", len(docs), maxDocuments))
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.docs = docs
	close(d.changed)
	d.changed = make(chan struct{})
}

// fail keeps everything that was read before: a directory that cannot be read says
// nothing about what should be in force.
func (d *Directory) fail(err error) {
	failure := "directory cannot be read, everything read before stays in force: " + err.Error()
	if d.failure == failure {
		return
	}
	d.failure = failure
	d.cfg.Log.Error("policy directory cannot be read, everything read before stays in force",
		slog.String("path", d.cfg.Path), slog.Any("error", err))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.docs = append(slices.DeleteFunc(slices.Clone(d.docs), func(f FileDocument) bool { return f.notice }),
		FileDocument{File: d.cfg.Path, notice: true, kept: true, Findings: []authz.Finding{{Severity: authz.SeverityError, Field: wholeDirectory, Reason: failure}}})
	close(d.changed)
	d.changed = make(chan struct{})
}

// refuseAcross is refuseDuplicates for documents that were each checked within
// their own file already.
func refuseAcross(docs []FileDocument) {
	files := map[Ref]map[string]bool{}
	for _, d := range docs {
		if d.Ref.complete() {
			if files[d.Ref] == nil {
				files[d.Ref] = map[string]bool{}
			}
			files[d.Ref][d.File] = true
		}
	}
	var across []FileDocument
	var at []int
	for i, d := range docs {
		if len(files[d.Ref]) > 1 {
			across, at = append(across, d), append(at, i)
		}
	}
	refuseDuplicates(across)
	for i, n := range at {
		docs[n] = across[i]
	}
}
