// Package xds is the one stream engine behind everything Castellan serves by
// Envoy's discovery protocol, in its delta and state-of-the-world variants, and
// the delta client that agents and proxies use.
//
// The engine knows nothing of what it carries: a Source gives named, versioned
// resources by type, and the engine tells each stream what it lacks. It keeps the
// protocol's rules: nonces, ACK and NACK, stale nonces, wildcards, versions a
// reconnecting client already holds, and one resource or type never failing
// another.
//
// It refuses: streams that name more resources than the limits allow, or that do
// not take what is sent to them in time. It assumes that the caller has decided
// who may open a stream, and that Source shows that caller no more than it may see.
package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Resource is one named thing at one version.
type Resource struct {
	Name, Version string
	Body          *anypb.Any
}

// NewResource packs m. Its version is a hash of its content, so that it changes
// exactly when the content does, and is the same after a restart.
func NewResource(name string, m proto.Message) (Resource, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return Resource{}, fmt.Errorf("xds: packing %q: %w", name, err)
	}
	url := "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName())
	return Resource{Name: name, Version: ContentVersion(b), Body: &anypb.Any{TypeUrl: url, Value: b}}, nil
}

// ContentVersion is the version of content: 128 bits of its SHA-256, in hex.
func ContentVersion(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		// Lengths keep ("ab","c") and ("a","bc") apart.
		fmt.Fprintf(h, "%d:", len(p))
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Snapshot holds all resources of one type by name. It is immutable once given
// to anyone. Nil is not the empty Snapshot: it means that nothing is known yet.
type Snapshot map[string]Resource

// NewSnapshot returns the resources by name; of two with one name the last stays.
func NewSnapshot(resources ...Resource) Snapshot {
	s := make(Snapshot, len(resources))
	for _, r := range resources {
		s[r.Name] = r
	}
	return s
}

// equal compares by version.
func (s Snapshot) equal(o Snapshot) bool {
	return (s == nil) == (o == nil) && maps.EqualFunc(s, o, func(a, b Resource) bool { return a.Version == b.Version })
}

// Source is where a stream's resources come from. changed is closed when the
// snapshot is no longer current. A nil snapshot with a channel means "not known
// yet": streams wait, and nothing is said to be missing. A type that is not served
// has neither.
type Source interface {
	Resources(typeURL string) (s Snapshot, changed <-chan struct{})
}

// Table is a Source that is set from outside. It is safe for concurrent use.
type Table struct {
	mu    sync.Mutex
	types map[string]*entry
}

type entry struct {
	snapshot Snapshot
	changed  chan struct{}
}

// NewTable serves the given types, about which nothing is known yet.
func NewTable(typeURLs ...string) *Table {
	t := &Table{types: make(map[string]*entry, len(typeURLs))}
	for _, url := range typeURLs {
		t.types[url] = &entry{changed: make(chan struct{})}
	}
	return t
}

// Set replaces everything of a type, and reports whether that changed anything;
// only then are streams told. The caller must not change s afterwards.
func (t *Table) Set(typeURL string, s Snapshot) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.types[typeURL]
	if e == nil {
		e = &entry{changed: make(chan struct{})}
		t.types[typeURL] = e
	}
	if e.snapshot.equal(s) {
		return false
	}
	e.snapshot = s
	close(e.changed)
	e.changed = make(chan struct{})
	return true
}

// Resources implements Source.
func (t *Table) Resources(typeURL string) (Snapshot, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.types[typeURL]
	if e == nil {
		return nil, nil
	}
	return e.snapshot, e.changed
}
