package svid_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
	"castellan.dev/identity"
)

// soon is when a new token has been noticed.
const soon = 5 * time.Second

func TestANewTokenBringsOnTheNextAttempt(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error  // what the server says until then, nil for nothing
		uid  string // of the new token's pod
		want int    // attempts soon after
	}{
		{"after a refusal", &caclient.Error{Kind: caclient.Refused, Err: errors.New("pod is gone")}, "uid-2", 1},
		{"after a refusal, of the same pod", &caclient.Error{Kind: caclient.Refused, Err: errors.New("too old")}, "uid-1", 1},
		{"of another pod, though there is a certificate", nil, "uid-2", 1},
		{"replaced for its age alone", nil, "uid-1", 0},
		{"while the server has asked to wait", &caclient.Error{Kind: caclient.Unreachable, RetryAfter: 5 * time.Minute, Err: errors.New("busy")}, "uid-1", 0},
		{"of another pod, though the server has asked to wait", &caclient.Error{Kind: caclient.Unreachable, RetryAfter: 5 * time.Minute, Err: errors.New("busy")}, "uid-2", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				i := newIssuer(t, 24*time.Hour)
				i.before = func(context.Context, string) error { return test.err }
				r, file := rotateFile(t, i)
				// Until the waits between attempts are the longest, and, where the server
				// asks for 5 minutes and gets up to a tenth more, between two attempts.
				time.Sleep(22*time.Minute + 30*time.Second)
				synctest.Wait()
				i.asked()
				i.set(func(i *issuer) { i.before = nil })
				agenttest.WriteFile(t, string(file), agenttest.Token(account, test.uid))
				time.Sleep(soon)
				synctest.Wait()
				got := len(i.asked())
				// A retry that was due anyway may come first; there is never none too few.
				if test.want == 0 && got != 0 || got < test.want {
					t.Errorf("%d attempts, want %d", got, test.want)
				}
				if now := state(r); test.want == 1 && (now.Status != svid.Valid || now.PodUID != test.uid) {
					t.Errorf("%v of pod %q", now.Status, now.PodUID)
				}
			})
		})
	}
}

func TestATokenReadForAJWTIsStillNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, 24*time.Hour)
		r, source, file := rotatorFile(t, i)
		i.asked()
		agenttest.WriteFile(t, string(file), agenttest.Token(account, "uid-2"))
		if _, err := r.JWTs(source, refusing{}).Fetch(t.Context(), []string{"a"}); err == nil {
			t.Fatal("no error")
		}
		time.Sleep(soon)
		synctest.Wait()
		if n := len(i.asked()); n != 1 {
			t.Errorf("%d attempts, want 1: the certificate is the last pod's", n)
		}
	})
}

type refusing struct{}

func (refusing) MintJWT(context.Context, identity.Workload, caclient.Credential, []string) (*caclient.JWT, error) {
	return nil, errors.New("away")
}

func TestATokenThatIsGoneMakesNoAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, 24*time.Hour)
		r, file := rotateFile(t, i)
		i.asked()
		if err := os.Remove(string(file)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(i.asked()); n != 0 || state(r).Status != svid.Valid {
			t.Errorf("%d attempts, %v", n, state(r).Status)
		}
		agenttest.WriteFile(t, string(file), agenttest.Token(account, "uid-2"))
		time.Sleep(soon)
		synctest.Wait()
		if now := state(r); now.PodUID != "uid-2" {
			t.Errorf("still pod %q", now.PodUID)
		}
	})
}

// rotateFile is rotate with the token's file.
func rotateFile(t *testing.T, i *issuer) (*svid.Source, caclient.CredentialFile) {
	t.Helper()
	_, source, file := rotatorFile(t, i)
	return source, file
}

func rotatorFile(t *testing.T, i *issuer) (*svid.Rotator, *svid.Source, caclient.CredentialFile) {
	t.Helper()
	file := caclient.CredentialFile(filepath.Join(t.TempDir(), "token"))
	agenttest.WriteFile(t, string(file), agenttest.Token(account, "uid-1"))
	r, err := svid.NewRotator(svid.Config{Issuer: i, TrustDomain: trustDomain()})
	if err != nil {
		t.Fatal(err)
	}
	source := r.Add(svid.Identity{Account: parseAccount(t, account), Token: file})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("rotator: %v", err)
		}
	})
	synctest.Wait()
	return r, source, file
}
