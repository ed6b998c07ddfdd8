package attest

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"sync"
	"time"

	"castellan.dev/identity"
)

const (
	// reviewFor is how long an answer of the reviewer's counts: so much later than
	// the pod's own end may a token be refused (design, "Pod gone").
	reviewFor = 10 * time.Second
	// reviewTimeout bounds one question, which goes on when its first asker gives up:
	// others may wait for the same.
	reviewTimeout = 10 * time.Second
	// maxReviews bounds the remembered answers.
	maxReviews = 8192
)

// ErrTokenRefused says that the reviewer does not accept a token. Any other error
// of a Reviewer says that it cannot be told now.
var ErrTokenRefused = errors.New("token refused by its issuer")

// Reviewer verifies tokens by asking who issued them; it bounds how much it asks.
type Reviewer interface {
	// Review returns what the token proves to one of audiences.
	Review(ctx context.Context, token string, audiences []string) (Review, error)
}

// Review is what a token proves. Empty fields: it does not say.
type Review struct {
	Namespace, Account, AccountUID string
	PodName, PodUID                string
	Node, NodeUID                  string
	// Audiences are those of the asked ones that the token is for.
	Audiences []string
}

// reviews asks a Reviewer, once for all who bring the same token at the same time
// or shortly after: an agent brings its own with every call. Only acceptance is
// remembered, so a refusal never outlives its cause.
type reviews struct {
	reviewer  Reviewer
	audiences []string
	cluster   string
	now       func() time.Time

	mu sync.Mutex
	// known is keyed by a hash: no token is kept here.
	known map[[sha256.Size]byte]*review
	limit int
}

// review is one question, and its answer once done is closed.
type review struct {
	asked  time.Time
	done   chan struct{}
	claims *claims
	err    error
}

func newReviews(cfg Config) *reviews {
	return &reviews{
		reviewer: cfg.Reviewer, audiences: slices.Clone(cfg.ReviewAudiences), cluster: cfg.ReviewCluster,
		now: cfg.Now, known: map[[sha256.Size]byte]*review{}, limit: maxReviews,
	}
}

// verify returns what the token proves now, or did no longer than reviewFor ago.
func (r *reviews) verify(ctx context.Context, token string) (*claims, error) {
	key := sha256.Sum256([]byte(token))
	q, mine := r.enter(key)
	if mine {
		go r.ask(context.WithoutCancel(ctx), key, token, q)
	}
	select {
	case <-q.done:
		return q.claims, q.err
	case <-ctx.Done():
		return nil, unavailable("review", "%w", ctx.Err())
	}
}

// enter returns the question under way or its fresh answer, else a new question
// that the caller must ask.
func (r *reviews) enter(key [sha256.Size]byte) (q *review, mine bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if q := r.known[key]; q != nil && (!q.answered() || r.fresh(q)) {
		return q, false
	}
	if len(r.known) >= r.limit {
		r.makeRoom()
	}
	q = &review{asked: r.now(), done: make(chan struct{})}
	r.known[key] = q
	return q, true
}

func (q *review) answered() bool {
	select {
	case <-q.done:
		return true
	default:
		return false
	}
}

// fresh counts from the question, not from the answer. A clock that stepped back
// must not prolong it.
func (r *reviews) fresh(q *review) bool {
	age := r.now().Sub(q.asked)
	return age >= 0 && age < reviewFor
}

// makeRoom drops what is stale and, if that is nothing, any answer. Questions under
// way stay: they are bounded by the calls that wait for them.
func (r *reviews) makeRoom() {
	var one *[sha256.Size]byte
	dropped := false
	for key, q := range r.known {
		if !q.answered() {
			continue
		}
		if r.fresh(q) {
			one = &key
			continue
		}
		delete(r.known, key)
		dropped = true
	}
	if !dropped && one != nil {
		delete(r.known, *one)
	}
}

func (r *reviews) ask(ctx context.Context, key [sha256.Size]byte, token string, q *review) {
	ctx, cancel := context.WithTimeout(ctx, reviewTimeout)
	defer cancel()
	answer, err := r.reviewer.Review(ctx, token, r.audiences)
	switch {
	case errors.Is(err, ErrTokenRefused):
		q.err = unauthenticated("review", "%w", err)
	case err != nil:
		q.err = unavailable("review", "the token's issuer cannot be asked now: %w", err)
	default:
		q.claims, q.err = r.read(answer)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if q.err != nil {
		delete(r.known, key)
	}
	close(q.done)
}

// read holds an answer to what readClaims holds a token to.
func (r *reviews) read(a Review) (*claims, error) {
	// One that knows nothing of audiences answers without any, having checked none.
	if !slices.ContainsFunc(a.Audiences, func(got string) bool { return slices.Contains(r.audiences, got) }) {
		return nil, unauthenticated("audience", "the review accepts the token for %q, not for one of %q", a.Audiences, r.audiences)
	}
	account, err := identity.NewAccount(a.Namespace, a.Account)
	if err != nil {
		return nil, unauthenticated("claims", "%w", err)
	}
	for _, f := range []struct{ what, value string }{{"a service account with UID", a.AccountUID}, {"a pod", a.PodName}, {"a pod with UID", a.PodUID}, {"a node", a.Node}} {
		if f.value == "" || len(f.value) > maxUID {
			return nil, unauthenticated("claims", "by its review the token is not bound to %s", f.what)
		}
	}
	if len(a.NodeUID) > maxUID {
		return nil, unauthenticated("claims", "the node's UID has %d bytes", len(a.NodeUID))
	}
	return &claims{
		account: account, accountUID: a.AccountUID, podName: a.PodName, podUID: a.PodUID,
		node: a.Node, nodeUID: a.NodeUID, cluster: r.cluster,
	}, nil
}
