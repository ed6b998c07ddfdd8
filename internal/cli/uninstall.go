package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"
)

func (e *env) uninstallCommand() *cobra.Command {
	var purge bool
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Take Castellan out of a cluster", Args: noArgs,
		Long: `Take Castellan out of a Kubernetes cluster. The webhooks go first, so that pods can
always be started. What holds state stays, so that a later installation has the
same root and the same trust: the Secret castellan-ca, the ledger's volume, the
namespace, and the CRDs with all policies. --purge removes these too.`,
	}
	flags := addInstallFlags(cmd, 5*time.Minute)
	cmd.Flags().BoolVar(&purge, "purge", false, "remove the authority's keys, the ledger, and the CRDs with all policies too")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := flags.check(); err != nil {
			return err
		}
		in, err := e.installer(flags)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), flags.timeout)
		defer cancel()
		return in.Uninstall(ctx, purge)
	}
	return cmd
}
