package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// BeginAnnotation on the Secret says that a new root is wanted although there has
	// been one. It is used up by the write that brings the new one.
	BeginAnnotation = "castellan.dev/new-root"

	// maxBlob and maxBlobs bound what is kept; the API server takes 1 MiB in all.
	maxBlob  = 256 << 10
	maxBlobs = 900 << 10

	// lookEvery is how often the Secret is looked after while nothing is written.
	lookEvery = time.Minute

	// adoptions bounds how often one write starts over because labels and the like
	// of the Secret changed.
	adoptions = 3
)

// secrets is what is asked of the API server; *corev1client.SecretInterface is one.
//
// RBAC: secrets get, update; only by name, only in the server's namespace. The
// Secret is made by whoever installs: "create" cannot be limited to a name.
type secrets interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (*corev1.Secret, error)
	Update(ctx context.Context, s *corev1.Secret, opts metav1.UpdateOptions) (*corev1.Secret, error)
}

// BlobsConfig says where documents are kept.
type BlobsConfig struct {
	// Name of the Secret. It must exist, and be empty before the first start.
	Name string
	// Documents are the names that may be in it. A Secret with any other is
	// somebody else's.
	Documents []string
	Log       *slog.Logger
}

// Blobs keeps the authority's documents in one Secret, one key each. Every write
// is of the whole Secret as it was read, so that two servers cannot write over
// each other: the second is refused, and stays so until it is started anew.
//
// While the server runs it holds all documents in memory, and goes on signing with
// them whatever becomes of the Secret: that somebody deleted it revokes nothing,
// and ending service would turn a slip into an outage. Nor does it put a deleted
// Secret back unasked, which may have been meant (it has no permission to create
// one, either). A Secret that the installer makes again, empty, is filled from
// memory: who wants a new root stops the server first. What is wrong shows in Err.
type Blobs struct {
	api       secrets
	namespace string
	name      string
	documents []string
	log       *slog.Logger

	mu sync.Mutex // one call at a time
	// last is the Secret as it was read or written last; nil: not yet.
	last *corev1.Secret
	// tried is the data of a write whose outcome is not known.
	tried map[string][]byte

	fault atomic.Pointer[fault]
}

// fault is what is wrong with the Secret, apart from the lock so that asking waits
// for no call.
type fault struct{ err error }

// NewBlobs makes the store. Nothing is read before the first call.
func NewBlobs(c *Client, cfg BlobsConfig) *Blobs {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Blobs{
		api: c.Kubernetes().CoreV1().Secrets(c.Namespace()), namespace: c.Namespace(),
		name: cfg.Name, documents: slices.Clone(cfg.Documents), log: cfg.Log,
	}
}

// String keeps keys out of logs.
func (b *Blobs) String() string { return b.Where("") }

// Where implements ca.Blobs.
func (b *Blobs) Where(name string) string {
	all := "Secret " + b.namespace + "/" + b.name
	if name == "" {
		return all
	}
	return all + ", key " + name
}

// Read implements ca.Blobs.
func (b *Blobs) Read(ctx context.Context, name string) ([]byte, error) {
	if !slices.Contains(b.documents, name) {
		return nil, fmt.Errorf("%q is no name of a document", name)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.load(ctx); err != nil {
		return nil, err
	}
	data, ok := b.last.Data[name]
	if !ok {
		return nil, fmt.Errorf("%s: %w", b.Where(name), fs.ErrNotExist)
	}
	return bytes.Clone(data), nil
}

// Load reads the Secret, so that what is wrong with it shows before anything is
// made of it.
func (b *Blobs) Load(ctx context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.load(ctx)
}

// load reads the Secret unless it has been read.
func (b *Blobs) load(ctx context.Context) error {
	if b.last != nil || ctx.Err() != nil {
		return ctx.Err()
	}
	s, err := b.get(ctx)
	if err != nil {
		return err
	}
	if err := b.check(s); err != nil {
		return err
	}
	b.last = s
	return nil
}

func (b *Blobs) get(ctx context.Context) (*corev1.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s, err := b.api.Get(ctx, b.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, away(err, "%s does not exist; make it empty (the chart does): kubectl -n %s create secret generic %s", b.Where(""), b.namespace, b.name)
	}
	if err != nil {
		return nil, away(err, "read %s", b.Where(""))
	}
	return s, nil
}

// check refuses a Secret that is not ours: it would be lost if written to, and
// its writer might write to it again.
func (b *Blobs) check(s *corev1.Secret) error {
	if s.Type != corev1.SecretTypeOpaque && s.Type != "" {
		return fmt.Errorf("%s is of type %q, not %q: it is not this server's; set kubernetes.caSecret to another name", b.Where(""), s.Type, corev1.SecretTypeOpaque)
	}
	if s.Immutable != nil && *s.Immutable {
		return fmt.Errorf("%s is immutable, so that no key could be renewed; make it again without that", b.Where(""))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Data)) {
		if !slices.Contains(b.documents, name) {
			return fmt.Errorf("%s holds a key %q that this server does not write: it is somebody else's; remove that key, or set kubernetes.caSecret to another name", b.Where(""), name)
		}
	}
	return b.fits(s.Data)
}

func (b *Blobs) fits(data map[string][]byte) error {
	total := 0
	for name, d := range data {
		if len(d) > maxBlob {
			return fmt.Errorf("%s has %d bytes, at most %d are kept", b.Where(name), len(d), maxBlob)
		}
		total += len(d)
	}
	if total > maxBlobs {
		return fmt.Errorf("%s has %d bytes in all, at most %d are kept", b.Where(""), total, maxBlobs)
	}
	return nil
}

// Write implements ca.Blobs.
func (b *Blobs) Write(ctx context.Context, name string, data []byte) error {
	if !slices.Contains(b.documents, name) {
		return fmt.Errorf("%q is no name of a document", name)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.load(ctx); err != nil {
		return err
	}
	for range adoptions {
		wanted := maps.Clone(b.last.Data)
		if wanted == nil {
			wanted = map[string][]byte{}
		}
		wanted[name] = bytes.Clone(data)
		if err := b.fits(wanted); err != nil {
			return err
		}
		err := b.update(ctx, wanted)
		if !apierrors.IsConflict(err) {
			return err
		}
		if err := b.adopt(ctx); err != nil {
			return err
		}
	}
	return away(errors.New("it is changed all the time"), "write %s", b.Where(name))
}

// update replaces the Secret as it was read last by one of this data.
func (b *Blobs) update(ctx context.Context, data map[string][]byte) error {
	next := b.last.DeepCopy()
	next.Data = data
	delete(next.Annotations, BeginAnnotation)
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	written, err := b.api.Update(ctx, next, metav1.UpdateOptions{FieldManager: fieldManager})
	switch {
	case err == nil:
		b.last, b.tried = written, nil
		b.report(nil)
		return nil
	case apierrors.IsConflict(err):
		return err
	case apierrors.IsNotFound(err):
		b.report(b.gone())
		return away(err, "%v", b.gone())
	}
	// It may have been written all the same.
	b.tried = data
	return away(err, "write %s", b.Where(""))
}

func (b *Blobs) gone() error {
	return fmt.Errorf("%s has been deleted; this server goes on with the keys in its memory and cannot renew them. To keep them make the Secret again, empty, while this server runs; to begin with a new root stop the server first", b.Where(""))
}

// adopt takes the Secret as it is now, if what is kept in it is still what this
// server knows: labels and annotations may change at any time.
func (b *Blobs) adopt(ctx context.Context) error {
	now, err := b.get(ctx)
	switch {
	case apierrors.IsNotFound(err):
		b.report(b.gone())
		return away(err, "%v", b.gone())
	case err != nil:
		return err
	}
	same := func(data map[string][]byte) bool { return maps.EqualFunc(now.Data, data, bytes.Equal) }
	switch {
	case same(b.last.Data), b.tried != nil && same(b.tried):
		b.last, b.tried = now, nil
		b.report(nil)
		return nil
	case len(now.Data) == 0 && b.check(now) == nil:
		known := b.last.Data
		b.last, b.tried = now, nil
		if err := b.update(ctx, known); err != nil {
			b.last.Data = known // tried again at the next look
			return err
		}
		b.log.Warn("the Secret was made again empty and has been filled from memory", "secret", b.namespace+"/"+b.name)
		return nil
	}
	err = fmt.Errorf("%s was changed by another server, or by hand, since this one read it; nothing is written over that. Let one server run with it, and start that one again", b.Where(""))
	b.report(err)
	return err
}

// report keeps what is wrong with the Secret, and logs it once.
func (b *Blobs) report(err error) {
	before := b.Err()
	if err != nil && (before == nil || before.Error() != err.Error()) {
		b.log.Error("the authority's keys are not kept as they should be", "error", err)
	}
	if err == nil && before != nil {
		b.log.Info("the authority's keys are kept again", "secret", b.namespace+"/"+b.name)
	}
	b.fault.Store(&fault{err})
}

// Err returns what is wrong with the Secret as of the last look, nil when nothing is.
func (b *Blobs) Err() error {
	if f := b.fault.Load(); f != nil {
		return f.err
	}
	return nil
}

// Run looks after the Secret until ctx ends, so that a deleted or altered one is
// told of before the server needs it.
func (b *Blobs) Run(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			b.look(ctx)
		}
	}
}

func (b *Blobs) look(ctx context.Context) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last == nil {
		return
	}
	if err := b.adopt(ctx); err != nil {
		b.log.Debug("the Secret of the authority's keys was looked after in vain", "error", err)
	}
}

// MayBegin implements ca.Beginner.
func (b *Blobs) MayBegin(ctx context.Context) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.load(ctx); err != nil {
		return false, err
	}
	return b.last.Annotations[BeginAnnotation] == "true", nil
}

// HowToBegin implements ca.Beginner.
func (b *Blobs) HowToBegin() string {
	return strings.Join([]string{"run: kubectl -n", b.namespace, "annotate secret", b.name, BeginAnnotation + "=true"}, " ")
}
