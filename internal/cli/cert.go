package cli

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

func (e *env) certCommand() *cobra.Command {
	return group("cert", "Inspect, verify, lint and fetch certificates",
		e.certInspectCommand(), e.certVerifyCommand(), e.certLintCommand(), e.certFetchCommand())
}

func (e *env) certInspectCommand() *cobra.Command {
	var clientCert, clientKey string
	var within time.Duration
	cmd := &cobra.Command{
		Use:   "inspect FILE|-|HOST:PORT|unix:SOCKET",
		Short: "Show a certificate chain, SPIFFE ID first",
		Long: `Show the certificates of a file (PEM or DER), of standard input, of a TLS server,
or of a workload's socket (SPIFFE Workload API). Nothing is verified: see cert verify.`,
		Example: `  castellan cert inspect svid.pem
  castellan cert inspect 127.0.0.1:15012 -o json
  castellan cert inspect unix:/var/run/secrets/workload-spiffe-uds/socket --expires-within 10m`,
		Args: cobra.ExactArgs(1),
	}
	formats := []string{"table", "json", "yaml", "pem"}
	format := outputFlag(cmd, formats...)
	cmd.Flags().StringVar(&clientCert, "client-cert", "", "PEM certificate to show to a server that asks")
	cmd.Flags().StringVar(&clientKey, "client-key", "", "PEM key of --client-cert")
	cmd.Flags().DurationVar(&within, "expires-within", 0, "exit 2 unless every certificate outlives this duration")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		if within < 0 {
			return invalidf("--expires-within: %v is negative", within)
		}
		defer e.progress("reading " + args[0])()
		certs, err := e.loadCertificates(cmd.Context(), args[0], clientCert, clientKey)
		if err != nil {
			return err
		}
		now := time.Now() //nolint:forbidigo // a command line reads the real clock
		views := describeChain(certs, now)
		switch *format {
		case "pem":
			err = writePEM(e.out, certs)
		case "table":
			err = printChain(e.out, views, color(e.out))
		default:
			err = writeData(e.out, *format, views)
		}
		if err != nil {
			return err
		}
		if !cmd.Flags().Changed("expires-within") {
			return nil
		}
		for _, c := range certs {
			if left := c.NotAfter.Sub(now); left <= within {
				fmt.Fprintf(e.err, "castellan: %s has %s left, less than %v; renew it\n", nameOf(c), humanDuration(left), within)
				return errNegative
			}
		}
		return nil
	}
	return cmd
}
