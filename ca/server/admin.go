package server

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca"
	"castellan.dev/ca/ledger"
)

// Authority is what the operator may ask about; *ca.Authority is one.
type Authority interface {
	Bundle() *ca.Bundle
	Certificates() []ca.Certificate
	LeafTTL() time.Duration
}

// Admin implements AuthorityAdmin. Serve it on a socket that only the operator
// reaches (AdminCredentials): its answers are for him, causes included.
type Admin struct {
	castellanv1.UnimplementedAuthorityAdminServer

	authority Authority
	ledger    ledger.Reader
	log       *slog.Logger
	problems  []Problem
}

// Problem is something that may be wrong while the server goes on.
type Problem struct {
	Name string
	// Check returns what is wrong, for the operator to read; nil when nothing is.
	Check func() error
}

// NewAdmin returns the operator's service, whose Status asks for problems.
func NewAdmin(authority Authority, l ledger.Reader, log *slog.Logger, problems ...Problem) *Admin {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Admin{authority: authority, ledger: l, log: log, problems: problems}
}

// Register adds the service to r.
func (a *Admin) Register(r grpc.ServiceRegistrar) { castellanv1.RegisterAuthorityAdminServer(r, a) }

// Status returns what the authority is and holds.
func (a *Admin) Status(ctx context.Context, _ *castellanv1.AuthorityStatusRequest) (*castellanv1.AuthorityStatus, error) {
	rows, err := a.ledger.Rows(ctx)
	if err != nil {
		return nil, a.failed(err)
	}
	bundle := a.authority.Bundle()
	if bundle == nil {
		return nil, status.Error(codes.Unavailable, "the authority has no bundle yet")
	}
	st := &castellanv1.AuthorityStatus{
		TrustDomain:    bundle.TrustDomain.Name(),
		LedgerRows:     rows,
		BundleSequence: bundle.Sequence,
		JwtKeyIds:      slices.Sorted(maps.Keys(bundle.JWTAuthorities)),
		LeafTtlSeconds: int64(a.authority.LeafTTL() / time.Second),
	}
	for _, c := range a.authority.Certificates() {
		st.Certificates = append(st.Certificates, &castellanv1.AuthorityCertificate{Role: string(c.Role), Der: c.Cert.Raw})
	}
	for _, p := range a.problems {
		if err := p.Check(); err != nil {
			st.Problems = append(st.Problems, p.Name+": "+err.Error())
		}
	}
	return st, nil
}

// ListIssued streams ledger rows, oldest first.
func (a *Admin) ListIssued(req *castellanv1.ListIssuedRequest, stream grpc.ServerStreamingServer[castellanv1.LedgerRow]) error {
	filter, err := ledgerFilter(req)
	if err != nil {
		return err
	}
	for entry, err := range a.ledger.Query(stream.Context(), filter) {
		if err != nil {
			return a.failed(err)
		}
		if err := stream.Send(ledgerRow(&entry)); err != nil {
			return err
		}
	}
	return nil
}

func (a *Admin) failed(err error) error {
	a.log.Error("ledger cannot be read", "error", err)
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	return status.Errorf(codes.Unavailable, "the ledger cannot be read: %v", err)
}

func ledgerFilter(req *castellanv1.ListIssuedRequest) (ledger.Filter, error) {
	f := ledger.Filter{
		Serial:   normalSerial(req.GetSerial()),
		Attestor: req.GetAttestor(),
		Limit:    int(req.GetLimit()),
	}
	if s := req.GetSpiffeId(); s != "" {
		id, err := spiffeid.FromString(s)
		if err != nil {
			return f, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
		f.SPIFFEID = id
	}
	if t := req.GetSince(); t != nil {
		f.Since = t.AsTime()
	}
	if t := req.GetUntil(); t != nil {
		f.Until = t.AsTime()
	}
	return f, nil
}

// normalSerial takes a serial number as people copy it: with colons, capitals, leading zeros.
func normalSerial(s string) string {
	s = strings.ToLower(strings.NewReplacer(":", "", " ", "").Replace(s))
	if trimmed := strings.TrimLeft(s, "0"); trimmed != "" {
		return trimmed
	}
	return s
}

func ledgerRow(e *ledger.Entry) *castellanv1.LedgerRow {
	row := &castellanv1.LedgerRow{
		Sequence:     e.Sequence,
		Serial:       e.Serial,
		PodUid:       e.PodUID,
		Node:         e.Node,
		Cluster:      e.Cluster,
		Attestor:     e.Attestor,
		SubjectKeyId: hex.EncodeToString(e.SubjectKeyID),
		IssuerKeyId:  hex.EncodeToString(e.IssuerKeyID),
		NotBefore:    timestamppb.New(e.NotBefore),
		NotAfter:     timestamppb.New(e.NotAfter),
		CreatedAt:    timestamppb.New(e.RecordedAt),
		Outcome:      e.Outcome.String(),
	}
	if !e.SPIFFEID.IsZero() {
		row.SpiffeId = e.SPIFFEID.String()
	}
	if e.LeafHash != [32]byte{} {
		row.LeafSha256 = hex.EncodeToString(e.LeafHash[:])
	}
	return row
}
