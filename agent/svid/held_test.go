package svid_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
)

func credential(t *testing.T, uid string) caclient.Credential {
	t.Helper()
	c, err := caclient.NewCredential(agenttest.Token(account, uid))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestATokenThatIsBroughtIsTriedAtOnce: the kubelet's, after a refusal of the last one.
func TestATokenThatIsBroughtIsTriedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		i.before = func(context.Context, string) error {
			return &caclient.Error{Kind: caclient.Unauthenticated, Err: errors.New("expired")}
		}
		r, first := rotate(t, i, nil)
		r.Remove(first)
		held := caclient.Hold("token of a pod", credential(t, "uid-1"))
		source := r.Add(svid.Identity{Account: parseAccount(t, account), Token: held})
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		i.set(func(i *issuer) { i.before = nil })
		i.asked()
		if held.Set(credential(t, "uid-1")) {
			r.TokenChanged(source)
		}
		synctest.Wait() // no time passes
		if got := i.asked(); len(got) != 1 || state(source).Status != svid.Valid {
			t.Errorf("%d attempts, %v", len(got), state(source).Status)
		}
		// A fresh token of the same pod changes nothing of what is valid.
		if held.Set(credential(t, "uid-1")) {
			r.TokenChanged(source)
		}
		time.Sleep(soon)
		synctest.Wait()
		if got := i.asked(); len(got) != 0 {
			t.Errorf("%d attempts for a token that was replaced for its age", len(got))
		}
	})
}

// TestATokenBroughtDuringAnAttemptIsNotMissed.
func TestATokenBroughtDuringAnAttemptIsNotMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		answer := make(chan error)
		i.before = func(context.Context, string) error { return <-answer }
		r, err := svid.NewRotator(svid.Config{Issuer: i, TrustDomain: trustDomain()})
		if err != nil {
			t.Fatal(err)
		}
		held := caclient.Hold("token of a pod", credential(t, "uid-1"))
		source := r.Add(svid.Identity{Account: parseAccount(t, account), Token: held})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		defer func() { cancel(); <-done }()
		synctest.Wait()
		if held.Set(credential(t, "uid-1")) {
			r.TokenChanged(source) // while the first is being judged
		}
		i.set(func(i *issuer) { i.before = nil })
		// The longest wait, which the new token cuts short.
		answer <- &caclient.Error{Kind: caclient.Refused, Err: errors.New("no")}
		time.Sleep(soon)
		synctest.Wait()
		if state(source).Status != svid.Valid {
			t.Errorf("%v", state(source).Status)
		}
	})
}

// TestRemoveOverwritesTheKey that was served.
func TestRemoveOverwritesTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		r, source := rotate(t, i, nil)
		key := state(source).SVID.Key
		before, err := key.PKCS8()
		if err != nil {
			t.Fatal(err)
		}
		r.Remove(source)
		if after, err := key.PKCS8(); err == nil && string(after) == string(before) {
			t.Error("the key is still there")
		}
		if now := state(source); now.SVID != nil || now.Status != svid.Refused {
			t.Errorf("%v %v", now.Status, now.SVID)
		}
		if at := r.RenewsAt(source); !at.IsZero() {
			t.Errorf("renews at %v", at)
		}
	})
}

// TestRemoveCancelsWhatIsInFlight: nobody is left to have it.
func TestRemoveCancelsWhatIsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		var ended error
		i.before = func(ctx context.Context, _ string) error {
			<-ctx.Done()
			ended = ctx.Err()
			return ended
		}
		r, source := rotate(t, i, nil)
		begin := time.Now()
		r.Remove(source)
		synctest.Wait()
		if !errors.Is(ended, context.Canceled) || time.Since(begin) != 0 {
			t.Errorf("%v after %v", ended, time.Since(begin))
		}
		time.Sleep(time.Hour)
		if got := i.asked(); len(got) != 1 {
			t.Errorf("%d attempts for what was removed", len(got))
		}
	})
}
