package kube

import (
	"context"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/watchlist"

	"castellan.dev/internal/run"
)

const (
	keeperFirstRetry = 500 * time.Millisecond
	keeperLastRetry  = 30 * time.Second
	// keeperEvery is how often what is kept is looked at though nobody told of a
	// change: a watch can be lost, or not be permitted.
	keeperEvery = time.Minute
)

// keeper keeps something in the cluster as it should be: it looks when it is woken,
// every so often, and soon after a failure.
type keeper struct {
	what string
	// do puts it right and says when to look again at the latest; 0 is keeperEvery.
	do   func(ctx context.Context) (again time.Duration, err error)
	log  *slog.Logger
	bell chan struct{}
}

func newKeeper(what string, log *slog.Logger, do func(context.Context) (time.Duration, error)) *keeper {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &keeper{what: what, do: do, log: log, bell: make(chan struct{}, 1)}
}

// wake has it look soon. It never waits.
func (k *keeper) wake() {
	select {
	case k.bell <- struct{}{}:
	default:
	}
}

// Run keeps until ctx ends.
func (k *keeper) Run(ctx context.Context) error {
	retry, last := keeperFirstRetry, ""
	for {
		wait, err := k.do(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			// Somebody else's change in between is no failure, only a reason to look again.
			if text := err.Error(); text != last && !apierrors.IsConflict(err) {
				k.log.Warn("cannot be kept in the cluster as it should be", "what", k.what, "error", err, "retryIn", retry.String())
				last = text
			}
			wait, retry = retry, min(2*retry, keeperLastRetry)
		default:
			if last != "" {
				k.log.Info("kept in the cluster again", "what", k.what)
			}
			retry, last = keeperFirstRetry, ""
			if wait <= 0 {
				wait = keeperEvery
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-k.bell:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// follow has a function called at every change of a value: it gives the channel that
// is closed at the next one.
func follow(next func() <-chan struct{}, f func()) run.Part {
	return func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-next():
				f()
			}
		}
	}
}

// watched says what is watched: one object by name, or all of a kind.
type watched struct {
	kind   string
	name   string // "": all
	sample runtime.Object
	list   func(context.Context, metav1.ListOptions) (runtime.Object, error)
	open   func(context.Context, metav1.ListOptions) (watch.Interface, error)
	reduce func(runtime.Object) runtime.Object // nil keeps all
	change func(old, next metav1.Object)
}

// mirror makes the mirror of it, for one run. With a name the question is limited
// to it, so that a permission that is limited to it suffices.
func (c *Client) mirror(w watched, log *slog.Logger, now func() time.Time) *mirror {
	if w.name != "" {
		selector := fields.OneTermEqualSelector(metav1.ObjectNameField, w.name).String()
		list, open := w.list, w.open
		w.list = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return list(ctx, o)
		}
		w.open = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return open(ctx, o)
		}
	}
	if w.reduce == nil {
		w.reduce = func(o runtime.Object) runtime.Object { return o }
	}
	m := &mirror{
		Indexer: cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{}), name: w.kind, sample: w.sample,
		list: w.list, open: w.open, reduce: w.reduce, log: log, now: now,
		unstreamed: watchlist.DoesClientNotSupportWatchListSemantics(c.kubernetes),
	}
	m.changed = append(m.changed, w.change)
	return m
}

// part runs a mirror as a part.
func (m *mirror) part(ctx context.Context) error {
	m.run(ctx)
	return ctx.Err()
}
