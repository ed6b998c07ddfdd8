package svid

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/agent/caclient"
	"castellan.dev/identity"
)

// Issuer has a certificate signed; *caclient.Client is one.
type Issuer interface {
	Issue(ctx context.Context, r caclient.Request) (*caclient.Answer, error)
}

// defaultConcurrency is how many identities are renewed at once.
const defaultConcurrency = 16

// Config sets up a Rotator.
type Config struct {
	Issuer      Issuer
	TrustDomain spiffeid.TrustDomain
	// Concurrency bounds requests in flight; there is never more than one per identity.
	Concurrency int
	Metrics     *Metrics
	Log         *slog.Logger
	// Now is the wall clock.
	Now func() time.Time
	// Elapsed is the monotonic clock, from any start.
	Elapsed func() time.Duration
}

// Identity is one workload to keep an SVID for.
type Identity struct {
	// Account is who it must be; zero takes whoever the token names (the agent itself).
	Account identity.Account
	Token   caclient.Token
}

// Rotator keeps every identity's SVID fresh.
type Rotator struct {
	cfg  Config
	wake chan struct{} // capacity 1

	mu       sync.Mutex
	entries  map[*Source]*entry
	busy     int
	unproved int // of busy, those without an answer the last time
	trust    trustState
}

// entry is one identity's state, guarded by Rotator.mu.
type entry struct {
	identity Identity
	source   *Source
	svid     *SVID
	answer   *caclient.Answer // svid came with it
	life     time.Duration    // of svid
	due      moment
	failures int
	problem  error
	inFlight bool
	unproved bool // what is in flight has had no answer the last time
	workload identity.Workload
	podUID   string
	// Of the last attempt: what the token file was, and which pod it named.
	token    caclient.Stamp
	askedFor string
	// cancel ends what is in flight.
	cancel context.CancelFunc
}

// NewRotator returns a Rotator that does nothing before Run.
func NewRotator(cfg Config) (*Rotator, error) {
	if cfg.Issuer == nil || cfg.TrustDomain.IsZero() {
		return nil, errors.New("svid: an issuer and a trust domain are needed")
	}
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = defaultConcurrency
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	if cfg.Elapsed == nil {
		start := time.Now() //nolint:forbidigo // only its monotonic reading is used
		cfg.Elapsed = func() time.Duration { return time.Since(start) }
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	return &Rotator{
		cfg: cfg, wake: make(chan struct{}, 1),
		entries: map[*Source]*entry{}, trust: trustState{domain: cfg.TrustDomain},
	}, nil
}

// Add begins to keep an SVID for id and returns where to read it.
func (r *Rotator) Add(id Identity) *Source {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := &entry{identity: id, due: r.moment()}
	e.source = NewSource(&Snapshot{Trust: r.trust.current(), Published: r.cfg.Now()})
	r.entries[e.source] = e
	r.nudge()
	return e.source
}

// Remove forgets an identity and its key. What is in flight for it is cancelled.
// Nobody may be serving the identity any more: the key is overwritten.
func (r *Rotator) Remove(s *Source) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.entries[s]
	if !ok {
		return
	}
	delete(r.entries, s)
	if e.cancel != nil {
		e.cancel()
	}
	if e.svid != nil {
		e.svid.Key.wipe()
	}
	e.svid, e.answer, e.problem = nil, nil, &caclient.Error{Kind: caclient.Refused, Err: errors.New("workload removed")}
	r.publish(e)
}

// Retry brings on what failed for want of a server: it has been reached.
func (r *Rotator) Retry() {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.moment() // one for all: they are equally due, and go by expiry
	for _, e := range r.entries {
		if e.problem != nil && caclient.KindOf(e.problem) == caclient.Unreachable && caclient.RetryAfter(e.problem) == 0 {
			e.due = now
		}
	}
	r.nudge()
}

// RenewsAt returns when the identity's next attempt is due; zero for one that was removed.
func (r *Rotator) RenewsAt(s *Source) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.entries[s]
	if !ok {
		return time.Time{}
	}
	return e.due.wall
}

// renewAgain keeps a server that refuses a fresh certificate from making a loop.
const renewAgain = 10 * time.Second

// Renew brings on the renewal of one identity, whose certificate the server no
// longer takes. One that has just been issued is left alone.
func (r *Rotator) Renew(s *Source) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.entries[s]
	if !ok || (e.svid != nil && r.cfg.Now().Sub(e.svid.Received).Abs() < renewAgain) {
		return
	}
	e.due = r.moment()
	r.nudge()
}

// Run renews until ctx ends, and waits for what is in flight.
func (r *Rotator) Run(ctx context.Context) error {
	var calls sync.WaitGroup
	defer calls.Wait()
	calls.Go(func() { r.watchTokens(ctx) })
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-r.wake:
		}
		for _, e := range r.pick() {
			calls.Go(func() { r.renew(ctx, e) })
		}
		timer.Reset(r.sleep())
	}
}

func (r *Rotator) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *Rotator) moment() moment {
	return moment{wall: r.cfg.Now().Round(0), elapsed: r.cfg.Elapsed()}
}

// renew makes one attempt for e.
func (r *Rotator) renew(ctx context.Context, e *entry) {
	started := r.cfg.Elapsed()
	next, answer, err := r.attempt(ctx, e)
	r.cfg.Metrics.observe(r.cfg.Elapsed()-started, err)
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.nudge()
	r.busy--
	if e.unproved {
		r.unproved--
	}
	e.inFlight, e.unproved, e.cancel = false, false, nil
	if _, kept := r.entries[e.source]; !kept || (err != nil && ctx.Err() != nil) {
		if next != nil {
			next.Key.wipe()
		}
		return
	}
	if err != nil {
		r.failed(e, err)
		return
	}
	e.svid, e.answer, e.life, e.failures, e.problem = next, answer, max(next.lifetime(), 0), 0, nil
	e.due = r.moment().after(halfLife(e.life, random()))
	r.trustAnswer(answer)
	r.publish(e)
	r.cfg.Log.Info("certificate issued", "id", next.ID.String(), "serial", next.Serial,
		"not_after", next.NotAfter, "renew_in", (e.due.elapsed - r.cfg.Elapsed()).Round(time.Millisecond).String())
	if early := next.NotBefore.Sub(next.Received); early > time.Minute {
		r.cfg.Log.Warn("certificate is not valid yet by this machine's clock; set the clock", "id", next.ID.String(), "behind", early.String())
	}
}

// attempt makes a key and has it certified. It holds no lock while it waits.
func (r *Rotator) attempt(ctx context.Context, e *entry) (*SVID, *caclient.Answer, error) {
	// Before it is read: a version that comes in between is seen later, not missed.
	stamp := e.identity.Token.Stamp()
	credential, workload, err := r.identify(e)
	r.mu.Lock()
	e.token, e.askedFor = stamp, e.podUID
	r.mu.Unlock()
	if err != nil {
		return nil, nil, &caclient.Error{Kind: caclient.BadCredential, Err: err}
	}
	key, err := NewKey()
	if err != nil {
		return nil, nil, err
	}
	r.mu.Lock()
	limit := callTimeout
	if e.svid != nil {
		limit = timeout(e.svid.NotAfter.Sub(r.cfg.Now()), true)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	e.cancel = cancel
	if _, kept := r.entries[e.source]; !kept {
		cancel() // removed before there was anything to cancel
	}
	r.mu.Unlock()
	answer, err := r.cfg.Issuer.Issue(ctx, caclient.Request{Workload: workload, Token: credential, Key: key.Signer()})
	if err != nil {
		return nil, nil, err
	}
	return newSVID(answer, key), answer, nil
}

// failed keeps what is valid and plans the next attempt.
func (r *Rotator) failed(e *entry, err error) {
	e.failures++
	e.problem = err
	life := e.life
	if e.status(r.cfg.Now()) != Valid {
		life = 0
	}
	wait := retryWait(err, e.failures, life, random())
	e.due = r.moment().after(wait)
	r.publish(e)
	account := e.identity.Account
	if account.IsZero() {
		account = e.workload.Account() // the agent's own
	}
	attrs := []any{"account", account.String(), "kind", caclient.KindOf(err).String(), "error", err,
		"failures", e.failures, "retry_in", wait.Round(time.Millisecond).String()}
	if e.svid != nil {
		attrs = append(attrs, "not_after", e.svid.NotAfter)
	}
	r.cfg.Log.Warn("certificate not issued, the last good one stays until it expires", attrs...)
}

func (e *entry) status(now time.Time) Status {
	switch {
	case e.svid != nil && now.Before(e.svid.NotAfter):
		return Valid
	case e.problem != nil && caclient.KindOf(e.problem) == caclient.Refused:
		return Refused
	case e.svid != nil:
		return Expired
	default:
		return Starting
	}
}

// publish shows e's state as it is now. The expired SVID itself is kept: when a
// clock that was stepped forward comes back, it is valid again.
func (r *Rotator) publish(e *entry) {
	now := r.cfg.Now()
	next := &Snapshot{
		Status: e.status(now), Trust: r.trust.current(),
		Workload: e.workload, PodUID: e.podUID, Published: now, Problem: e.problem,
	}
	if next.Status == Valid {
		next.SVID = e.svid
	}
	e.source.Publish(next)
}
