package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/timestamppb"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/up"
)

func (e *env) caCommand() *cobra.Command {
	return group("ca", "Show the certificate authority and what it has issued", e.caStatusCommand(), e.caIssuedCommand())
}

// adminConn connects to the admin socket of the mesh that an up.json describes.
func adminConn(upPath string) (*up.File, *grpc.ClientConn, error) {
	file, err := up.ReadFile(upPath)
	if err != nil {
		return nil, nil, err
	}
	conn, err := dialSocket(file.Server.Admin)
	return file, conn, err
}

func dialSocket(path string) (*grpc.ClientConn, error) {
	// The socket is on this machine and admits by uid: there is nothing to encrypt.
	return grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
}

func adminError(err error) error {
	return fmt.Errorf("the server's admin socket does not answer: %w; is the mesh running, and are you its user?", err)
}

type authorityView struct {
	Role string `json:"role"`
	certView
}

type caStatusView struct {
	TrustDomain    string          `json:"trustDomain"`
	LeafTTL        string          `json:"leafTTL"`
	LedgerRows     uint64          `json:"ledgerRows"`
	BundleSequence uint64          `json:"bundleSequence"`
	JWTKeyIDs      []string        `json:"jwtKeyIds"`
	Certificates   []authorityView `json:"certificates"`
}

func (e *env) caStatusCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "status", Short: "Show the authorities of a running mesh", Args: noArgs}
	upPath := upFlag(cmd)
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		_, conn, err := adminConn(*upPath)
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), fetchTimeout)
		defer cancel()
		status, err := castellanv1.NewAuthorityAdminClient(conn).Status(ctx, &castellanv1.AuthorityStatusRequest{})
		if err != nil {
			return adminError(err)
		}
		view, err := viewStatus(status)
		if err != nil {
			return err
		}
		if *format != "table" {
			return writeData(e.out, *format, view)
		}
		return e.printStatus(view)
	}
	return cmd
}

func viewStatus(s *castellanv1.AuthorityStatus) (caStatusView, error) {
	view := caStatusView{
		TrustDomain: s.GetTrustDomain(), LeafTTL: (time.Duration(s.GetLeafTtlSeconds()) * time.Second).String(),
		LedgerRows: s.GetLedgerRows(), BundleSequence: s.GetBundleSequence(), JWTKeyIDs: s.GetJwtKeyIds(),
	}
	now := time.Now() //nolint:forbidigo // a command line reads the real clock
	for _, c := range s.GetCertificates() {
		cert, err := x509.ParseCertificate(c.GetDer())
		if err != nil {
			return view, fmt.Errorf("the server's %s: %w", c.GetRole(), err)
		}
		described := describe(cert, now)
		described.SelfSigned = selfSigned(cert)
		view.Certificates = append(view.Certificates, authorityView{Role: c.GetRole(), certView: described})
	}
	return view, nil
}

func (e *env) printStatus(v caStatusView) error {
	t := tabwriter.NewWriter(e.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "TRUST DOMAIN\t%s\nLEAF TTL\t%s\nLEDGER ROWS\t%d\nBUNDLE SEQUENCE\t%d\n\n", v.TrustDomain, v.LeafTTL, v.LedgerRows, v.BundleSequence)
	fmt.Fprintln(t, "ROLE\tNAME\tVALID UNTIL\tLEFT\tUSED\tKEY ID")
	for _, c := range v.Certificates {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%.0f%%\t%s\n", c.Role, displayName(c.certView), c.NotAfter.Format(time.RFC3339),
			humanDuration(time.Duration(c.SecondsLeft)*time.Second), c.LifeUsedPercent, c.SubjectKeyID)
	}
	return t.Flush()
}

type issuedView struct {
	Sequence     uint64    `json:"sequence"`
	Serial       string    `json:"serial"`
	SPIFFEID     string    `json:"spiffeId"`
	Outcome      string    `json:"outcome"`
	NotBefore    time.Time `json:"notBefore"`
	NotAfter     time.Time `json:"notAfter"`
	CreatedAt    time.Time `json:"createdAt"`
	PodUID       string    `json:"podUID,omitempty"`
	Node         string    `json:"node,omitempty"`
	Cluster      string    `json:"cluster,omitempty"`
	Attestor     string    `json:"attestor,omitempty"`
	SubjectKeyID string    `json:"subjectKeyId,omitempty"`
	IssuerKeyID  string    `json:"issuerKeyId,omitempty"`
	LeafSHA256   string    `json:"leafSha256,omitempty"`
}

func (e *env) caIssuedCommand() *cobra.Command {
	req := &castellanv1.ListIssuedRequest{}
	var since, until string
	cmd := &cobra.Command{
		Use: "issued", Short: "List what the ledger holds", Args: noArgs,
		Example: "  castellan ca issued --id spiffe://cluster.local/ns/shop/sa/orders --since 1h",
	}
	f := cmd.Flags()
	f.StringVar(&req.SpiffeId, "id", "", "only this SPIFFE ID")
	f.StringVar(&req.Serial, "serial", "", "only this serial number, in hex")
	f.StringVar(&req.Attestor, "attestor", "", "only what this attestor vouched for")
	f.StringVar(&since, "since", "", "not before this time (RFC 3339) or this long ago (1h)")
	f.StringVar(&until, "until", "", "not after this time (RFC 3339) or this long ago (1h)")
	f.Uint32Var(&req.Limit, "limit", 0, "at most so many rows (0: all)")
	upPath := upFlag(cmd)
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		var err error
		if req.Since, err = parseWhen("--since", since); err != nil {
			return err
		}
		if req.Until, err = parseWhen("--until", until); err != nil {
			return err
		}
		if req.SpiffeId != "" {
			if _, err := spiffeid.FromString(req.SpiffeId); err != nil {
				return invalidf("--id %q: %w; want spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT", req.SpiffeId, err)
			}
		}
		_, conn, err := adminConn(*upPath)
		if err != nil {
			return err
		}
		defer conn.Close()
		defer e.progress("reading the ledger")()
		rows, err := listIssued(cmd.Context(), conn, req)
		if err != nil {
			return err
		}
		if *format != "table" {
			return writeData(e.out, *format, rows)
		}
		t := tabwriter.NewWriter(e.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "CREATED\tSPIFFE ID\tSERIAL\tVALID UNTIL\tNODE\tOUTCOME")
		for _, r := range rows {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", r.CreatedAt.Format(time.RFC3339), orDash(r.SPIFFEID), r.Serial, r.NotAfter.Format(time.RFC3339), orDash(r.Node), r.Outcome)
		}
		return t.Flush()
	}
	return cmd
}

// parseWhen reads a time, or a duration before now.
func parseWhen(flag, s string) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return timestamppb.New(time.Now().Add(-d)), nil //nolint:forbidigo // a command line reads the real clock
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return nil, invalidf("%s %q: want a time such as 2006-01-02T15:04:05Z or a duration such as 1h", flag, s)
	}
	return timestamppb.New(t), nil
}

func listIssued(ctx context.Context, conn *grpc.ClientConn, req *castellanv1.ListIssuedRequest) ([]issuedView, error) {
	stream, err := castellanv1.NewAuthorityAdminClient(conn).ListIssued(ctx, req)
	if err != nil {
		return nil, adminError(err)
	}
	rows := []issuedView{}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return rows, nil
		}
		if err != nil {
			return nil, adminError(err)
		}
		rows = append(rows, issuedView{
			Sequence: r.GetSequence(), Serial: r.GetSerial(), SPIFFEID: r.GetSpiffeId(), Outcome: r.GetOutcome(),
			NotBefore: r.GetNotBefore().AsTime(), NotAfter: r.GetNotAfter().AsTime(), CreatedAt: r.GetCreatedAt().AsTime(),
			PodUID: r.GetPodUid(), Node: r.GetNode(), Cluster: r.GetCluster(), Attestor: r.GetAttestor(),
			SubjectKeyID: r.GetSubjectKeyId(), IssuerKeyID: r.GetIssuerKeyId(), LeafSHA256: r.GetLeafSha256(),
		})
	}
}
