package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"castellan.dev/internal/config"
	"castellan.dev/internal/telemetry"
	"castellan.dev/internal/up"
)

func (e *env) upCommand() *cobra.Command {
	cfg := up.Config{}
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run a whole mesh on this machine, with four sample workloads",
		Long: `Run server, token issuer, agent and a sample mesh of real processes on loopback,
in the foreground until Ctrl-C. State stays in the data directory: the next start
has the same root, the same trust and the same ports.`,
		Args: noArgs,
	}
	f := cmd.Flags()
	f.StringVar(&cfg.DataDir, "data-dir", up.DefaultDataDir, "directory of all state")
	f.StringVar(&cfg.TrustDomain, "trust-domain", "cluster.local", "trust domain of the mesh")
	f.DurationVar(&cfg.SVIDTTL, "svid-ttl", 0, "lifetime of workload certificates, 5s to 24h (default 1h)")
	f.StringVar(&cfg.PolicyDir, "policy-dir", "", "directory of policies (default: DATA-DIR/policy, filled with samples)")
	format := outputFlag(cmd, "table", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*format, "table", "json"); err != nil {
			return err
		}
		if cmd.Flags().Changed("svid-ttl") && cfg.SVIDTTL == 0 {
			return invalidf("--svid-ttl: 0 is no lifetime; give 5s to 24h")
		}
		cfg.Log = telemetry.NewLogger(e.err, config.Log{Level: "warn", Format: "text"})
		cfg.Progress = e.err
		var printErr error
		ctx, cancel := context.WithCancel(cmd.Context())
		defer cancel()
		cfg.Ready = func(file up.File) {
			if *format == "json" {
				printErr = writeData(e.out, "json", file)
			} else {
				printErr = file.Describe(e.out, e.command, upFile(cfg.DataDir))
			}
			if printErr != nil {
				cancel()
			}
		}
		return errors.Join(up.Run(ctx, cfg), printErr)
	}
	return cmd
}

// upFile returns the absolute path of a data directory's up.json.
func upFile(dir string) string {
	path, err := filepath.Abs(filepath.Join(dir, "up.json"))
	if err != nil {
		return filepath.Join(dir, "up.json")
	}
	return path
}

// upFlag adds --up to a command that needs a running mesh.
func upFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("up", filepath.Join(up.DefaultDataDir, "up.json"), "up.json of a running mesh")
}

// sampleAppCommand is the application of a sample workload: 200 and 1,024 bytes to everything.
func (e *env) sampleAppCommand() *cobra.Command {
	var listen, name string
	cmd := &cobra.Command{Use: "sample-app", Hidden: true, Args: noArgs, Short: "Run the application of a sample workload"}
	cmd.Flags().StringVar(&listen, "listen", "", "host:port")
	cmd.Flags().StringVar(&name, "name", "", "workload")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		l, err := net.Listen("tcp", listen)
		if err != nil {
			return fmt.Errorf("sample app: %w", err)
		}
		body := []byte(fmt.Sprintf("hello from %s\n", name))
		body = append(body, strings.Repeat(".", 1023-len(body))+"\n"...)
		length := strconv.Itoa(len(body))
		var protocols http.Protocols
		protocols.SetHTTP1(true)
		protocols.SetUnencryptedHTTP2(true)
		server := &http.Server{
			ReadHeaderTimeout: 10 * time.Second,
			Protocols:         &protocols,
			Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/plain")
				w.Header().Set("Content-Length", length)
				_, _ = w.Write(body)
			}),
		}
		stop := context.AfterFunc(cmd.Context(), func() { server.Close() })
		defer stop()
		if err := server.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("sample app: %w", err)
		}
		return nil
	}
	return cmd
}

// progress prints a line to stderr when work takes longer than two seconds.
func (e *env) progress(what string) (stop func()) {
	t := time.AfterFunc(2*time.Second, func() { fmt.Fprintf(e.err, "%s …\n", what) })
	return func() { t.Stop() }
}
