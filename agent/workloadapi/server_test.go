package workloadapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	gospiffe "github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
	"castellan.dev/agent/workloadapi"
	"castellan.dev/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const account = "shop/orders"

var (
	ours    = spiffeid.RequireTrustDomainFromString(agenttest.TrustDomain)
	foreign = spiffeid.RequireTrustDomainFromString("other.example")
)

// api is a Workload API server on a socket, over a state that the test sets.
type api struct {
	t      *testing.T
	fake   *agenttest.Server // signs what is shown
	source *svid.Source
	socket string
	client workload.SpiffeWorkloadAPIClient
	log    *bytes.Buffer

	mu     sync.Mutex
	minted error
	pushes []time.Duration
}

// Fetch implements workloadapi.JWTs.
func (a *api) Fetch(ctx context.Context, audience []string) (*caclient.JWT, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.minted != nil {
		return nil, a.minted
	}
	token, err := caclient.NewCredential(agenttest.Token(account, "uid"))
	if err != nil {
		return nil, err
	}
	c, err := caclient.New(caclient.Config{
		Address: a.fake.Addr(), Name: "127.0.0.1", BundleFile: a.fake.BundleFile, TrustDomain: ours,
		AgentToken: caclient.CredentialFile(a.fake.TokenFile(agenttest.AgentAccount, "agent")),
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.MintJWT(ctx, workloadOf(a.t), token, audience)
}

func workloadOf(t *testing.T) identity.Workload {
	t.Helper()
	acc, err := identity.ParseAccount(account)
	if err != nil {
		t.Fatal(err)
	}
	w, err := identity.New(ours, acc)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func serve(t *testing.T, first *svid.Snapshot) *api {
	t.Helper()
	dir, err := os.MkdirTemp("", "wl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := &api{t: t, fake: agenttest.New(t), source: svid.NewSource(first), socket: filepath.Join(dir, "s"), log: &bytes.Buffer{}}
	server, err := workloadapi.New(workloadapi.Config{
		Source: a.source, JWTs: a, Hold: 300 * time.Millisecond, Log: slog.New(slog.NewTextHandler(&locked{w: a.log}, nil)),
		Pushed: func(d time.Duration) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.pushes = append(a.pushes, d)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(g, server)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+a.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); g.Stop(); <-done })
	a.client = workload.NewSpiffeWorkloadAPIClient(conn)
	return a
}

type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// issued makes a state with a fresh SVID under authority.
func issued(t *testing.T, authority *agenttest.Authority, jwks []byte) *svid.Snapshot {
	t.Helper()
	key, err := svid.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf := authority.Leaf(t, agenttest.ID(account), key.Signer().Public(), time.Hour, nil)
	return &svid.Snapshot{
		Status: svid.Valid, Workload: workloadOf(t), PodUID: "uid", Published: time.Now(), Trust: trust(t, authority, jwks),
		SVID: &svid.SVID{
			ID: workloadOf(t).ID(), Chain: [][]byte{leaf.Raw, authority.Intermediate.Raw}, Key: key,
			NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Received: time.Now(),
		},
	}
}

// trust has our bundle and that of another trust domain.
func trust(t *testing.T, authority *agenttest.Authority, jwks []byte) *svid.Trust {
	t.Helper()
	r, err := svid.NewRotator(svid.Config{Issuer: (*caclient.Client)(nil), TrustDomain: ours})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.SetBundle(ours, [][]byte{authority.Root.Raw}, jwks, 1, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.SetBundle(foreign, [][]byte{agenttest.NewAuthority(t, "foreign").Root.Raw}, nil, 1, 0); err != nil {
		t.Fatal(err)
	}
	return r.Trust()
}

// ready serves a workload that has everything.
func ready(t *testing.T) *api {
	t.Helper()
	a := serve(t, &svid.Snapshot{})
	a.source.Publish(issued(t, a.fake.Authority(), a.fake.JWKS()))
	return a
}

func authorized(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// methods calls every method once and returns the error of its first answer.
func (a *api) methods() map[string]func(ctx context.Context) error {
	return map[string]func(ctx context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			return first(a.client.FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			return first(a.client.FetchX509Bundles(ctx, &workload.X509BundlesRequest{}))
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			return first(a.client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{}))
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := a.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			token := a.fake.Mint(map[string]any{"sub": agenttest.ID(account), "aud": "a", "exp": time.Now().Add(time.Hour).Unix()}, nil)
			_, err := a.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
			return err
		},
	}
}

func first[M any](stream grpc.ServerStreamingClient[M], err error) error {
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

func TestHeader(t *testing.T) {
	a := ready(t)
	for name, call := range a.methods() {
		t.Run("spiffe-38 "+name+" without the header", func(t *testing.T) {
			for _, ctx := range []context.Context{
				t.Context(),
				metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "false"),
				metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "True"),
				metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true", "workload.spiffe.io", "x"),
			} {
				err := call(ctx)
				if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), `security header missing: workload.spiffe.io must be "true"`) {
					t.Errorf("got %v", err)
				}
			}
		})
		t.Run("spiffe-39 "+name+" needs nothing else of the caller", func(t *testing.T) {
			if err := call(authorized(t)); err != nil {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestWIT(t *testing.T) {
	a := ready(t)
	t.Run("spiffe-43 the WIT profile is unimplemented", func(t *testing.T) {
		for _, err := range []error{
			first(a.client.FetchWITSVID(authorized(t), &workload.WITSVIDRequest{})),
			first(a.client.FetchWITBundles(authorized(t), &workload.WITBundlesRequest{})),
		} {
			if status.Code(err) != codes.Unimplemented {
				t.Errorf("got %v", err)
			}
		}
	})
}

func TestWithoutAnIdentity(t *testing.T) {
	starting, refused, expired := svid.Snapshot{}, svid.Snapshot{Status: svid.Refused}, svid.Snapshot{Status: svid.Expired}
	for _, test := range []struct {
		name    string
		state   svid.Snapshot
		methods []string
		code    codes.Code
		text    string
	}{
		{"spiffe-41 starting is Unavailable", starting, []string{"FetchX509SVID", "FetchJWTSVID"}, codes.Unavailable, "identity not issued yet, try again"},
		{"spiffe-41 bundles while starting", starting, []string{"FetchX509Bundles", "FetchJWTBundles", "ValidateJWTSVID"}, codes.Unavailable, "trust bundle not known yet, try again"},
		{"spiffe-41 no identity is PermissionDenied", refused, []string{"FetchX509SVID", "FetchJWTSVID", "FetchX509Bundles", "FetchJWTBundles", "ValidateJWTSVID"}, codes.PermissionDenied, "no identity issued"},
		{"spiffe-41 an expired identity is none", expired, []string{"FetchX509SVID"}, codes.PermissionDenied, "no identity issued"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := serve(t, &test.state)
			for _, m := range test.methods {
				err := a.methods()[m](authorized(t))
				if status.Code(err) != test.code || status.Convert(err).Message() != test.text {
					t.Errorf("%s: got %v, want %v %q", m, err, test.code, test.text)
				}
			}
		})
	}
	t.Run("bundles outlive an identity that expired", func(t *testing.T) {
		a := ready(t)
		state, _ := a.source.Current()
		a.source.Publish(&svid.Snapshot{Status: svid.Expired, Trust: state.Trust})
		for _, m := range []string{"FetchX509Bundles", "FetchJWTBundles", "ValidateJWTSVID"} {
			if err := a.methods()[m](authorized(t)); err != nil {
				t.Errorf("%s: %v", m, err)
			}
		}
	})
}

func TestX509SVID(t *testing.T) {
	a := ready(t)
	stream, err := a.client.FetchX509SVID(authorized(t), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	recv := func() *workload.X509SVIDResponse {
		t.Helper()
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	one := recv()
	t.Run("spiffe-44 the first message comes at once, and is full", func(t *testing.T) { full(t, one) })
	t.Run("spiffe-48 one SVID: chain leaf first, PKCS#8, bundle", func(t *testing.T) {
		s := one.GetSvids()[0]
		certs, err := x509.ParseCertificates(s.GetX509Svid())
		if err != nil || len(certs) != 2 || certs[0].IsCA || !certs[1].IsCA {
			t.Fatalf("chain: %d certificates, %v", len(certs), err)
		}
		key, err := x509.ParsePKCS8PrivateKey(s.GetX509SvidKey())
		if err != nil {
			t.Fatal(err)
		}
		public, ok := certs[0].PublicKey.(*ecdsa.PublicKey)
		if private, isEC := key.(*ecdsa.PrivateKey); !ok || !isEC || !private.PublicKey.Equal(public) || private.Curve != elliptic.P256() {
			t.Error("the key is not the certificate's, on P-256")
		}
		if s.GetSpiffeId() != agenttest.ID(account) || certs[0].URIs[0].String() != s.GetSpiffeId() {
			t.Errorf("named %q", s.GetSpiffeId())
		}
	})
	t.Run("spiffe-49 the hint is unique and short", func(t *testing.T) {
		if got := one.GetSvids()[0].GetHint(); got != account {
			t.Errorf("hint %q", got)
		}
	})
	t.Run("spiffe-45 a change is pushed", func(t *testing.T) {
		next := issued(t, a.fake.Authority(), a.fake.JWKS())
		a.source.Publish(next)
		two := recv()
		full(t, two)
		if bytes.Equal(one.GetSvids()[0].GetX509Svid(), two.GetSvids()[0].GetX509Svid()) {
			t.Error("the old one")
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if len(a.pushes) != 1 || a.pushes[0] > 5*time.Second {
			t.Errorf("pushes measured: %v", a.pushes)
		}
	})
	t.Run("spiffe-45 what does not change this message is not sent", func(t *testing.T) {
		state, _ := a.source.Current()
		same := *state
		same.Problem = errors.New("a failed renewal")
		a.source.Publish(&same)
		next := issued(t, a.fake.Authority(), a.fake.JWKS())
		a.source.Publish(next)
		if got := recv(); !bytes.Equal(got.GetSvids()[0].GetX509Svid(), bytes.Join(next.SVID.Chain, nil)) {
			t.Error("a message without news")
		}
	})
	t.Run("spiffe-46 what is gone is left out", func(t *testing.T) {
		state, _ := a.source.Current()
		without := *state
		without.Trust = &svid.Trust{Domain: ours, Own: state.Trust.Own}
		a.source.Publish(&without)
		if got := recv(); len(got.GetFederatedBundles()) != 0 || len(got.GetSvids()) != 1 {
			t.Errorf("federated bundles: %d", len(got.GetFederatedBundles()))
		}
	})
	t.Run("spiffe-53 a withdrawn identity ends the stream with PermissionDenied", func(t *testing.T) {
		state, _ := a.source.Current()
		a.source.Publish(&svid.Snapshot{Status: svid.Expired, Trust: state.Trust})
		if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied || status.Convert(err).Message() != "no identity issued" {
			t.Errorf("got %v", err)
		}
	})
}

// full holds what every X509SVIDResponse must.
func full(t *testing.T, m *workload.X509SVIDResponse) {
	t.Helper()
	if len(m.GetSvids()) != 1 || len(m.GetFederatedBundles()) != 1 {
		t.Fatalf("%d SVIDs and %d federated bundles", len(m.GetSvids()), len(m.GetFederatedBundles()))
	}
	s := m.GetSvids()[0]
	if s.GetSpiffeId() == "" || len(s.GetX509Svid()) == 0 || len(s.GetX509SvidKey()) == 0 || len(s.GetBundle()) == 0 {
		t.Error("a field is empty")
	}
	if _, err := x509.ParseCertificates(m.GetFederatedBundles()[foreign.IDString()]); err != nil {
		t.Error(err)
	}
}

func TestAStreamOpenedEarlyIsAnsweredWhenThereIsAnIdentity(t *testing.T) {
	a := serve(t, &svid.Snapshot{})
	stream, err := a.client.FetchX509SVID(authorized(t), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	a.source.Publish(issued(t, a.fake.Authority(), nil))
	if m, err := stream.Recv(); err != nil {
		t.Errorf("got %v %v", m, err)
	}
}

func TestBundles(t *testing.T) {
	a := ready(t)
	t.Run("spiffe-50 X.509 bundles hold ours and others, apart", func(t *testing.T) {
		stream, err := a.client.FetchX509Bundles(authorized(t), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		m, err := stream.Recv()
		if err != nil || len(m.GetBundles()) != 2 || len(m.GetBundles()[ours.IDString()]) == 0 || len(m.GetBundles()[foreign.IDString()]) == 0 {
			t.Errorf("got %v %v", m, err)
		}
		if bytes.Equal(m.GetBundles()[ours.IDString()], m.GetBundles()[foreign.IDString()]) {
			t.Error("merged")
		}
	})
	t.Run("spiffe-50 JWT bundles hold only keys for JWT-SVIDs", func(t *testing.T) {
		stream, err := a.client.FetchJWTBundles(authorized(t), &workload.JWTBundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		m, err := stream.Recv()
		if err != nil || len(m.GetBundles()) != 2 {
			t.Fatalf("got %v %v", m, err)
		}
		for td, want := range map[string]int{ours.IDString(): 1, foreign.IDString(): 0} {
			var set jose.JSONWebKeySet
			if err := json.Unmarshal(m.GetBundles()[td], &set); err != nil || len(set.Keys) != want {
				t.Errorf("%s: %d keys, %v; want %d", td, len(set.Keys), err, want)
			}
			for _, k := range set.Keys {
				if k.Use != "jwt-svid" || k.KeyID == "" {
					t.Errorf("key %+v", k)
				}
			}
		}
	})
}

func TestFetchJWTSVID(t *testing.T) {
	a := ready(t)
	fetch := func(r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
		return a.client.FetchJWTSVID(authorized(t), r)
	}
	t.Run("spiffe-51 without an ID, every identity there is", func(t *testing.T) {
		m, err := fetch(&workload.JWTSVIDRequest{Audience: []string{"a"}})
		if err != nil || len(m.GetSvids()) != 1 || m.GetSvids()[0].GetSpiffeId() != agenttest.ID(account) || m.GetSvids()[0].GetHint() != account {
			t.Errorf("got %v %v", m, err)
		}
	})
	t.Run("spiffe-51 with our ID", func(t *testing.T) {
		if _, err := fetch(&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: agenttest.ID(account)}); err != nil {
			t.Error(err)
		}
	})
	long := strings.Repeat("x", 1025)
	for _, test := range []struct {
		name string
		req  *workload.JWTSVIDRequest
		code codes.Code
		text string
	}{
		{"spiffe-51 another's ID", &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: agenttest.ID("shop/payments")}, codes.PermissionDenied, "no identity issued"},
		{"spiffe-51 no audience", &workload.JWTSVIDRequest{}, codes.InvalidArgument, "audience must name 1 to 16 recipients"},
		{"spiffe-47 an empty audience", &workload.JWTSVIDRequest{Audience: []string{"a", ""}}, codes.InvalidArgument, "each audience must have 1 to 1024 bytes"},
		{"too long an audience", &workload.JWTSVIDRequest{Audience: []string{long}}, codes.InvalidArgument, "each audience must have 1 to 1024 bytes"},
		{"too many audiences", &workload.JWTSVIDRequest{Audience: strings.Split(strings.Repeat("a ", 17), " ")}, codes.InvalidArgument, "audience must name 1 to 16 recipients"},
		{"an ID that is none", &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "orders"}, codes.InvalidArgument, "spiffe_id is not a SPIFFE ID"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := fetch(test.req)
			if status.Code(err) != test.code || status.Convert(err).Message() != test.text {
				t.Errorf("got %v, want %v %q", err, test.code, test.text)
			}
		})
	}
	for _, test := range []struct {
		kind caclient.Kind
		code codes.Code
		text string
	}{
		{caclient.Refused, codes.PermissionDenied, "no identity issued"},
		{caclient.Invalid, codes.InvalidArgument, "the server does not issue a JWT-SVID for this audience"},
		{caclient.Unreachable, codes.Unavailable, "JWT-SVID cannot be issued now, try again"},
		{caclient.BadAnswer, codes.Unavailable, "JWT-SVID cannot be issued now, try again"},
		{caclient.BadCredential, codes.Unavailable, "JWT-SVID cannot be issued now, try again"},
	} {
		t.Run("server "+test.kind.String(), func(t *testing.T) {
			a.mu.Lock()
			a.minted = &caclient.Error{Kind: test.kind, Err: errors.New("the cause")}
			a.mu.Unlock()
			_, err := fetch(&workload.JWTSVIDRequest{Audience: []string{"a"}})
			if status.Code(err) != test.code || status.Convert(err).Message() != test.text {
				t.Errorf("got %v, want %v %q", err, test.code, test.text)
			}
			if !strings.Contains(a.log.String(), "the cause") {
				t.Error("the log does not hold the cause")
			}
		})
	}
}

func TestGoSpiffeFindsTheSocketByEnvironment(t *testing.T) {
	a := ready(t)
	t.Run("spiffe-40 SPIFFE_ENDPOINT_SOCKET=unix:///path, spiffe-37 gRPC on a Unix socket", func(t *testing.T) {
		t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+a.socket)
		got, err := gospiffe.FetchX509SVID(t.Context())
		if err != nil || got.ID.String() != agenttest.ID(account) {
			t.Errorf("got %v %v", got, err)
		}
	})
	t.Run("spiffe-42 reflection is there, and the service is not extended", func(t *testing.T) {
		want := fmt.Sprint([]string{"FetchJWTSVID", "ValidateJWTSVID"})
		var unary []string
		for _, m := range workload.SpiffeWorkloadAPI_ServiceDesc.Methods {
			unary = append(unary, m.MethodName)
		}
		if fmt.Sprint(unary) != want || workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName != "SpiffeWorkloadAPI" {
			t.Errorf("methods %v", unary)
		}
	})
	t.Run("spiffe-54 a client that lost its stream is answered at once", func(t *testing.T) {
		for range 20 {
			if err := a.methods()["FetchX509SVID"](authorized(t)); err != nil {
				t.Fatal(err)
			}
		}
	})
}
