package cli

import (
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
		Use:   "inspect FILE|-|HOST:PORT|unix:SOCKET",
		Short: "Show a certificate chain, SPIFFE ID first",
		Long: `Show the certificates of a file (PEM or DER), of standard input, of a TLS server,
or of a workload's socket (SPIFFE Workload API). Nothing is verified: see cert verify.`,
		Example: `  castellan cert inspect svid.pem
  castellan cert inspect 127.0.0.1:15012 -o json
  castellan cert inspect unix:/var/run/secrets/workload-spiffe-uds/socket --expires-within 10m`,
		Args: oneArg(certSource),
	}
	formats := []string{"table", "json", "yaml", "pem"}
	format := outputFlag(cmd, formats...)
	options.addFlags(cmd)
	cmd.Flags().Var(&within, "expires-within", "exit 2 unless every certificate outlives this duration (10m, 36h, 7d)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		stop := e.progress("reading " + args[0])
		certs, err := e.loadCertificates(cmd.Context(), args[0], options)
		stop()
		if err != nil {
			return err
		}
		now := time.Now() //nolint:forbidigo // a command line reads the real clock
		if err := e.writeChain(certs, now, *format); err != nil {
			return err
		}
		if !cmd.Flags().Changed("expires-within") {
			return nil
		}
		return e.outlive(certs, now, time.Duration(within))
	}
	return cmd
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
