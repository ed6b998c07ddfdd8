package kube

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"castellan.dev/api/policy"
)

const (
	// gather is how long changes are gathered before statuses are written: most often
	// the proxies have acknowledged by then, and one write says it all.
	gather = 200 * time.Millisecond
	// round is how many statuses are written at once, so that a change that has just
	// been made never waits for a thousand old ones.
	round = 20
	// atOnce is how many writes are under way.
	atOnce = 5
	// echo is how long after a write nothing is written of the object unless the
	// informer has seen it.
	echo = 2 * time.Second

	// Pods come and go all the time: what that alone changes is not written at once.
	// A policy that every proxy had must be lacking to one for lapse before it is said;
	// and numbers are brought up to date every soon while some are missing, and every
	// seldom while none is.
	lapse  = 15 * time.Second
	soon   = time.Second
	seldom = 30 * time.Second

	statusRetry     = 200 * time.Millisecond
	statusRetryMost = 30 * time.Second

	// Events of one policy: so many of each type at once, and then one a minute.
	eventBurst     = 10
	eventPerSecond = 1.0 / 60

	component = "castellan-server"
)

// StatusesConfig configures Statuses.
type StatusesConfig struct {
	Kubernetes kubernetes.Interface
	Dynamic    dynamic.Interface
	Policies   *Policies
	// Verdicts are of all policies, with a channel that is closed at their next
	// change. Nil means that they are not known yet.
	Verdicts   func() ([]Verdict, <-chan struct{})
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time
}

// Statuses writes into each policy's status what became of it, and an Event when
// that changes. It must run in one replica only.
//
// RBAC: patch of authorizationpolicies/status, peerauthentications/status and
// requestauthentications/status (security.istio.io); create, patch of events.
type Statuses struct {
	cfg    StatusesConfig
	writes *prometheus.CounterVec
}

// NewStatuses checks cfg; nothing is written before Run.
func NewStatuses(cfg StatusesConfig) (*Statuses, error) {
	if cfg.Kubernetes == nil || cfg.Dynamic == nil || cfg.Policies == nil || cfg.Verdicts == nil {
		return nil, errors.New("kube: statuses need clients, policies and verdicts")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	s := &Statuses{cfg: cfg, writes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "castellan_kube_status_writes_total",
		Help: "Writes of policies' statuses, by result (ok, conflict, error)."}, []string{"result"})}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(s.writes); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// statusKey names a policy.
type statusKey struct{ kind, namespace, name string }

// written is what this process knows of a policy's status besides what it reads.
type written struct {
	// of is the version of the object that was last written to, and at when.
	of string
	at time.Time
	// lacking is since when a policy that every proxy had is not had by all.
	lacking  time.Time
	failures int
	retry    time.Time
}

// statusRun is one run of Statuses.
type statusRun struct {
	*Statuses
	events record.EventRecorderLogger
	mu     sync.Mutex
	known  map[statusKey]*written
}

// pending is a status to be written.
type pending struct {
	verdict              *Verdict
	object               *policyObject
	at                   schema.GroupVersionResource
	accepted, programmed condition
	before               [2]condition
	urgent               bool
	entry                *written
}

// Run writes until ctx ends. It may be called again after that.
func (s *Statuses) Run(ctx context.Context) error {
	// What the client's recorder has to say is that Events could not be written, over
	// and over; losing some harms nobody.
	quiet := klog.NewContext(context.WithoutCancel(ctx), logr.Discard())
	events := record.NewBroadcaster(record.WithContext(quiet), record.WithCorrelatorOptions(record.CorrelatorOptions{BurstSize: eventBurst, QPS: eventPerSecond}))
	defer events.Shutdown()
	events.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: s.cfg.Kubernetes.CoreV1().Events("")})
	r := &statusRun{Statuses: s, known: map[statusKey]*written{},
		events: events.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: component}).WithLogger(logr.Discard())}
	for {
		verdicts, changed := s.cfg.Verdicts()
		wait := r.turn(ctx, verdicts)
		timer := time.NewTimer(max(wait, gather/2))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
			continue
		case <-changed:
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(gather):
		}
	}
}

// turn writes what is due, the most urgent first, and returns when to look again.
func (r *statusRun) turn(ctx context.Context, verdicts []Verdict) (wait time.Duration) {
	now := r.cfg.Now()
	wait = seldom
	var due []*pending
	seen := make(map[statusKey]bool, len(verdicts))
	for i := range verdicts {
		v := &verdicts[i]
		key := statusKey{v.Kind, v.Namespace, v.Name}
		seen[key] = true
		p, in := r.consider(key, v, now)
		if p == nil {
			continue
		}
		if in > 0 {
			wait = min(wait, in)
			continue
		}
		due = append(due, p)
	}
	for key := range r.known {
		if !seen[key] && verdicts != nil {
			delete(r.known, key)
		}
	}
	slices.SortStableFunc(due, func(a, b *pending) int { return cmp.Compare(rank(a), rank(b)) })
	if len(due) > round {
		due, wait = due[:round], 0
	}
	var running sync.WaitGroup
	places := make(chan struct{}, atOnce)
	for _, p := range due {
		places <- struct{}{}
		running.Go(func() {
			r.write(ctx, p)
			<-places
		})
	}
	running.Wait()
	return wait
}

func rank(p *pending) int {
	if p.urgent {
		return 0
	}
	return 1
}

// consider compares a verdict with what stands in the object; nil if that says the
// same. in is how long to wait before it is written.
func (r *statusRun) consider(key statusKey, v *Verdict, now time.Time) (p *pending, in time.Duration) {
	object, at, ok := r.cfg.Policies.lookup(v.Kind, v.Namespace, v.Name)
	if !ok || string(object.UID) != v.UID {
		return nil, 0 // of another object of this name
	}
	entry := r.known[key]
	if entry == nil {
		entry = &written{}
		r.known[key] = entry
	}
	p = &pending{verdict: v, object: object, at: at, entry: entry,
		before: [2]condition{ours(object.status, conditionAccepted), ours(object.status, conditionProgrammed)}}
	p.accepted, p.programmed = v.conditions()
	if p.accepted.says(p.before[0]) && p.programmed.says(p.before[1]) {
		*entry = written{at: entry.at}
		return nil, 0
	}
	in, p.urgent = r.delay(p, now)
	if entry.of == object.ResourceVersion {
		in = max(in, entry.at.Add(echo).Sub(now)) // what was written has not been seen yet
	}
	return p, max(in, entry.retry.Sub(now))
}

// delay is how long a difference must wait, and whether it is news to whoever
// has made or mended the policy.
func (r *statusRun) delay(p *pending, now time.Time) (in time.Duration, urgent bool) {
	before, next := p.before[1], p.programmed
	fell := before.Status == conditionTrue && next.Status == conditionFalse && before.ObservedGeneration == next.ObservedGeneration
	if !fell {
		p.entry.lacking = time.Time{}
	} else if p.entry.lacking.IsZero() {
		p.entry.lacking = now
	}
	switch {
	case p.accepted.Status != p.before[0].Status || before.ObservedGeneration != next.ObservedGeneration:
		return 0, true
	case fell:
		return p.entry.lacking.Add(lapse).Sub(now), false
	case before.Status != next.Status || next.Reason != before.Reason:
		return 0, true
	case next.Status == conditionFalse:
		return p.entry.at.Add(soon).Sub(now), false
	}
	return p.entry.at.Add(seldom).Sub(now), false
}

// write puts the conditions into the object, and says so in an Event.
func (r *statusRun) write(ctx context.Context, p *pending) {
	now := r.cfg.Now()
	accepted, programmed := p.accepted.since(p.before[0], now), p.programmed.since(p.before[1], now)
	patch, err := statusPatch(p.object.ResourceVersion, p.object.status, p.verdict.Generation, accepted, programmed)
	if err == nil {
		_, err = r.cfg.Dynamic.Resource(p.at).Namespace(p.verdict.Namespace).Patch(ctx, p.verdict.Name, types.MergePatchType, patch,
			metav1.PatchOptions{FieldManager: component}, "status")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p.entry.of, p.entry.at = p.object.ResourceVersion, now
	if err == nil {
		r.writes.WithLabelValues("ok").Inc()
		p.entry.failures, p.entry.retry = 0, time.Time{}
		r.tell(p)
		return
	}
	r.failed(ctx, p, err, now)
}

func (r *statusRun) failed(ctx context.Context, p *pending, err error, now time.Time) {
	if ctx.Err() != nil {
		return
	}
	result := "error"
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		result = "conflict" // somebody else was faster; the informer will show it
	}
	r.writes.WithLabelValues(result).Inc()
	p.entry.of = "" // nothing to be seen
	p.entry.retry = now.Add(min(statusRetry<<min(p.entry.failures, 16), statusRetryMost))
	p.entry.failures++
	if result == "error" && p.entry.failures == 1 {
		r.cfg.Log.Warn("status of a policy cannot be written, it is tried again", slog.String("policy", p.verdict.Kind+" "+p.verdict.Namespace+"/"+p.verdict.Name), slog.Any("error", err))
	}
}

// tell makes Events of transitions, which the recorder's own limits keep from
// becoming a flood.
func (r *statusRun) tell(p *pending) {
	about := &corev1.ObjectReference{APIVersion: policy.Group + "/" + p.at.Version, Kind: p.verdict.Kind,
		Namespace: p.verdict.Namespace, Name: p.verdict.Name, UID: p.object.UID, ResourceVersion: p.object.ResourceVersion}
	if p.before[0].Status != p.accepted.Status {
		kind, reason := corev1.EventTypeNormal, "Accepted"
		if p.accepted.Status == conditionFalse {
			kind, reason = corev1.EventTypeWarning, "Refused"
		}
		r.events.Event(about, kind, reason, p.accepted.Message)
	}
	again := p.before[1].ObservedGeneration != p.programmed.ObservedGeneration && p.programmed.Status == conditionTrue
	if p.before[1].Status == p.programmed.Status && !again || !p.verdict.Accepted {
		return
	}
	if p.programmed.Status == conditionTrue {
		r.events.Event(about, corev1.EventTypeNormal, "Programmed", p.programmed.Message)
	} else if p.before[1].Status != "" {
		r.events.Event(about, corev1.EventTypeWarning, "NotProgrammed", p.programmed.Message)
	}
}
