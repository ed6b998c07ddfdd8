package xds

import (
	"slices"
	"strings"
	"sync"
)

// Record is what one stream last said of one resource.
type Record struct {
	TypeURL, Name string
	// Acked is the version last accepted, "" if none.
	Acked string
	// Nacked is the version last refused, and Reason why; both are "" when the last
	// answer was an ACK.
	Nacked, Reason string
}

// Recorder is an Observer that remembers the last answer per resource. It is safe
// for concurrent use.
type Recorder struct {
	// Notify, if set, is called after each answer. It must not block.
	Notify func()

	mu      sync.Mutex
	node    string
	records map[[2]string]Record
}

// Node implements NodeObserver.
func (r *Recorder) Node(id string) {
	r.mu.Lock()
	r.node = id
	r.mu.Unlock()
}

// NodeID is what the client calls itself.
func (r *Recorder) NodeID() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.node
}

// Acked implements Observer.
func (r *Recorder) Acked(typeURL string, versions map[string]string) {
	r.update(typeURL, versions, func(rec *Record, version string) {
		rec.Acked, rec.Nacked, rec.Reason = version, "", ""
	})
}

// Nacked implements Observer.
func (r *Recorder) Nacked(typeURL string, versions map[string]string, reason string) {
	r.update(typeURL, versions, func(rec *Record, version string) { rec.Nacked, rec.Reason = version, reason })
}

func (r *Recorder) update(typeURL string, versions map[string]string, set func(*Record, string)) {
	r.mu.Lock()
	if r.records == nil {
		r.records = map[[2]string]Record{}
	}
	for name, version := range versions {
		key := [2]string{typeURL, name}
		rec := r.records[key]
		rec.TypeURL, rec.Name = typeURL, name
		set(&rec, version)
		if rec.Acked == "" && rec.Nacked == "" {
			delete(r.records, key) // gone, and the client knows
			continue
		}
		r.records[key] = rec
	}
	r.mu.Unlock()
	if r.Notify != nil {
		r.Notify()
	}
}

// Records lists what is known, by type and name.
func (r *Recorder) Records() []Record {
	r.mu.Lock()
	out := make([]Record, 0, len(r.records))
	for _, rec := range r.records {
		out = append(out, rec)
	}
	r.mu.Unlock()
	slices.SortFunc(out, func(a, b Record) int {
		if c := strings.Compare(a.TypeURL, b.TypeURL); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return out
}
