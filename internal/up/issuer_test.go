package up_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"castellan.dev/internal/jws"
	"castellan.dev/internal/up"
)

// verify reads the token file as a verifier at that moment would.
func verify(t *testing.T, file string, jwks []byte, now time.Time) (*jws.Token, error) {
	t.Helper()
	keys, err := jws.ParseJWKS(jwks)
	if err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return jws.Verify(string(token), keys, jws.Expect{Issuer: "https://issuer.test", Audiences: []string{"a"}}, now)
}

func TestTokens(t *testing.T) {
	dir := t.TempDir()
	keyFile, token := filepath.Join(dir, "key"), filepath.Join(dir, "token")
	now := time.Now()
	clock := func() time.Time { return now }
	fresh, jwks, err := up.Issuers(keyFile, token, 10*time.Minute, clock, discard())
	if err != nil {
		t.Fatal(err)
	}
	if err := fresh.Refresh(); err != nil {
		t.Fatal(err)
	}
	got, err := verify(t, token, jwks, now)
	if err != nil || got.Subject != "s" || !got.Expiry.Equal(now.Add(10*time.Minute).Truncate(time.Second)) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := verify(t, token, jwks, now.Add(20*time.Minute)); !errors.Is(err, jws.ErrExpired) {
		t.Errorf("%v", err)
	}
	for _, f := range []string{keyFile, token} {
		if st, err := os.Stat(f); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, st.Mode(), err)
		}
	}
	// The next start signs with the same key: what verified before verifies still.
	again, jwks2, err := up.Issuers(keyFile, filepath.Join(dir, "token2"), 10*time.Minute, clock, discard())
	if err != nil || string(jwks2) != string(jwks) {
		t.Fatalf("%v\n%s\n%s", err, jwks, jwks2)
	}
	if err := again.Refresh(); err != nil {
		t.Fatal(err)
	}
	if _, err := verify(t, filepath.Join(dir, "token2"), jwks, now); err != nil {
		t.Error(err)
	}
	// An expired one is expired and nothing else: signature, issuer and audience hold.
	old, _, err := up.Issuers(keyFile, token, -time.Hour, clock, discard())
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Refresh(); err != nil {
		t.Fatal(err)
	}
	if _, err := verify(t, token, jwks, now); !errors.Is(err, jws.ErrExpired) {
		t.Errorf("%v", err)
	}
	if _, err := verify(t, token, jwks, now.Add(-90*time.Minute)); err != nil {
		t.Errorf("an hour and a half ago it was good: %v", err)
	}
}

func TestTokenKeyDamaged(t *testing.T) {
	dir := t.TempDir()
	keyFile := filepath.Join(dir, "key")
	for text, want := range map[string]string{
		"": " holds no PEM key; restore it, or remove it for a new one",
		"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n": "; restore it, or remove it for a new one",
	} {
		if err := os.WriteFile(keyFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, err := up.Issuers(keyFile, filepath.Join(dir, "token"), time.Minute, time.Now, discard())
		isInput(t, err, "up: "+keyFile, want)
	}
}

// Token files are rewritten long before they expire, and a failure is tried again soon.
func TestTokensAreKeptFresh(t *testing.T) {
	if up.RefreshEvery*3 > up.WorkloadTokenTTL || up.RefreshEvery*3 > up.UserTokenTTL {
		t.Errorf("%v is too long for tokens of %v and %v", up.RefreshEvery, up.WorkloadTokenTTL, up.UserTokenTTL)
	}
	dir := t.TempDir()
	token := filepath.Join(dir, "tokens", "token")
	synctest.Test(t, func(t *testing.T) {
		i, jwks, err := up.Issuers(filepath.Join(dir, "key"), token, up.WorkloadTokenTTL, time.Now, discard())
		if err != nil {
			t.Fatal(err)
		}
		if err := i.Refresh(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- i.Run(ctx) }()
		for range 20 { // long past the life of the first
			time.Sleep(up.RefreshEvery)
			synctest.Wait()
			got, err := verify(t, token, jwks, time.Now())
			if err != nil || time.Until(got.Expiry) < up.WorkloadTokenTTL-2*up.RefreshEvery {
				t.Fatalf("%+v, %v", got, err)
			}
		}
		// The directory is taken away, and comes back.
		if err := os.RemoveAll(filepath.Dir(token)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Dir(token), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(up.RefreshEvery)
		synctest.Wait()
		if err := os.Remove(filepath.Dir(token)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(token); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if _, err := verify(t, token, jwks, time.Now()); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
