package svid_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
	"castellan.dev/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const account = "shop/orders"

// issuer is a working issuer without a network.
type issuer struct {
	t         testing.TB
	authority *agenttest.Authority

	mu       sync.Mutex
	ttl      time.Duration
	before   func(ctx context.Context, account string) error
	roots    [][]byte
	calls    []call
	inFlight map[string]int
	most     map[string]int // "" is of all
}

type call struct {
	account string
	at      time.Time
}

func newIssuer(t testing.TB, ttl time.Duration) *issuer {
	return &issuer{t: t, ttl: ttl, authority: agenttest.NewAuthority(t, "test"), inFlight: map[string]int{}, most: map[string]int{}}
}

func (i *issuer) Issue(ctx context.Context, r caclient.Request) (*caclient.Answer, error) {
	name := r.Workload.Account().String()
	i.mu.Lock()
	i.calls = append(i.calls, call{name, time.Now()})
	for _, k := range []string{"", name} {
		i.inFlight[k]++
		i.most[k] = max(i.most[k], i.inFlight[k])
	}
	before, ttl, authority, roots := i.before, i.ttl, i.authority, i.roots
	i.mu.Unlock()
	defer func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.inFlight[""]--
		i.inFlight[name]--
	}()
	if before != nil {
		if err := before(ctx, name); err != nil {
			return nil, err
		}
	}
	leaf := authority.Leaf(i.t, r.Workload.ID().String(), r.Key.Public(), ttl, nil)
	if roots == nil {
		roots = [][]byte{authority.Root.Raw}
	}
	return &caclient.Answer{
		ID: r.Workload.ID(), Leaf: leaf, Chain: [][]byte{leaf.Raw, authority.Intermediate.Raw}, Roots: roots, Received: time.Now(),
	}, nil
}

func (i *issuer) set(change func(*issuer)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	change(i)
}

// asked returns the calls for an account since the last time.
func (i *issuer) asked() []call {
	i.mu.Lock()
	defer i.mu.Unlock()
	c := i.calls
	i.calls = nil
	return c
}

func token(t testing.TB, account, uid string) caclient.CredentialFile {
	t.Helper()
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte(agenttest.Token(account, uid)), 0o600); err != nil {
		t.Fatal(err)
	}
	return caclient.CredentialFile(path)
}

func parseAccount(t testing.TB, s string) identity.Account {
	t.Helper()
	a, err := identity.ParseAccount(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func trustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(agenttest.TrustDomain)
}

// rotate runs a rotator for one identity inside of a bubble.
func rotate(t *testing.T, i *issuer, change func(*svid.Config)) (*svid.Rotator, *svid.Source) {
	t.Helper()
	cfg := svid.Config{Issuer: i, TrustDomain: trustDomain()}
	if change != nil {
		change(&cfg)
	}
	r, err := svid.NewRotator(cfg)
	if err != nil {
		t.Fatal(err)
	}
	source := r.Add(svid.Identity{Account: parseAccount(t, account), Token: token(t, account, "uid-1")})
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
	return r, source
}

func state(s *svid.Source) *svid.Snapshot {
	now, _ := s.Current()
	return now
}

func TestRenewalAtHalfLife(t *testing.T) {
	for _, ttl := range []time.Duration{10 * time.Second, time.Minute, time.Hour, 24 * time.Hour} {
		t.Run(ttl.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				i := newIssuer(t, ttl)
				_, source := rotate(t, i, nil)
				var last time.Time
				for n := range 20 {
					now := state(source)
					if now.Status != svid.Valid || now.SVID.NotAfter.Before(time.Now()) {
						t.Fatalf("renewal %d: %v", n, now.Status)
					}
					calls := i.asked()
					if len(calls) != 1 {
						t.Fatalf("renewal %d: %d requests", n, len(calls))
					}
					if n > 0 {
						// From issue, not from notBefore; a certificate has whole seconds.
						share := calls[0].at.Sub(last).Seconds() / ttl.Seconds()
						if share < 0.449-1/ttl.Seconds() || share > 0.551 {
							t.Errorf("renewed at %.3f of the life", share)
						}
					}
					last = calls[0].at
					_, changed := source.Current()
					<-changed
					synctest.Wait()
				}
			})
		})
	}
}

func TestHalfLifeSpreads(t *testing.T) {
	if got := svid.HalfLife(time.Hour, 0); got != 27*time.Minute {
		t.Errorf("earliest %v", got)
	}
	if got := svid.HalfLife(time.Hour, 0.999999).Round(time.Second); got != 33*time.Minute {
		t.Errorf("latest %v", got)
	}
	if got := svid.HalfLife(time.Millisecond, 0); got != time.Second {
		t.Errorf("an answer with no life left is renewed after %v", got)
	}
}

func TestAnAnswerWithHardlyAnyLifeMakesNoLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Millisecond)
		rotate(t, i, nil)
		time.Sleep(time.Minute)
		if n := len(i.asked()); n > 61 {
			t.Errorf("%d requests in a minute", n)
		}
	})
}

func TestServerAwayKeepsWhatIsValid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		_, source := rotate(t, i, nil)
		serial := state(source).SVID.Serial
		i.asked()
		away := errors.New("connection refused")
		i.set(func(i *issuer) { i.before = func(context.Context, string) error { return away } })
		end := state(source).SVID.NotAfter
		time.Sleep(time.Until(end) - time.Second)
		if now := state(source); now.Status != svid.Valid || now.SVID.Serial != serial {
			t.Fatalf("a second before expiry: %v", now.Status)
		}
		if n := len(i.asked()); n < 40 || n > 150 {
			t.Errorf("%d attempts in half an hour", n)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if now := state(source); now.Status != svid.Expired || now.SVID != nil || !errors.Is(now.Problem, away) {
			t.Fatalf("a second after expiry: %v %v", now.Status, now.Problem)
		}
		i.set(func(i *issuer) { i.before = nil })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if now := state(source); now.Status != svid.Valid {
			t.Errorf("10 s after the server is back: %v", now.Status)
		}
	})
}

func TestServerRefusingKeepsWhatIsValidAndIsAskedSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		_, source := rotate(t, i, nil)
		i.asked()
		i.set(func(i *issuer) {
			i.before = func(context.Context, string) error {
				return &caclient.Error{Kind: caclient.Refused, Err: errors.New("pod is gone")}
			}
		})
		time.Sleep(time.Until(state(source).SVID.NotAfter) - time.Second)
		if now := state(source); now.Status != svid.Valid {
			t.Fatalf("a second before expiry: %v", now.Status)
		}
		if n := len(i.asked()); n < 20 || n > 60 {
			t.Errorf("%d attempts in half an hour", n)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if now := state(source); now.Status != svid.Refused {
			t.Errorf("a second after expiry: %v", now.Status)
		}
	})
}

func TestServerThatHangsIsLeftInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, 10*time.Second)
		_, source := rotate(t, i, nil)
		hung := false
		i.set(func(i *issuer) {
			i.before = func(ctx context.Context, _ string) error {
				if hung {
					return nil
				}
				hung = true
				<-ctx.Done()
				return ctx.Err()
			}
		})
		end := state(source).SVID.NotAfter
		time.Sleep(time.Until(end))
		synctest.Wait()
		if now := state(source); now.Status != svid.Valid || !now.SVID.NotAfter.After(end) {
			t.Errorf("one call that hung was the end of it: %v", now.Status)
		}
		if svid.Timeout(time.Hour, true) != 10*time.Second || svid.Timeout(0, false) != 10*time.Second || svid.Timeout(time.Second, true) != 2*time.Second {
			t.Error("timeouts")
		}
	})
}

func TestRetryWait(t *testing.T) {
	away, refused := errors.New("away"), &caclient.Error{Kind: caclient.Refused, Err: errors.New("gone")}
	asked := &caclient.Error{Kind: caclient.Unreachable, RetryAfter: 20 * time.Second, Err: errors.New("slow down")}
	for _, test := range []struct {
		name     string
		err      error
		failures int
		life     time.Duration
		want     time.Duration // at random 0.5, which is no jitter
	}{
		{"first", away, 1, time.Hour, 250 * time.Millisecond},
		{"doubles", away, 3, time.Hour, time.Second},
		{"is bounded", away, 99, time.Hour, 30 * time.Second},
		{"sooner for short lives", away, 99, 10 * time.Second, time.Second},
		{"sooner with nothing to serve", away, 99, 0, 5 * time.Second},
		{"slowly when refused", refused, 1, time.Hour, 2 * time.Second},
		{"slowly when refused, bounded", refused, 99, time.Hour, time.Minute},
		{"refused with nothing to serve", refused, 99, 0, time.Minute},
		{"as the server asks", asked, 1, time.Hour, 21 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := svid.RetryWait(test.err, test.failures, test.life, 0.5)
			if got != test.want {
				t.Errorf("got %v, want %v", got, test.want)
			}
			low, high := svid.RetryWait(test.err, test.failures, test.life, 0), svid.RetryWait(test.err, test.failures, test.life, 0.999)
			if low >= high {
				t.Errorf("no jitter: %v to %v", low, high)
			}
			if a := caclient.RetryAfter(test.err); low < a {
				t.Errorf("%v is sooner than the server asked", low)
			}
		})
	}
}

// clocks are a wall clock that can be stepped over a monotonic one that cannot.
type clocks struct {
	mu    sync.Mutex
	start time.Time
	step  time.Duration
}

func (c *clocks) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.step)
}

func (c *clocks) set(step time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.step = step
}

func (c *clocks) elapsed() time.Duration { return time.Since(c.start) }

func TestClockSteppedBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, c := newIssuer(t, time.Hour), &clocks{start: time.Now()}
		_, source := rotate(t, i, func(cfg *svid.Config) { cfg.Now, cfg.Elapsed = c.now, c.elapsed })
		serial := state(source).SVID.Serial
		c.set(-10 * time.Hour)
		time.Sleep(34 * time.Minute)
		synctest.Wait()
		now := state(source)
		if now.Status != svid.Valid || now.SVID.Serial == serial {
			t.Errorf("not renewed after half of its life had really passed: %v", now.Status)
		}
	})
}

func TestClockSteppedForwardAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i, c := newIssuer(t, time.Hour), &clocks{start: time.Now()}
		_, source := rotate(t, i, func(cfg *svid.Config) { cfg.Now, cfg.Elapsed = c.now, c.elapsed })
		serial := state(source).SVID.Serial
		i.asked()
		i.set(func(i *issuer) { i.before = func(context.Context, string) error { return errors.New("away") } })
		c.set(2 * time.Hour)
		time.Sleep(61 * time.Second)
		synctest.Wait()
		if now := state(source); now.Status != svid.Expired {
			t.Errorf("by the stepped clock it has expired, and it is %v", now.Status)
		}
		if len(i.asked()) == 0 {
			t.Error("no renewal was tried within a minute of the step")
		}
		c.set(0)
		time.Sleep(61 * time.Second)
		synctest.Wait()
		if now := state(source); now.Status != svid.Valid || now.SVID.Serial != serial {
			t.Errorf("the clock came back and the certificate did not: %v", now.Status)
		}
	})
}

func TestBoundsAndOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		i.before = func(context.Context, string) error { time.Sleep(time.Second); return nil }
		r, err := svid.NewRotator(svid.Config{Issuer: i, TrustDomain: trustDomain(), Concurrency: 2})
		if err != nil {
			t.Fatal(err)
		}
		names := []string{"a/a", "a/b", "a/c", "a/d", "a/e"}
		var sources []*svid.Source
		for _, n := range names {
			sources = append(sources, r.Add(svid.Identity{Account: parseAccount(t, n), Token: token(t, n, n)}))
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = r.Run(ctx) }()
		defer func() { cancel(); <-done }()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		for n, s := range sources {
			if state(s).Status != svid.Valid {
				t.Errorf("%s: %v", names[n], state(s).Status)
			}
		}
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		i.set(func(i *issuer) {
			if i.most[""] != 2 {
				t.Errorf("%d requests in flight, want 2", i.most[""])
			}
			for _, n := range names {
				if i.most[n] != 1 {
					t.Errorf("%s: %d in flight", n, i.most[n])
				}
			}
		})
		r.Remove(sources[0])
		if now := state(sources[0]); now.Status != svid.Refused || now.SVID != nil {
			t.Errorf("a removed workload is %v", now.Status)
		}
	})
}

func TestNearestExpiryFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		r, err := svid.NewRotator(svid.Config{Issuer: i, TrustDomain: trustDomain(), Concurrency: 1})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = r.Run(ctx) }()
		defer func() { cancel(); <-done }()
		// Three lives of different length, then an outage past all half-lives.
		for _, w := range []struct {
			name string
			ttl  time.Duration
		}{{"a/long", 3 * time.Hour}, {"a/short", 100 * time.Minute}, {"a/middle", 2 * time.Hour}} {
			i.set(func(i *issuer) { i.ttl = w.ttl })
			r.Add(svid.Identity{Account: parseAccount(t, w.name), Token: token(t, w.name, w.name)})
			synctest.Wait()
		}
		i.set(func(i *issuer) { i.before = func(context.Context, string) error { return errors.New("away") } })
		time.Sleep(99 * time.Minute)
		synctest.Wait()
		i.asked()
		i.set(func(i *issuer) {
			i.before = func(context.Context, string) error { time.Sleep(time.Second); return nil }
		})
		r.Add(svid.Identity{Account: parseAccount(t, "a/new"), Token: token(t, "a/new", "new")})
		r.Retry()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		var order []string
		for _, c := range i.asked() {
			order = append(order, c.account)
		}
		// What has nothing to serve comes before everything.
		if want := []string{"a/new", "a/short", "a/middle", "a/long"}; !slices.Equal(order, want) {
			t.Errorf("asked in the order %v, want %v", order, want)
		}
	})
}

func TestOneFailingDoesNotHoldUpAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, 10*time.Second)
		i.before = func(ctx context.Context, name string) error {
			if name == account {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		r, _ := rotate(t, i, nil)
		other := r.Add(svid.Identity{Account: parseAccount(t, "shop/b"), Token: token(t, "shop/b", "b")})
		for range 60 {
			time.Sleep(time.Second)
			synctest.Wait()
			if now := state(other); now.Status != svid.Valid {
				t.Fatalf("%v", now.Status)
			}
		}
	})
}

func TestManyThatHangDoNotHoldUpTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Minute)
		i.before = func(ctx context.Context, name string) error {
			if strings.HasPrefix(name, "hangs/") {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		r, source := rotate(t, i, nil)
		for n := range 100 {
			name := fmt.Sprintf("hangs/w%d", n)
			r.Add(svid.Identity{Account: parseAccount(t, name), Token: token(t, name, name)})
		}
		for range 600 {
			time.Sleep(time.Second)
			synctest.Wait()
			if now := state(source); now.Status != svid.Valid {
				t.Fatalf("%v", now.Status)
			}
		}
		asked, last := map[string]int{}, time.Time{}
		for _, c := range i.asked() {
			asked[c.account]++
			if c.account != account {
				continue
			}
			// At half-life, at the latest 55 %, and not when a place happens to be free.
			if !last.IsZero() && c.at.Sub(last) > 34*time.Second {
				t.Errorf("renewed %v after the last time", c.at.Sub(last))
			}
			last = c.at
		}
		if len(asked) != 101 {
			t.Errorf("%d of 101 identities were asked for", len(asked))
		}
		for name, n := range asked {
			if name != account && n < 3 {
				t.Errorf("%s had %d attempts in 10 minutes", name, n)
			}
		}
	})
}

func TestTokenFileMustBeTheWorkloads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		r, err := svid.NewRotator(svid.Config{Issuer: i, TrustDomain: trustDomain()})
		if err != nil {
			t.Fatal(err)
		}
		file := token(t, "shop/payments", "uid")
		source := r.Add(svid.Identity{Account: parseAccount(t, account), Token: file})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = r.Run(ctx) }()
		synctest.Wait()
		want := `token file "` + string(file) + `" is of "shop/payments", the configuration says "shop/orders"`
		if now := state(source); now.Problem == nil || now.Problem.Error() != want || caclient.KindOf(now.Problem) != caclient.BadCredential {
			t.Errorf("got %v, want %s", now.Problem, want)
		}
		if len(i.asked()) != 0 {
			t.Error("the wrong token left the node")
		}
		// Once the file is right, it is used.
		if err := os.WriteFile(string(file), []byte(agenttest.Token(account, "uid-2")), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if now := state(source); now.Status != svid.Valid || now.PodUID != "uid-2" {
			t.Errorf("%v of pod %q", now.Status, now.PodUID)
		}
		cancel()
		<-done
	})
}

func TestRenewAndRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, time.Hour)
		r, source := rotate(t, i, nil)
		i.asked()
		r.Renew(source)
		synctest.Wait()
		if n := len(i.asked()); n != 0 {
			t.Errorf("one just issued was renewed %d times", n)
		}
		time.Sleep(11 * time.Second)
		r.Renew(source)
		synctest.Wait()
		if n := len(i.asked()); n != 1 {
			t.Errorf("%d requests, want 1", n)
		}
		i.set(func(i *issuer) { i.before = func(context.Context, string) error { return errors.New("away") } })
		time.Sleep(40 * time.Minute)
		i.set(func(i *issuer) { i.before = nil })
		i.asked()
		r.Retry()
		synctest.Wait()
		if n := len(i.asked()); n != 1 || state(source).Problem != nil {
			t.Errorf("%d requests at once after the server was reached, problem %v", n, state(source).Problem)
		}
	})
}
