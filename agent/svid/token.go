package svid

import (
	"context"
	"fmt"
	"time"

	"castellan.dev/agent/caclient"
	"castellan.dev/identity"
)

// watchTokensEvery is how often the tokens are looked at.
const watchTokensEvery = 3 * time.Second

// watchTokens brings on what a new token may change: a pod that was created
// again has its certificate within seconds, although the one before it was
// refused, or has half of its life before it. It looks at the files' times only;
// a token that was replaced for its age alone changes nothing.
func (r *Rotator) watchTokens(ctx context.Context) {
	tick := time.NewTicker(watchTokensEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for e, seen := range r.tokensSeen() {
			if stamp := e.identity.Token.Stamp(); !stamp.Same(seen) {
				r.tokenChanged(e, stamp)
			}
		}
	}
}

// tokensSeen returns what was read last of each identity that is not being asked for.
func (r *Rotator) tokensSeen() map[*entry]caclient.Stamp {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen := make(map[*entry]caclient.Stamp, len(r.entries))
	for _, e := range r.entries {
		if !e.inFlight {
			seen[e] = e.token
		}
	}
	return seen
}

// TokenChanged looks at one identity's token now: whoever brought a new one says
// so. While it is being asked for with the old one, watchTokens sees it later.
func (r *Rotator) TokenChanged(s *Source) {
	r.mu.Lock()
	e, ok := r.entries[s]
	idle := ok && !e.inFlight
	r.mu.Unlock()
	if idle {
		r.tokenChanged(e, e.identity.Token.Stamp())
	}
}

func (r *Rotator) tokenChanged(e *entry, stamp caclient.Stamp) {
	credential, err := e.identity.Token.Read()
	if err != nil {
		return // half-written or gone: the next look, or the next attempt, will tell
	}
	claims, err := credential.Claims()
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, kept := r.entries[e.source]; !kept || e.inFlight {
		return
	}
	e.token = stamp
	samePod := err == nil && claims.PodUID == e.askedFor
	switch {
	case e.problem == nil && samePod:
		return
	case e.problem != nil && caclient.RetryAfter(e.problem) > 0 && samePod:
		return // the server has said when to come again
	}
	e.failures, e.due = 0, r.moment()
	r.nudge()
}

// identify reads the token and who it is of. The token must name the configured
// account: a mixed-up file would otherwise serve one workload as another.
func (r *Rotator) identify(e *entry) (caclient.Credential, identity.Workload, error) {
	credential, err := e.identity.Token.Read()
	if err != nil {
		return credential, identity.Workload{}, err
	}
	claims, err := credential.Claims()
	if err != nil {
		return credential, identity.Workload{}, fmt.Errorf("%s: %w", e.identity.Token.Where(), err)
	}
	if want := e.identity.Account; !want.IsZero() && claims.Account != want {
		return credential, identity.Workload{}, fmt.Errorf("%s is of %q, the configuration says %q", e.identity.Token.Where(), claims.Account, want)
	}
	workload, err := identity.New(r.cfg.TrustDomain, claims.Account)
	if err != nil {
		return credential, identity.Workload{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.workload != workload || e.podUID != claims.PodUID {
		e.workload, e.podUID = workload, claims.PodUID
		r.publish(e)
	}
	return credential, workload, nil
}
