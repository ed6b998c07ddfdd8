package cli

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func (e *env) certCommand() *cobra.Command {
	return group("cert", "Inspect, verify, lint and fetch certificates",
		e.certInspectCommand(), e.certVerifyCommand(), e.certLintCommand(), e.certFetchCommand())
}

func (e *env) certInspectCommand() *cobra.Command {
	var options tlsOptions
	var within lifetime
	cmd := &cobra.Command{
		Use:   "inspect FILE|-|HOST:PORT|unix:SOCKET|pod/NAME",
		Short: "Show a certificate chain, SPIFFE ID first",
		Long: `Show the certificates of a file (PEM or DER), of standard input, of a TLS server,
or of a workload's socket (SPIFFE Workload API). Nothing is verified: see cert verify.

With pod/NAME, or deploy/NAME for one of its pods, show what the agent on the pod's node
serves to it now, and verify it: exit code 2 unless callers take it for the pod's own.
This needs get on pods in the pod's namespace, and in Castellan's list on pods, create on
pods/exec and, for roots that are not the agent's word, get on configmaps. A file of such
a name is ./pod/NAME.`,
		Example: `  castellan cert inspect svid.pem
  castellan cert inspect 127.0.0.1:15012 -o json
  castellan cert inspect unix:/var/run/secrets/workload-spiffe-uds/socket --expires-within 10m
  castellan cert inspect pod/orders-7d4b9 -n shop`,
		Args: oneArg(certSource + ", or pod/NAME"),
	}
	formats := []string{"table", "json", "yaml", "pem"}
	format := outputFlag(cmd, formats...)
	options.addFlags(cmd)
	mesh := addMeshFlags(cmd)
	cmd.ValidArgsFunction = mesh.completePods("pod/", cobra.ShellCompDirectiveDefault)
	cmd.Flags().Var(&within, "expires-within", "exit 2 unless every certificate outlives this duration (10m, 36h, 7d)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		now := time.Now() //nolint:forbidigo // a command line reads the real clock
		certs, err := e.inspect(cmd.Context(), args[0], options, mesh, *format)
		if len(certs) == 0 || !cmd.Flags().Changed("expires-within") {
			return err
		}
		return cmp.Or(err, e.outlive(certs, now, time.Duration(within)))
	}
	return cmd
}

// inspect writes the certificates that source names, and returns them.
func (e *env) inspect(ctx context.Context, source string, options tlsOptions, mesh *meshFlags, format string) ([]*x509.Certificate, error) {
	if ref, ok := parsePodRef(source); ok {
		if options != (tlsOptions{}) {
			return nil, invalidf("--client-cert, --client-key and --server-name are for HOST:PORT, which %q is not", source)
		}
		p, err := e.inspectPod(ctx, mesh, ref, format)
		if p == nil {
			return nil, err
		}
		return p.chain, err
	}
	if err := mesh.unused(source); err != nil {
		return nil, err
	}
	stop := e.progress("reading " + source)
	certs, err := e.loadCertificates(ctx, source, options)
	stop()
	if err != nil {
		return nil, err
	}
	now := time.Now() //nolint:forbidigo // a command line reads the real clock
	return certs, e.writeChain(certs, now, format)
}

// writeChain writes certificates in one of the formats of inspect and fetch.
func (e *env) writeChain(certs []*x509.Certificate, now time.Time, format string) error {
	switch format {
	case "pem":
		return writePEM(e.out, certs)
	case "table":
		return printChain(e.out, describeChain(certs, now), color(e.out))
	default:
		return writeData(e.out, format, describeChain(certs, now))
	}
}

// outlive answers negatively if any certificate ends within the duration.
func (e *env) outlive(certs []*x509.Certificate, now time.Time, within time.Duration) error {
	var err error
	for _, c := range certs {
		left := c.NotAfter.Sub(now)
		switch {
		case left <= 0:
			fmt.Fprintf(e.err, "castellan: %s expired %s ago; renew it\n", nameOf(c), humanDuration(-left))
		case left <= within:
			fmt.Fprintf(e.err, "castellan: %s has %s left, not more than %s; renew it\n", nameOf(c), humanDuration(left), humanDuration(within))
		default:
			continue
		}
		err = errNegative
	}
	return err
}

// lifetime is a duration in Go's form or in days ("30d").
type lifetime time.Duration

// Set reads the flag.
func (l *lifetime) Set(s string) error {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n uint64
		if n, err = strconv.ParseUint(days, 10, 16); err == nil {
			d = time.Duration(n) * 24 * time.Hour
		}
	}
	switch {
	case err != nil:
		return errors.New("want a duration such as 10m, 36h or 7d")
	case d < 0:
		return errors.New("it is negative")
	}
	*l = lifetime(d)
	return nil
}

func (l *lifetime) String() string { return time.Duration(*l).String() }

// Type is what help shows.
func (l *lifetime) Type() string { return "duration" }
