package kube

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	// Live lookups are for what informers have not seen yet: a moment's few pods. A
	// deleted pod's agent that keeps asking must not turn into load.
	lookupsPerSecond = 100
	lookupBurst      = 200
	lookupsAtOnce    = 16
	lookupTimeout    = 5 * time.Second

	// goneFor is how long a UID that was certainly not there is not asked for again:
	// it never comes back, short of a restored etcd.
	goneFor = time.Minute
	maxGone = 4096
)

// lookup asks the API server for one object at a time: callers that want the same
// share one question, and all are bounded in rate and number.
//
// RBAC: pods get, serviceaccounts get; in all namespaces, as pods are in all.
type lookup struct {
	api    kubernetes.Interface
	now    func() time.Time
	limit  *rate.Limiter
	places chan struct{}
	asked  *prometheus.CounterVec

	mu      sync.Mutex
	flights map[string]*flight
	gone    map[string]time.Time
}

// flight is one question, and its answer once done is closed.
type flight struct {
	done   chan struct{}
	object any
	err    error
}

func newLookup(api kubernetes.Interface, now func() time.Time) *lookup {
	return &lookup{
		api: api, now: now, limit: rate.NewLimiter(lookupsPerSecond, lookupBurst), places: make(chan struct{}, lookupsAtOnce),
		flights: map[string]*flight{}, gone: map[string]time.Time{},
		asked: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_kube_lookups_total",
			Help: "Pods and service accounts asked of the API server because informers did not know them yet, by what came of it.",
		}, []string{"result"}),
	}
}

// pod returns the pod as the API server has it now, ErrNoPod if it has none of that UID.
func (l *lookup) pod(ctx context.Context, ref PodRef) (*corev1.Pod, error) {
	what := fmt.Sprintf("pod %s/%s", ref.Namespace, ref.Name)
	object, err := l.ask(ctx, what, ref.UID, ErrNoPod, func(ctx context.Context) (metav1.Object, error) {
		return l.api.CoreV1().Pods(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	})
	pod, _ := object.(*corev1.Pod)
	return pod, err
}

// account returns the pod's service account, ErrNoAccount if there is none. One of
// another UID is returned: the caller compares and says so.
func (l *lookup) account(ctx context.Context, ref PodRef) (*corev1.ServiceAccount, error) {
	what := fmt.Sprintf("service account %s", ref.Account)
	object, err := l.ask(ctx, what, "", ErrNoAccount, func(ctx context.Context) (metav1.Object, error) {
		return l.api.CoreV1().ServiceAccounts(ref.Namespace).Get(ctx, ref.Account.Name(), metav1.GetOptions{})
	})
	account, _ := object.(*corev1.ServiceAccount)
	return account, err
}

// ask shares a question by what is asked for; of another UID than wanted ("" is
// any) is none.
func (l *lookup) ask(ctx context.Context, what, uid string, none error, get func(context.Context) (metav1.Object, error)) (any, error) {
	key := what + " " + uid
	f, mine := l.enter(key)
	if f == nil {
		return nil, fmt.Errorf("%w: %s", none, what)
	}
	if mine {
		go func() {
			// Others may wait for it when the first has given up.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTimeout)
			defer cancel()
			object, err := l.get(ctx, what, get)
			if apierrors.IsNotFound(err) || err == nil && uid != "" && string(object.GetUID()) != uid {
				err = fmt.Errorf("%w: %s", none, what)
			}
			l.count(err, none)
			l.leave(key, f, object, err, errors.Is(err, none) && uid != "")
		}()
	}
	select {
	case <-f.done:
		return f.object, f.err
	case <-ctx.Done():
		return nil, away(ctx.Err(), "%s", what)
	}
}

// enter joins the question under way or begins one that the caller must ask; nil
// when the answer is known: certainly not there.
func (l *lookup) enter(key string) (f *flight, mine bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.flights[key]; f != nil {
		return f, false
	}
	if at, ok := l.gone[key]; ok {
		if age := l.now().Sub(at); age >= 0 && age < goneFor {
			return nil, false
		}
		delete(l.gone, key)
	}
	f = &flight{done: make(chan struct{})}
	l.flights[key] = f
	return f, true
}

func (l *lookup) leave(key string, f *flight, object any, err error, gone bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.flights, key)
	if gone {
		if len(l.gone) >= maxGone {
			clear(l.gone) // the worst is that some are asked for once more
		}
		l.gone[key] = l.now()
	}
	if f.err = err; err == nil {
		f.object = object
	}
	close(f.done)
}

func (l *lookup) count(err, none error) {
	result := "failed"
	switch {
	case err == nil:
		result = "found"
	case errors.Is(err, none):
		result = "gone"
	}
	l.asked.WithLabelValues(result).Inc()
}

func (l *lookup) get(ctx context.Context, what string, get func(context.Context) (metav1.Object, error)) (metav1.Object, error) {
	select {
	case l.places <- struct{}{}:
		defer func() { <-l.places }()
	case <-ctx.Done():
		return nil, away(ctx.Err(), "%s: too many are asked for", what)
	}
	if err := l.limit.Wait(ctx); err != nil {
		return nil, away(err, "%s: too many are asked for", what)
	}
	object, err := get(ctx)
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, away(err, "ask for %s", what)
	}
	return object, err
}
