package cli

import (
	"bufio"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	castellanv1 "castellan.dev/api/castellan/v1"
)

func (e *env) caCommand() *cobra.Command {
	return group("ca", "Show the certificate authority and what it has issued", e.caStatusCommand(), e.caIssuedCommand())
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
	cmd := &cobra.Command{
		Use: "status", Short: "Show the authorities of a running mesh", Args: noArgs,
		Long: "Show the authorities of a running mesh.\n\n" + howTargeted,
	}
	target := e.targetFlags(cmd)
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), tunnelTimeout)
		defer cancel()
		defer e.progress("asking the server")()
		conn, err := target.server(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		status, err := castellanv1.NewAuthorityAdminClient(conn).Status(ctx, &castellanv1.AuthorityStatusRequest{})
		if err != nil {
			return conn.failed(err)
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
		Long:    "List what the ledger holds, oldest first, as it is read.\n\n" + howTargeted,
		Example: "  castellan ca issued --id spiffe://cluster.local/ns/shop/sa/orders --since 1h",
	}
	f := cmd.Flags()
	f.StringVar(&req.SpiffeId, "id", "", "only this SPIFFE ID")
	f.StringVar(&req.Serial, "serial", "", "only this serial number, in hex")
	f.StringVar(&req.Attestor, "attestor", "", "only what this attestor vouched for")
	f.StringVar(&since, "since", "", "not before this time (RFC 3339) or this long ago (1h)")
	f.StringVar(&until, "until", "", "not after this time (RFC 3339) or this long ago (1h)")
	f.Uint32Var(&req.Limit, "limit", 0, "at most so many rows (0: all)")
	target := e.targetFlags(cmd)
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
		dialing, cancel := context.WithTimeout(cmd.Context(), tunnelTimeout)
		defer cancel()
		stop := e.progress("reading the ledger")
		defer stop()
		conn, err := target.server(dialing)
		if err != nil {
			return err
		}
		defer conn.Close()
		out := bufio.NewWriter(e.out)
		err = listIssued(cmd.Context(), conn, req, issuedWriter(out, *format))
		return errors.Join(err, out.Flush())
	}
	return cmd
}

// rowWriter takes the rows of a list, which may be long, one by one.
type rowWriter interface {
	row(issuedView) error
	end() error
}

func issuedWriter(w io.Writer, format string) rowWriter {
	if format != "table" {
		return &issuedList{listWriter{w: w, format: format}}
	}
	return &issuedTable{tableWriter: tableWriter{w: w, rows: [][]string{{"CREATED", "SPIFFE ID", "SERIAL", "VALID UNTIL", "NODE", "OUTCOME"}}}}
}

type issuedList struct{ listWriter }

func (l *issuedList) row(r issuedView) error { return l.add(r) }

type issuedTable struct{ tableWriter }

func (t *issuedTable) row(r issuedView) error {
	return t.add(r.CreatedAt.Format(time.RFC3339), orDash(visible(r.SPIFFEID)), r.Serial, r.NotAfter.Format(time.RFC3339), orDash(visible(r.Node)), r.Outcome)
}

func (t *issuedTable) end() error { return t.flush() }

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

// listIssued writes rows as they come: the ledger may be larger than memory.
func listIssued(ctx context.Context, conn *admin, req *castellanv1.ListIssuedRequest, to rowWriter) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := castellanv1.NewAuthorityAdminClient(conn).ListIssued(ctx, req)
	if err != nil {
		return conn.failed(err)
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return to.end()
		}
		if err != nil {
			return conn.failed(err)
		}
		if err := to.row(viewRow(r)); err != nil {
			return err
		}
	}
}

func viewRow(r *castellanv1.LedgerRow) issuedView {
	return issuedView{
		Sequence: r.GetSequence(), Serial: r.GetSerial(), SPIFFEID: r.GetSpiffeId(), Outcome: r.GetOutcome(),
		NotBefore: r.GetNotBefore().AsTime(), NotAfter: r.GetNotAfter().AsTime(), CreatedAt: r.GetCreatedAt().AsTime(),
		PodUID: r.GetPodUid(), Node: r.GetNode(), Cluster: r.GetCluster(), Attestor: r.GetAttestor(),
		SubjectKeyID: r.GetSubjectKeyId(), IssuerKeyID: r.GetIssuerKeyId(), LeafSHA256: r.GetLeafSha256(),
	}
}
