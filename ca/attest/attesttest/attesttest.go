// Package attesttest has a reviewer of tokens for tests that judges as the API
// server does: signature, issuer, audience and times, then whether service account
// and pod are still those of the token. It does not look at the node, and nor does
// the API server.
package attesttest

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"castellan.dev/ca/attest"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/workloads"
)

// Reviewer reviews tokens.
type Reviewer struct {
	Issuer string
	Keys   func() (*jws.KeySet, error)
	// Pods are what exists.
	Pods func() *workloads.File
	Now  func() time.Time

	// Asked counts the reviews.
	Asked atomic.Int32
	// Away, if set, is why it cannot be asked.
	Away atomic.Pointer[error]
	// Hold, if set, delays every answer until it is closed.
	Hold chan struct{}
	// ForgetAudiences leaves them out of the answer, as one that knows none does.
	ForgetAudiences bool
}

var _ attest.Reviewer = (*Reviewer)(nil)

// Review implements attest.Reviewer.
func (r *Reviewer) Review(ctx context.Context, token string, audiences []string) (attest.Review, error) {
	r.Asked.Add(1)
	if r.Hold != nil {
		select {
		case <-r.Hold:
		case <-ctx.Done():
			return attest.Review{}, ctx.Err()
		}
	}
	if err := r.Away.Load(); err != nil {
		return attest.Review{}, *err
	}
	answer, err := r.judge(token, audiences)
	if err != nil {
		return attest.Review{}, fmt.Errorf("%w: [invalid bearer token, %w]", attest.ErrTokenRefused, err)
	}
	return answer, nil
}

func (r *Reviewer) judge(token string, audiences []string) (attest.Review, error) {
	u, err := jws.Parse(token)
	if err != nil {
		return attest.Review{}, err
	}
	keys, err := r.Keys()
	if err != nil {
		return attest.Review{}, err
	}
	now := r.Now
	if now == nil {
		now = time.Now
	}
	t, err := u.Verify(keys, jws.Expect{Issuer: r.Issuer, Audiences: audiences}, now())
	if err != nil {
		return attest.Review{}, err
	}
	k8s, _ := t.Claims["kubernetes.io"].(map[string]any)
	field := func(kind, name string) string {
		ref, _ := k8s[kind].(map[string]any)
		s, _ := ref[name].(string)
		return s
	}
	answer := attest.Review{
		Account: field("serviceaccount", "name"), AccountUID: field("serviceaccount", "uid"),
		PodName: field("pod", "name"), PodUID: field("pod", "uid"),
		Node: field("node", "name"), NodeUID: field("node", "uid"),
	}
	answer.Namespace, _ = k8s["namespace"].(string)
	if t.Subject != "system:serviceaccount:"+answer.Namespace+":"+answer.Account {
		return attest.Review{}, fmt.Errorf("sub is %q", t.Subject)
	}
	if !r.ForgetAudiences {
		answer.Audiences = slices.DeleteFunc(slices.Clone(audiences), func(a string) bool { return !slices.Contains(t.Audience, a) })
	}
	return answer, r.exists(answer)
}

// exists: agents of a workloads file are no entries of it, but have accounts.
func (r *Reviewer) exists(a attest.Review) error {
	if a.PodName == "" || a.Account == "castellan-agent" {
		return nil
	}
	for _, w := range r.Pods().Workloads {
		if w.Namespace == a.Namespace && w.PodName == a.PodName && w.PodUID == a.PodUID &&
			w.ServiceAccount == a.Account && w.ServiceAccountUID == a.AccountUID {
			return nil
		}
	}
	return fmt.Errorf("service account token has been invalidated")
}
