package discovery

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

const (
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
	switch {
	case objects == nil: // not known (any more): what was, stays
	case counted(objects) > maxObjects:
		o.cfg.Log.Error("too many policies, those read before stay in force", slog.Int("policies", counted(objects)), slog.Int("limit", maxObjects))
		o.docs = append(withoutNotices(o.docs), tooMany(counted(objects)))
	default:
		o.read(objects)
	}
	return o.docs, changed
}

// counted is how many of the objects count: of each namespace its share at most, so
// that no single one reaches the bound of all.
func counted(objects []Object) (n int) {
	of := map[string]int{}
	for i := range objects {
		if of[objects[i].Namespace]++; of[objects[i].Namespace] <= maxOfNamespace {
			n++
		}
	}
	return n
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
	refuseExcess(docs)
}

// refuseExcess refuses the newest policies of namespaces that have too many.
func refuseExcess(docs []FileDocument) {
	counts := map[string]int{}
	for i := range docs {
		counts[docs[i].Ref.Namespace]++
	}
	for namespace, n := range counts {
		if n <= maxOfNamespace {
			continue
		}
		var at []int
		for i := range docs {
			if docs[i].Ref.Namespace == namespace {
				at = append(at, i)
			}
		}
		slices.SortStableFunc(at, func(a, b int) int {
			return docs[a].Document.Metadata.CreationTimestamp.Compare(docs[b].Document.Metadata.CreationTimestamp)
		})
		for _, i := range at[maxOfNamespace:] {
			docs[i] = docs[i].with(authz.Finding{Severity: authz.SeverityError, Field: "metadata.namespace", Value: namespace,
				Reason: fmt.Sprintf("the namespace has %d policies, %d are allowed; the newest do not count", n, maxOfNamespace)})
		}
	}
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

func withoutNotices(docs []FileDocument) []FileDocument {
	out := make([]FileDocument, 0, len(docs)+1)
	for _, d := range docs {
		if !d.notice {
			out = append(out, d)
		}
	}
	return out
}

func tooMany(n int) FileDocument {
	return FileDocument{notice: true, kept: true, Findings: []authz.Finding{{Severity: authz.SeverityError, Field: "cluster",
		Reason: fmt.Sprintf("%d policies, %d are allowed; those read before stay in force", n, maxObjects)}}}
}
