package svid

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"castellan.dev/agent/caclient"
	"castellan.dev/identity"
)

// Minter has a JWT-SVID signed; *caclient.Client is one.
type Minter interface {
	MintJWT(ctx context.Context, workload identity.Workload, token caclient.Credential, audience []string) (*caclient.JWT, error)
}

const (
	maxAudiences  = 128 // cached JWT-SVIDs per workload
	mintTimeout   = 10 * time.Second
	failureMemory = time.Second
)

// JWTs keeps one workload's JWT-SVIDs by audience: each serves until half of its
// life is over, and until it expires where no fresh one can be had. One request
// per workload is in flight at a time.
type JWTs struct {
	rotator *Rotator
	source  *Source
	minter  Minter
	flight  singleflight.Group
	turn    chan struct{} // capacity 1: one request in flight

	mu     sync.Mutex
	cached map[string]cachedJWT
}

type cachedJWT struct {
	jwt   *caclient.JWT
	renew moment
	// failed is why the last attempt gave nothing; not tried again before until.
	failed error
	until  moment
}

// JWTs returns the JWT-SVIDs of the identity that source belongs to.
func (r *Rotator) JWTs(source *Source, minter Minter) *JWTs {
	return &JWTs{rotator: r, source: source, minter: minter, turn: make(chan struct{}, 1), cached: map[string]cachedJWT{}}
}

// Fetch returns a JWT-SVID for exactly this audience, which must not be empty.
func (j *JWTs) Fetch(ctx context.Context, audience []string) (*caclient.JWT, error) {
	audience = slices.Clone(audience)
	slices.Sort(audience)
	audience = slices.Compact(audience)
	key := fmt.Sprintf("%q", audience) // quoted: no audience can pose as two
	if c, ok := j.lookup(key); ok && (c.failed != nil || c.jwt != nil) {
		return c.jwt, c.failed
	}
	// The call outlives the caller who happened to begin it, for others wait for it too.
	result := j.flight.DoChan(key, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), mintTimeout)
		defer cancel()
		return j.mint(ctx, key, audience)
	})
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case res := <-result:
		if res.Err != nil {
			return nil, res.Err
		}
		return res.Val.(*caclient.JWT), nil
	}
}

// lookup returns what can be answered without asking the server.
func (j *JWTs) lookup(key string) (cachedJWT, bool) {
	now := j.rotator.moment()
	j.mu.Lock()
	defer j.mu.Unlock()
	c, ok := j.cached[key]
	switch {
	case !ok:
		return cachedJWT{}, false
	case c.jwt != nil && now.wall.Before(c.jwt.Expires) && (!c.renew.reached(now) || (c.failed != nil && !c.until.reached(now))):
		return cachedJWT{jwt: c.jwt}, true
	case c.failed != nil && !c.until.reached(now):
		return cachedJWT{failed: c.failed}, true
	}
	return cachedJWT{}, false
}

func (j *JWTs) mint(ctx context.Context, key string, audience []string) (*caclient.JWT, error) {
	select {
	case j.turn <- struct{}{}:
		defer func() { <-j.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	jwt, err := j.ask(ctx, audience)
	now := j.rotator.moment()
	j.mu.Lock()
	defer j.mu.Unlock()
	old := j.cached[key]
	if err != nil {
		old.failed, old.until = err, now.after(max(failureMemory, min(caclient.RetryAfter(err), mintTimeout)))
		j.store(key, old, now)
		if old.jwt != nil && now.wall.Before(old.jwt.Expires) {
			return old.jwt, nil // last good kept until it expires
		}
		return nil, err
	}
	life := jwt.Expires.Sub(jwt.Received)
	j.store(key, cachedJWT{jwt: jwt, renew: now.after(life / 2)}, now)
	return jwt, nil
}

func (j *JWTs) ask(ctx context.Context, audience []string) (*caclient.JWT, error) {
	j.rotator.mu.Lock()
	e := j.rotator.entries[j.source]
	j.rotator.mu.Unlock()
	if e == nil {
		return nil, &caclient.Error{Kind: caclient.Refused, Err: context.Canceled}
	}
	credential, workload, err := j.rotator.identify(e)
	if err != nil {
		return nil, &caclient.Error{Kind: caclient.BadCredential, Err: err}
	}
	return j.minter.MintJWT(ctx, workload, credential, audience)
}

// store keeps the cache bounded: what has expired goes first, then what expires
// next. Caller holds j.mu.
func (j *JWTs) store(key string, c cachedJWT, now moment) {
	j.cached[key] = c
	if len(j.cached) <= maxAudiences {
		return
	}
	victim, earliest := "", time.Time{}
	for k, v := range j.cached {
		expires := time.Time{}
		if v.jwt != nil {
			expires = v.jwt.Expires
		}
		if !now.wall.Before(expires) && k != key {
			delete(j.cached, k)
			continue
		}
		if k != key && (victim == "" || expires.Before(earliest)) {
			victim, earliest = k, expires
		}
	}
	if len(j.cached) > maxAudiences {
		delete(j.cached, victim)
	}
}
