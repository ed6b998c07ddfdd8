package discovery

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"sort"
	"sync"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

const (
	// maxObjects of all namespaces count, but for the root namespace's.
	maxObjects = 20_000
	// maxOfNamespace keeps one namespace's owner from using up what there is for all:
	// what is beyond is refused there, and the others go on.
	maxOfNamespace = 2_000
)

// Object is a policy as an API server has it.
type Object = policy.Object

// ObjectSource gives the objects as they are now, and a channel that is closed at
// their next change. Nil means that they are not known yet.
type ObjectSource interface {
	Objects() ([]Object, <-chan struct{})
}

// ObjectsConfig configures Objects.
type ObjectsConfig struct {
	Source ObjectSource
	Mesh   policy.Mesh
	Log    *slog.Logger
}

// Objects is a Source of an API server's objects. What is refused of one object
// never touches another.
type Objects struct {
	cfg ObjectsConfig

	mu      sync.Mutex
	known   map[Ref]FileDocument // as they were read last
	docs    []FileDocument
	changed <-chan struct{}
}

// NewObjects returns a Source.
func NewObjects(cfg ObjectsConfig) *Objects {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Objects{cfg: cfg, known: map[Ref]FileDocument{}}
}

// Documents implements Source. They are as Admit returns them.
func (o *Objects) Documents() ([]FileDocument, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	objects, changed := o.cfg.Source.Objects()
	if o.changed != nil && o.changed == changed {
		return o.docs, changed
	}
	o.changed = changed
	if objects != nil { // else not known (any more): what was, stays
		o.read(objects)
	}
	return o.docs, changed
}

// read decodes and validates what has changed.
func (o *Objects) read(objects []Object) {
	docs := make([]FileDocument, 0, len(objects))
	known := make(map[Ref]FileDocument, len(objects))
	for i := range objects {
		ref := refOf(&objects[i])
		d, ok := o.known[ref]
		if !ok || d.UID != objects[i].UID || d.Generation != objects[i].Generation || !bytes.Equal(d.JSON, objects[i].JSON) {
			d = Admit([]FileDocument{readObject(&objects[i])}, o.cfg.Mesh)[0]
		}
		known[ref] = d
		docs = append(docs, d)
	}
	o.known, o.docs = known, docs
	refuseExcess(docs, rootNamespace(o.cfg.Mesh))
}

// refuseExcess refuses the newest policies of namespaces that have too many.
func refuseExcess(docs []FileDocument, root string) {
	of := map[string][]int{}
	for i := range docs {
		of[docs[i].Ref.Namespace] = append(of[docs[i].Ref.Namespace], i)
	}
	share := shareOf(of, root)
	for namespace, at := range of {
		allowed := share
		if namespace == root {
			allowed = maxOfNamespace
		}
		if len(at) <= allowed {
			continue
		}
		slices.SortStableFunc(at, func(a, b int) int {
			return docs[a].Document.Metadata.CreationTimestamp.Compare(docs[b].Document.Metadata.CreationTimestamp)
		})
		for _, i := range at[allowed:] {
			docs[i] = docs[i].with(authz.Finding{Severity: authz.SeverityError, Field: "metadata.namespace", Value: namespace,
				Reason: fmt.Sprintf("the namespace has %d policies, %d are allowed; the newest do not count", len(at), allowed)})
		}
	}
}

// shareOf is how many policies of each namespace count: where all of them together
// have too many, those lose some that have most. The mesh's own is not among them.
func shareOf(of map[string][]int, root string) int {
	beyond := func(share int) bool {
		total := 0
		for namespace, at := range of {
			if namespace != root {
				total += min(len(at), share)
			}
		}
		return total > maxObjects
	}
	if !beyond(maxOfNamespace) {
		return maxOfNamespace
	}
	// One of each counts however many namespaces there are.
	return max(1, sort.Search(maxOfNamespace, func(share int) bool { return beyond(share + 1) }))
}

// ReadObjects decodes objects. What is wrong with one is among its findings.
func ReadObjects(objects []Object) []FileDocument {
	docs := make([]FileDocument, len(objects))
	for i := range objects {
		docs[i] = readObject(&objects[i])
	}
	return docs
}

func refOf(o *Object) Ref { return Ref{Kind: o.Kind, Namespace: o.Namespace, Name: o.Name} }

// readObject decodes one. What it is called is the API server's word; should its
// text say otherwise it is refused.
func readObject(o *Object) FileDocument {
	d := decode("", 0, o.JSON)
	said := d.Ref
	d.Ref, d.UID, d.Generation = refOf(o), o.UID, o.Generation
	d.foreign = false // of a kind of ours, whatever it says
	if d.scope.namespace == "" {
		d.scope.namespace = o.Namespace
	}
	if !d.Refused() && (said != d.Ref || d.Document.Metadata.UID != o.UID) {
		d.Document = policy.Document{}
		d = d.with(authz.Finding{Severity: authz.SeverityError, Field: "metadata", Value: said.String(), Reason: "is not what the API server calls the object"})
	}
	return d
}
