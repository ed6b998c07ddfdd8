package kube

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const (
	// retryFirst and retryMost bound how long after a failure the API server is
	// asked again: its return is noticed soon, and its absence costs it little.
	retryFirst = 200 * time.Millisecond
	retryMost  = 2 * time.Second
	// watchFor is how long one watch lasts at most. Opening the next proves the way
	// to the API server even where nothing ever changes.
	watchFor = int64(270)
)

// mirror keeps what the API server has of one kind of object, reduced to what is
// used. It lists once by streaming, and then watches.
type mirror struct {
	cache.Indexer
	name string
	// sample is of the type that is expected; nil where what is kept is of another
	// type than what comes, as bookmarks do.
	sample runtime.Object
	// list and open ask the API server.
	list func(context.Context, metav1.ListOptions) (runtime.Object, error)
	open func(context.Context, metav1.ListOptions) (watch.Interface, error)
	// reduce drops of an object what nobody uses, without changing it.
	reduce func(runtime.Object) runtime.Object
	// unstreamed clients (fakes) only list and watch.
	unstreamed bool
	log        *slog.Logger
	now        func() time.Time

	// changed are told of every change, by the goroutine that makes it: old is nil
	// for a new object, next for a deleted one. Set before run.
	changed []func(old, next metav1.Object)

	synced  atomic.Bool
	contact atomic.Int64 // Unix nanoseconds, 0 never
	mu      sync.Mutex
	failure error // why nothing is heard now
	// missing is told when the API server does not know the kind.
	missing func()
}

// run follows the API server until ctx ends.
func (m *mirror) run(ctx context.Context) {
	// Failures are logged by this package, once each; what the client says of them
	// besides, again and again, is dropped.
	quiet := logr.Discard()
	ctx = klog.NewContext(ctx, quiet)
	var sample any // an interface of a nil type would not be nil
	if m.sample != nil {
		sample = m.sample
	}
	r := cache.NewReflectorWithOptions(lister{m}, sample, m, cache.ReflectorOptions{
		Logger: &quiet, Name: m.name,
		Backoff: &wait.Backoff{Duration: retryFirst, Cap: retryMost, Factor: 2, Steps: 10, Jitter: 0.2},
	})
	r.RunWithContext(ctx)
}

// Add implements cache.ReflectorStore.
func (m *mirror) Add(obj any) error { return m.put(obj) }

// Update implements cache.ReflectorStore.
func (m *mirror) Update(obj any) error { return m.put(obj) }

func (m *mirror) put(obj any) error {
	old, _, err := m.Get(obj)
	if err != nil {
		return err
	}
	if err := m.Indexer.Add(obj); err != nil {
		return err
	}
	m.tell(old, obj)
	return nil
}

// Delete implements cache.ReflectorStore.
func (m *mirror) Delete(obj any) error {
	old, ok, err := m.Get(obj)
	if err != nil || !ok {
		return err
	}
	if err := m.Indexer.Delete(old); err != nil {
		return err
	}
	m.tell(old, nil)
	return nil
}

// Replace implements cache.ReflectorStore: the outcome of a whole listing.
func (m *mirror) Replace(list []any, version string) error {
	before := map[string]any{}
	for _, old := range m.List() {
		key, err := cache.MetaNamespaceKeyFunc(old)
		if err != nil {
			return err
		}
		before[key] = old
	}
	if err := m.Indexer.Replace(list, version); err != nil {
		return err
	}
	m.synced.Store(true)
	for _, obj := range list {
		key, err := cache.MetaNamespaceKeyFunc(obj)
		if err != nil {
			return err
		}
		m.tell(before[key], obj)
		delete(before, key)
	}
	for _, gone := range before {
		m.tell(gone, nil)
	}
	if len(list) == 0 && len(before) == 0 {
		m.tell(nil, nil) // that there is nothing is known now
	}
	return nil
}

func (m *mirror) tell(old, next any) {
	before, _ := old.(metav1.Object)
	after, _ := next.(metav1.Object)
	if before != nil && after != nil && before.GetUID() == after.GetUID() && before.GetResourceVersion() == after.GetResourceVersion() && after.GetResourceVersion() != "" {
		return
	}
	for _, f := range m.changed {
		f(before, after)
	}
}

// heard notes that the API server has answered.
func (m *mirror) heard() {
	m.contact.Store(m.now().UnixNano())
	m.mu.Lock()
	lost := m.failure != nil
	m.failure = nil
	m.mu.Unlock()
	if lost {
		m.log.Info("API server is heard again", slog.String("kind", m.name))
	}
}

// failed notes that it has not, and returns err.
func (m *mirror) failed(err error) error {
	if errors.Is(err, context.Canceled) || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || apierrors.IsTimeout(err) {
		return err // the end of this process, or an ordinary end of a watch
	}
	m.mu.Lock()
	first := m.failure == nil
	m.failure = err
	m.mu.Unlock()
	if first {
		m.log.Warn("API server cannot be followed, what was known last stays", slog.String("kind", m.name), slog.Any("error", err))
	}
	if apierrors.IsNotFound(err) && m.missing != nil {
		m.missing()
	}
	return err
}

// problem is why nothing is heard now, nil if all is well.
func (m *mirror) problem() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.failure
}

// lister is the mirror's way to the API server.
type lister struct{ m *mirror }

// IsWatchListSemanticsUnSupported tells the client whether to list by streaming.
// The misspelling is the client's.
func (l lister) IsWatchListSemanticsUnSupported() bool { return l.m.unstreamed }

// List implements cache.ListerWatcher.
func (l lister) List(o metav1.ListOptions) (runtime.Object, error) {
	return l.ListWithContext(context.Background(), o)
}

// Watch implements cache.ListerWatcher.
func (l lister) Watch(o metav1.ListOptions) (watch.Interface, error) {
	return l.WatchWithContext(context.Background(), o)
}

// ListWithContext implements cache.ListerWatcherWithContext.
func (l lister) ListWithContext(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	list, err := l.m.list(ctx, o)
	if err != nil {
		return nil, l.m.failed(err)
	}
	l.m.heard()
	return reduceList(list, l.m.reduce)
}

// reduceList makes a list of reduced items.
func reduceList(list runtime.Object, reduce func(runtime.Object) runtime.Object) (runtime.Object, error) {
	lm, err := meta.ListAccessor(list)
	if err != nil {
		return nil, err
	}
	out := &metav1.List{ListMeta: metav1.ListMeta{ResourceVersion: lm.GetResourceVersion(), Continue: lm.GetContinue(), RemainingItemCount: lm.GetRemainingItemCount()}}
	err = meta.EachListItemWithAlloc(list, func(o runtime.Object) error {
		out.Items = append(out.Items, runtime.RawExtension{Object: reduce(o)})
		return nil
	})
	return out, err
}

// WatchWithContext implements cache.ListerWatcherWithContext.
func (l lister) WatchWithContext(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	seconds := watchFor
	o.TimeoutSeconds = &seconds
	inner, err := l.m.open(ctx, o)
	if err != nil {
		return nil, l.m.failed(err)
	}
	l.m.heard()
	w := &reducedWatch{inner: inner, out: make(chan watch.Event), stopped: make(chan struct{})}
	go w.run(l.m)
	return w, nil
}

// reducedWatch reduces each object before anybody keeps it.
type reducedWatch struct {
	inner   watch.Interface
	out     chan watch.Event
	stopped chan struct{}
	once    sync.Once
}

// ResultChan implements watch.Interface.
func (w *reducedWatch) ResultChan() <-chan watch.Event { return w.out }

// Stop implements watch.Interface.
func (w *reducedWatch) Stop() {
	w.once.Do(func() {
		close(w.stopped)
		w.inner.Stop()
	})
}

func (w *reducedWatch) run(m *mirror) {
	defer close(w.out)
	for e := range w.inner.ResultChan() {
		switch e.Type {
		case watch.Added, watch.Modified, watch.Deleted:
			m.heard()
			e.Object = m.reduce(e.Object)
		case watch.Bookmark:
			m.heard()
		case watch.Error:
			_ = m.failed(apierrors.FromObject(e.Object)) // the reflector acts on it
		}
		select {
		case w.out <- e:
		case <-w.stopped:
			return
		}
	}
}
