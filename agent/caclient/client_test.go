package caclient_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
	"castellan.dev/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const account = "shop/orders"

func workload(t testing.TB, account string) identity.Workload {
	t.Helper()
	a, err := identity.ParseAccount(account)
	if err != nil {
		t.Fatal(err)
	}
	w, err := identity.New(spiffeid.RequireTrustDomainFromString(agenttest.TrustDomain), a)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func client(t testing.TB, s *agenttest.Server, change func(*caclient.Config)) *caclient.Client {
	t.Helper()
	cfg := caclient.Config{
		Address: s.Addr(), Name: "127.0.0.1", BundleFile: s.BundleFile, Cluster: "Kubernetes",
		AgentToken:  caclient.CredentialFile(s.TokenFile(agenttest.AgentAccount, "agent-uid")),
		TrustDomain: spiffeid.RequireTrustDomainFromString(agenttest.TrustDomain),
	}
	if change != nil {
		change(&cfg)
	}
	c, err := caclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func key(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func request(t testing.TB) caclient.Request {
	t.Helper()
	token, err := caclient.NewCredential(agenttest.Token(account, "pod-uid"))
	if err != nil {
		t.Fatal(err)
	}
	return caclient.Request{Workload: workload(t, account), Token: token, Key: key(t)}
}

func timeout(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestIssue(t *testing.T) {
	s := agenttest.New(t)
	c := client(t, s, nil)
	r := request(t)
	got, err := c.Issue(timeout(t), r)
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != r.Workload.ID() || len(got.Chain) != 2 || len(got.Roots) != 1 {
		t.Errorf("got %v with %d certificates and %d roots", got.ID, len(got.Chain), len(got.Roots))
	}
	if !got.VerifiesUnder(got.Roots) || got.VerifiesUnder([][]byte{agenttest.NewAuthority(t, "other").Root.Raw}) {
		t.Error("VerifiesUnder is wrong")
	}
	req := s.Requests()[0]
	if req.Cluster != "Kubernetes" || req.Account != account || !r.Key.Public().(*ecdsa.PublicKey).Equal(req.Key) {
		t.Errorf("asked as %+v", req)
	}
}

func TestAnswersRefused(t *testing.T) {
	s := agenttest.New(t)
	a, other := s.Authority(), agenttest.NewAuthority(t, "other")
	now := time.Now()
	leaf := func(csr *x509.CertificateRequest, id string, change func(*x509.Certificate)) []string {
		return a.Elements(a.Leaf(t, id, csr.PublicKey, time.Hour, change))
	}
	id := agenttest.ID(account)
	for _, test := range []struct {
		name   string
		answer func(csr *x509.CertificateRequest, good []string) []string
		want   string
	}{
		{"nothing", func(*x509.CertificateRequest, []string) []string { return nil }, "answer refused: chain of 0 elements, want 2 to 16"},
		{"a leaf alone", func(_ *x509.CertificateRequest, good []string) []string { return good[:1] }, "answer refused: chain of 1 elements, want 2 to 16"},
		{"too long a chain", func(_ *x509.CertificateRequest, good []string) []string {
			for range 20 {
				good = append(good, good[2])
			}
			return good
		}, "answer refused: chain of 23 elements, want 2 to 16"},
		{"too many roots", func(_ *x509.CertificateRequest, good []string) []string {
			good[2] = strings.Repeat(good[2], 65)
			return good
		}, "answer refused: 65 roots, at most 64 are taken"},
		{"garbage", func(_ *x509.CertificateRequest, good []string) []string { return []string{"garbage", good[1], good[2]} },
			"answer refused: element 0 of the chain: text that is no PEM block; is it half-written?"},
		{"a half-written root", func(_ *x509.CertificateRequest, good []string) []string {
			return []string{good[0], good[1], good[2][:len(good[2])/2]}
		}, "answer refused: roots: text that is no PEM block; is it half-written?"},
		{"a private key for a root", func(_ *x509.CertificateRequest, good []string) []string {
			return []string{good[0], good[1], strings.ReplaceAll(good[2], "CERTIFICATE", "PRIVATE KEY")}
		}, `answer refused: roots: PEM block of type "PRIVATE KEY", want CERTIFICATE`},
		{"another key", func(_ *x509.CertificateRequest, _ []string) []string {
			return a.Elements(a.Leaf(t, id, key(t).Public(), time.Hour, nil))
		}, "answer refused: certificate is for another key than the one sent"},
		{"another identity", func(csr *x509.CertificateRequest, _ []string) []string {
			return leaf(csr, agenttest.ID("shop/payments"), nil)
		}, `answer refused: certificate names "spiffe://cluster.local/ns/shop/sa/payments", the workload is "spiffe://cluster.local/ns/shop/sa/orders"`},
		{"another trust domain", func(csr *x509.CertificateRequest, _ []string) []string {
			return leaf(csr, "spiffe://other.local/ns/shop/sa/orders", nil)
		}, `answer refused: certificate names "spiffe://other.local/ns/shop/sa/orders", the workload is "spiffe://cluster.local/ns/shop/sa/orders"`},
		{"two identities", func(csr *x509.CertificateRequest, _ []string) []string {
			return leaf(csr, id, func(c *x509.Certificate) { c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "x", Path: "/y"}) })
		}, "answer refused: identity: certificate has 2 URI SANs, one is allowed"},
		{"a CA", func(csr *x509.CertificateRequest, _ []string) []string {
			return leaf(csr, id, func(c *x509.Certificate) { c.IsCA = true })
		}, "answer refused: identity: certificate is a CA and authenticates nobody"},
		{"expired", func(csr *x509.CertificateRequest, _ []string) []string {
			return leaf(csr, id, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = now.Add(-30*time.Minute), now.Add(-time.Minute)
			})
		}, "answer refused: certificate expired at"},
		{"a chain to another root", func(_ *x509.CertificateRequest, good []string) []string {
			return []string{good[0], good[1], agenttest.PEM(other.Root)}
		}, "answer refused: chain does not verify"},
		{"an intermediate missing", func(_ *x509.CertificateRequest, good []string) []string { return []string{good[0], good[2]} },
			"answer refused: chain does not verify"},
		{"for servers only", func(csr *x509.CertificateRequest, _ []string) []string {
			return leaf(csr, id, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
		}, "answer refused: chain does not verify"},
		{"a leaf among the roots", func(_ *x509.CertificateRequest, good []string) []string { return []string{good[0], good[1], good[0]} },
			"answer refused: root \"\" is no CA"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s.Set(func(k *agenttest.Knobs) {
				k.Answer = func(_ string, csr *x509.CertificateRequest, good []string) []string { return test.answer(csr, good) }
			})
			_, err := client(t, s, nil).Issue(timeout(t), request(t))
			if err == nil || !strings.HasPrefix(err.Error(), test.want) {
				t.Errorf("got  %v\nwant %s", err, test.want)
			}
			if caclient.KindOf(err) != caclient.BadAnswer {
				t.Errorf("kind %v", caclient.KindOf(err))
			}
		})
	}
}

func TestAClockBehindTheServersIsServed(t *testing.T) {
	s := agenttest.New(t)
	s.Set(func(k *agenttest.Knobs) {
		k.Answer = func(_ string, csr *x509.CertificateRequest, _ []string) []string {
			a := s.Authority()
			return a.Elements(a.Leaf(t, agenttest.ID(account), csr.PublicKey, time.Hour, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(10*time.Minute), time.Now().Add(time.Hour)
			}))
		}
	})
	if _, err := client(t, s, nil).Issue(timeout(t), request(t)); err != nil {
		t.Errorf("got %v", err)
	}
}

func TestRefusals(t *testing.T) {
	s := agenttest.New(t)
	limited, err := status.New(codes.ResourceExhausted, "slow down").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(7 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	endless, err := status.New(codes.Unavailable, "come back tomorrow").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(24 * time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		err   error
		kind  caclient.Kind
		after time.Duration
	}{
		{status.Error(codes.PermissionDenied, "pod is gone"), caclient.Refused, 0},
		{status.Error(codes.Unauthenticated, "token expired"), caclient.Unauthenticated, 0},
		{status.Error(codes.InvalidArgument, "csr"), caclient.Invalid, 0},
		{status.Error(codes.Unavailable, "starting"), caclient.Unreachable, 0},
		{status.Error(codes.Internal, "oops"), caclient.Unreachable, 0},
		{limited.Err(), caclient.Unreachable, 7 * time.Second},
		{endless.Err(), caclient.Unreachable, 5 * time.Minute},
	} {
		t.Run(status.Code(test.err).String()+" "+test.after.String(), func(t *testing.T) {
			s.Set(func(k *agenttest.Knobs) { k.Before = func(context.Context, string) error { return test.err } })
			_, err := client(t, s, nil).Issue(timeout(t), request(t))
			if caclient.KindOf(err) != test.kind || caclient.RetryAfter(err) != test.after {
				t.Errorf("got %v (%v, after %v)", err, caclient.KindOf(err), caclient.RetryAfter(err))
			}
		})
	}
}

func TestSlowServerIsLeftAfterTheDeadline(t *testing.T) {
	s := agenttest.New(t)
	s.Set(func(k *agenttest.Knobs) {
		k.Before = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
	})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := client(t, s, nil).Issue(ctx, request(t)); caclient.KindOf(err) != caclient.Unreachable {
		t.Errorf("got %v", err)
	}
}

func TestServerMustProveItself(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(t *testing.T, s *agenttest.Server, c *caclient.Config)
		want   string
	}{
		{"under the bundle's roots", func(t *testing.T, s *agenttest.Server, _ *caclient.Config) {
			s.WriteBundle(agenttest.NewAuthority(t, "other").Root)
		}, "certificate signed by unknown authority"},
		{"by its name", func(_ *testing.T, _ *agenttest.Server, c *caclient.Config) { c.Name = "castellan.example" }, "certificate"},
		{"with a bundle at all", func(_ *testing.T, _ *agenttest.Server, c *caclient.Config) { c.BundleFile += ".missing" }, "no such file"},
		{"with a bundle that is one", func(t *testing.T, s *agenttest.Server, _ *caclient.Config) {
			agenttest.WriteFile(t, s.BundleFile, agenttest.PEM(s.Authority().Root)[:200])
		}, "is it half-written?"},
		{"with a bundle of something", func(t *testing.T, s *agenttest.Server, _ *caclient.Config) {
			agenttest.WriteFile(t, s.BundleFile, "\n")
		}, "no certificate in it"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := agenttest.New(t)
			c := client(t, s, func(c *caclient.Config) { test.change(t, s, c) })
			_, err := c.Issue(timeout(t), request(t))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %s", err, test.want)
			}
			if len(s.Requests()) != 0 {
				t.Error("the token was sent to a server that had not proved itself")
			}
		})
	}
}

func TestBundleFileIsReadAgain(t *testing.T) {
	s := agenttest.New(t)
	next := agenttest.NewAuthority(t, "next")
	var log bytes.Buffer
	c := client(t, s, func(c *caclient.Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	issue := func() error {
		_, err := c.Issue(timeout(t), request(t))
		return err
	}
	if err := issue(); err != nil {
		t.Fatal(err)
	}
	first := c.RootsVersion()
	s.WriteBundle(next.Root)
	s.Serve(next)
	if err := issue(); err != nil {
		t.Errorf("after the bundle changed: %v", err)
	}
	if c.RootsVersion() == first {
		t.Error("the version did not change")
	}
	agenttest.WriteFile(t, s.BundleFile, "broken")
	for range 3 {
		if err := issue(); err != nil {
			t.Errorf("a broken bundle file took down the last good one: %v", err)
		}
	}
	if n := strings.Count(log.String(), "last good one stays"); n != 1 {
		t.Errorf("said %d times:\n%s", n, log.String())
	}
}

func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, path, want string }{
		{"missing", filepath.Join(dir, "missing"), "no such file or directory"},
		{"empty", write("empty", " \n"), "token is empty"},
		{"too long", write("long", strings.Repeat("x", 9000)), "is larger than 8194 bytes"},
		{"two lines", write("lines", "a\nb"), "token holds characters that no token has; is the file a token?"},
		{"binary", write("binary", "a\x00b"), "token holds characters that no token has; is the file a token?"},
		{"a pipe nobody writes to", fifo, "is not a regular file"},
		{"a directory", dir, "is not a regular file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := caclient.CredentialFile(test.path).Read(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
	t.Run("is read again for every use", func(t *testing.T) {
		s := agenttest.New(t)
		path := write("agent", "stale")
		c := client(t, s, func(c *caclient.Config) { c.AgentToken = caclient.CredentialFile(path) })
		if _, err := c.Issue(timeout(t), request(t)); caclient.KindOf(err) != caclient.Refused {
			t.Errorf("got %v", err)
		}
		write("agent", agenttest.Token(agenttest.AgentAccount, "agent-uid"))
		if _, err := c.Issue(timeout(t), request(t)); err != nil {
			t.Errorf("got %v", err)
		}
	})
	t.Run("never shows itself", func(t *testing.T) {
		c, err := caclient.NewCredential("eyJhbGciOi.secret.signature")
		if err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "c", c, "p", &c)
		js, _ := json.Marshal(map[string]any{"c": c})
		for _, text := range []string{fmt.Sprintf("%v %+v %#v %s %q", c, c, c, c, c), log.String(), string(js)} {
			if strings.Contains(text, "secret") {
				t.Errorf("shown: %s", text)
			}
		}
	})
}

func TestClaims(t *testing.T) {
	c, err := caclient.NewCredential(agenttest.Token("shop/orders", "uid-1"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Claims()
	if err != nil || got.Account.String() != "shop/orders" || got.PodUID != "uid-1" || got.PodName != "orders-0" || got.Node != "local" {
		t.Errorf("%+v %v", got, err)
	}
	for token, want := range map[string]string{
		"a.b":                 "token is not a JWT of three parts",
		"a.!!.c":              "token payload is not base64url",
		"a.e30.c":             `token subject "" is no service account`,
		"a.bm90anNvbg.c":      "token payload is not the JSON of a service account's token",
		"a.eyJzdWIiOiJ4In0.c": `token subject "x" is no service account`,
		"a.eyJzdWIiOjF9.c":    "token payload is not the JSON of a service account's token",
		"a.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6WDp5In0.c": `token subject: identity: "X" is not a namespace (an RFC 1123 label is wanted)`,
	} {
		c, err := caclient.NewCredential(token)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Claims(); err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", token, err, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("x.local")
	for want, cfg := range map[string]caclient.Config{
		"caclient: no server address or name":                       {},
		"caclient: no bundle file; without it no server is trusted": {Address: "a:1", Name: "a", TrustDomain: td},
		"caclient: no trust domain":                                 {Address: "a:1", Name: "a", BundleFile: "f"},
	} {
		if _, err := caclient.New(cfg); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// Where names are not resolved (yet), the server is found by its address, and is
// believed on the same terms.
func TestFallback(t *testing.T) {
	s := agenttest.New(t)
	c := client(t, s, func(cfg *caclient.Config) { cfg.Address, cfg.Fallback = "nowhere.invalid:15012", s.Addr() })
	if _, err := c.Issue(timeout(t), request(t)); err != nil {
		t.Error(err)
	}
	impostor := agenttest.New(t)
	c = client(t, s, func(cfg *caclient.Config) { cfg.Address, cfg.Fallback = "nowhere.invalid:15012", impostor.Addr() })
	if _, err := c.Issue(timeout(t), request(t)); err == nil {
		t.Error("a server of another authority was believed")
	}
	c = client(t, s, func(cfg *caclient.Config) { cfg.Address = "nowhere.invalid:15012" })
	if _, err := c.Issue(timeout(t), request(t)); err == nil {
		t.Error("the server was found without an address")
	}
}
