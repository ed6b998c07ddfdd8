package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	istiov1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca/server"
)

// adminSocket serves the operator's service to uids.
func (w *world) adminSocket(t *testing.T, uids ...uint32) castellanv1.AuthorityAdminClient {
	t.Helper()
	path := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(server.OperatorCredentials(uids...)))
	server.NewAdmin(w.authority, w.ledger, slog.New(slog.DiscardHandler)).Register(g)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return castellanv1.NewAuthorityAdminClient(conn)
}

func TestAdmin(t *testing.T) {
	w := newWorld(t, options{})
	request, _ := csr(t)
	start := time.Now().Add(-time.Second)
	for _, creds := range [][2]string{{w.token(orders()), w.agentToken}, {w.agentToken, w.agentToken}} {
		if _, err := w.create(as(t.Context(), creds[0], creds[1]), &istiov1.IstioCertificateRequest{Csr: request}); err != nil {
			t.Fatal(err)
		}
	}
	admin := w.adminSocket(t, uint32(os.Geteuid()))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	st, err := admin.Status(ctx, &castellanv1.AuthorityStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	roles := map[string]int{}
	for _, c := range st.GetCertificates() {
		roles[c.GetRole()]++
	}
	if st.GetTrustDomain() != "cluster.local" || st.GetLeafTtlSeconds() != 3600 || st.GetLedgerRows() < 2 ||
		len(st.GetJwtKeyIds()) == 0 || roles["root"] != 1 || roles["svid-issuer"] != 1 || roles["serving-issuer"] != 1 || roles["serving"] != 1 {
		t.Errorf("status %v", st)
	}

	list := func(req *castellanv1.ListIssuedRequest) []*castellanv1.LedgerRow {
		t.Helper()
		stream, err := admin.ListIssued(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		var rows []*castellanv1.LedgerRow
		for {
			row, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return rows
			}
			if err != nil {
				t.Fatal(err)
			}
			rows = append(rows, row)
		}
	}
	rows := list(&castellanv1.ListIssuedRequest{SpiffeId: "spiffe://cluster.local/ns/shop/sa/orders"})
	if len(rows) != 1 || rows[0].GetPodUid() != "pod-orders" || rows[0].GetNode() != "node-a" || rows[0].GetAttestor() != "agent" {
		t.Fatalf("rows %v", rows)
	}
	if got := list(&castellanv1.ListIssuedRequest{Serial: "00:" + rows[0].GetSerial()}); len(got) != 1 || got[0].GetSequence() != rows[0].GetSequence() {
		t.Errorf("by serial: %v", got)
	}
	if got := list(&castellanv1.ListIssuedRequest{Attestor: "agent-self"}); len(got) != 1 {
		t.Errorf("by attestor: %v", got)
	}
	if got := list(&castellanv1.ListIssuedRequest{Attestor: "agent-self", Until: timestamppb.New(start)}); len(got) != 0 {
		t.Errorf("until before: %v", got)
	}
	if got := list(&castellanv1.ListIssuedRequest{Since: timestamppb.New(start), Limit: 1}); len(got) != 1 {
		t.Errorf("limit: %v", got)
	}
	stream, err := admin.ListIssued(ctx, &castellanv1.ListIssuedRequest{SpiffeId: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("odd SPIFFE ID: %v", err)
	}
}

// TestAdminSocketAsksTheKernel: another uid's connection is closed before any call.
func TestAdminSocketAsksTheKernel(t *testing.T) {
	w := newWorld(t, options{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := w.adminSocket(t, uint32(os.Geteuid())+1).Status(ctx, &castellanv1.AuthorityStatusRequest{})
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("a uid that is not admitted: %v", err)
	}
}

func TestMintJWT(t *testing.T) {
	w := newWorld(t, options{})
	resp, err := w.mint(as(t.Context(), w.token(orders()), w.agentToken), &castellanv1.MintJWTRequest{Audience: []string{"db", "cache"}, TtlSeconds: 60})
	if err != nil {
		t.Fatal(err)
	}
	const id = "spiffe://cluster.local/ns/shop/sa/orders"
	token, err := jwt.ParseSigned(resp.GetToken(), []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	var keys jose.JSONWebKeySet
	if err := json.Unmarshal(w.authority.Bundle().MarshalJWTAuthorities(), &keys); err != nil {
		t.Fatal(err)
	}
	var claims jwt.Claims
	if err := token.Claims(keys, &claims); err != nil {
		t.Fatal(err)
	}
	if err := claims.ValidateWithLeeway(jwt.Expected{Subject: id, AnyAudience: jwt.Audience{"cache"}, Time: time.Now()}, 0); err != nil {
		t.Fatal(err)
	}
	if resp.GetSpiffeId() != id || time.Until(resp.GetExpiresAt().AsTime()) > time.Minute || !claims.Expiry.Time().Equal(resp.GetExpiresAt().AsTime()) {
		t.Errorf("answer %v, claims %v", resp.GetExpiresAt().AsTime(), claims.Expiry.Time())
	}
	for _, r := range w.log.take(t) {
		if _, ok := r["token"]; ok || r["kind"] != "jwt-svid" {
			t.Errorf("audit record %v", r)
		}
	}
}
