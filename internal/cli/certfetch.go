package cli

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"castellan.dev/internal/disk"
)

// fetcher prints, or writes to a directory, what a Workload API gives.
type fetcher struct {
	env    *env
	dir    string
	format string
}

func (e *env) certFetchCommand() *cobra.Command {
	var socket string
	var watch bool
	f := fetcher{env: e}
	cmd := &cobra.Command{
		Use:   "fetch [pod/NAME | --socket SOCKET] [--watch] [--out DIR]",
		Short: "Fetch this workload's SVID from its socket, or a pod's without its key",
		Long: `Fetch the X.509-SVID and bundle from a SPIFFE Workload API. With --out they go to
svid.pem, svid_key.pem (mode 0600) and bundle.pem, each replaced in one step; with
--watch they are fetched again at every change until Ctrl-C.

With pod/NAME, or deploy/NAME for one of its pods, fetch the chain that the agent on the
pod's node serves to it now, and the bundle: svid.pem and bundle.pem, and never a key.
Exit code 2, and nothing is written, unless callers take the chain for the pod's own.`,
		Example: `  castellan cert fetch --socket unix:/var/run/secrets/workload-spiffe-uds/socket --out tls
  castellan cert fetch pod/orders-7d4b9 -n shop --out orders`,
		Args: cobra.MaximumNArgs(1),
	}
	mesh := addMeshFlags(cmd)
	cmd.ValidArgsFunction = mesh.completePods("pod/", cobra.ShellCompDirectiveNoFileComp)
	// --write is what --out was called at first.
	cmd.Flags().SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "write" {
			name = "out"
		}
		return pflag.NormalizedName(name)
	})
	cmd.Flags().StringVar(&socket, "socket", os.Getenv(workloadapi.SocketEnv), "socket (default $"+workloadapi.SocketEnv+")")
	cmd.Flags().BoolVar(&watch, "watch", false, "go on, at every change")
	cmd.Flags().StringVar(&f.dir, "out", "", "directory to write to")
	formats := []string{"table", "json", "yaml", "pem"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		f.format = *format
		if len(args) == 1 {
			ref, ok := parsePodRef(args[0])
			if !ok || watch || cmd.Flags().Changed("socket") {
				return invalidf("%q: want pod/NAME or deploy/NAME, without --socket and --watch; see `%s --help`", args[0], cmd.CommandPath())
			}
			return e.fetchPod(cmd.Context(), mesh, ref, f.dir, *format)
		}
		if err := mesh.unused("a socket"); err != nil {
			return err
		}
		if !watch {
			defer e.progress("waiting for an SVID")()
			got, err := fetchSVIDs(cmd.Context(), socket)
			if err != nil {
				return err
			}
			return f.deliver(got)
		}
		addr, err := socketAddress(socket)
		if err != nil {
			return err
		}
		// A watch that cannot even begin is an error; one that loses its agent waits for it.
		if _, err := fetchSVIDs(cmd.Context(), socket); err != nil {
			return err
		}
		w := &watcher{fetcher: f}
		err = workloadapi.WatchX509Context(cmd.Context(), w, workloadapi.WithAddr(addr))
		if errors.Is(err, context.Canceled) || cmd.Context().Err() != nil {
			err = nil
		}
		return errors.Join(w.failed, err)
	}
	return cmd
}

type watcher struct {
	fetcher fetcher
	failed  error
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	if err := w.fetcher.deliver(c); err != nil {
		w.failed = err
		fmt.Fprintf(w.fetcher.env.err, "castellan: %v\n", err)
		return
	}
	w.failed = nil
}

func (w *watcher) OnX509ContextWatchError(err error) {
	fmt.Fprintf(w.fetcher.env.err, "castellan: the socket does not answer, trying again: %v\n", err)
}

func (f fetcher) deliver(c *workloadapi.X509Context) error {
	svid := c.DefaultSVID()
	if f.dir == "" {
		return f.print(svid.Certificates)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return fmt.Errorf("encode the key: %w", err)
	}
	var roots []*x509.Certificate
	bundle, err := c.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return err
	}
	roots = bundle.X509Authorities()
	if err := os.MkdirAll(f.dir, 0o755); err != nil {
		return fmt.Errorf("--out: %w", err)
	}
	// The key first: whoever sees a new certificate finds its key.
	for _, file := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{
		{"svid_key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600},
		{"svid.pem", encodePEM(svid.Certificates), 0o644},
		{"bundle.pem", encodePEM(roots), 0o644},
	} {
		if err := disk.Write(filepath.Join(f.dir, file.name), file.data, file.mode); err != nil {
			return fmt.Errorf("--out: %w", err)
		}
	}
	fmt.Fprintf(f.env.err, "%s: svid.pem, svid_key.pem, bundle.pem for %s, valid until %s\n", f.dir, svid.ID, svid.Certificates[0].NotAfter.UTC().Format(time.RFC3339))
	return nil
}

func (f fetcher) print(certs []*x509.Certificate) error {
	return f.env.writeChain(certs, time.Now(), f.format) //nolint:forbidigo // a command line reads the real clock
}

func encodePEM(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
