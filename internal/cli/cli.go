// Package cli is the castellan command. Data goes to stdout and talk to stderr;
// exit codes are 0 for yes, 1 for an error, 2 for a negative answer or findings,
// and 3 for invalid input. It may import every other package; none imports it.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"castellan.dev/internal/run"
	"castellan.dev/internal/up"
)

// Exit codes.
const (
	exitOK       = 0
	exitError    = 1
	exitNegative = 2
	exitInvalid  = 3
)

// env is what a command may touch of its surroundings.
type env struct {
	in       io.Reader
	out, err io.Writer
}

// invalidError is a mistake in what was asked: exit code 3.
type invalidError struct{ err error }

func (e *invalidError) Error() string { return e.err.Error() }
func (e *invalidError) Unwrap() error { return e.err }

func invalidf(format string, args ...any) error {
	return &invalidError{fmt.Errorf(format, args...)}
}

// errNegative is a negative answer that has been printed already: exit code 2.
var errNegative = errors.New("negative answer")

// Main runs the command line and returns the exit code.
func Main(args []string, in io.Reader, out, errw io.Writer) int {
	ctx, stop := run.WithSignals(context.Background())
	defer stop()
	e := &env{in: in, out: out, err: errw}
	root := e.root(filepath.Base(args[0]))
	root.SetArgs(args[1:])
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errw)
	return e.exitCode(root.ExecuteContext(ctx))
}

// exitCode prints the error, if it has not been printed, and says what it amounts to.
func (e *env) exitCode(err error) int {
	var invalid *invalidError
	var input *up.InputError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errNegative):
		return exitNegative
	case errors.As(err, &invalid), errors.As(err, &input):
		fmt.Fprintf(e.err, "castellan: %v\n", err)
		return exitInvalid
	default:
		fmt.Fprintf(e.err, "castellan: %v\n", err)
		return exitError
	}
}

func (e *env) root(name string) *cobra.Command {
	// kubectl runs plugins as kubectl-NAME; help then shows what the user types.
	use := name
	if plugin, ok := strings.CutPrefix(name, "kubectl-"); ok {
		use = "kubectl " + plugin
	}
	root := &cobra.Command{
		Use:           "castellan",
		Short:         "Identities, certificates and access policy for workloads",
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: use},
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return invalidf("unknown command %q; see `%s --help`", args[0], cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return invalidf("%w; see `%s --help`", err, cmd.CommandPath())
	})
	root.AddCommand(e.upCommand(), e.certCommand(), e.authzCommand(), e.caCommand(), e.checkCommand(), e.versionCommand(), e.sampleAppCommand())
	wrapArgs(root)
	return root
}

// wrapArgs makes every complaint about arguments one about input, with exit code 3.
func wrapArgs(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			err := check(cmd, args)
			var invalid *invalidError
			if err == nil || errors.As(err, &invalid) {
				return err
			}
			return invalidf("%w; see `%s --help`", err, cmd.CommandPath())
		}
	}
	for _, sub := range cmd.Commands() {
		wrapArgs(sub)
	}
}

// group is a command that only holds others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return invalidf("unknown command %q; see `%s --help`", args[0], cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(subs...)
	return cmd
}

// color reports whether to color what goes to w: a terminal, and NO_COLOR not set (no-color.org).
func color(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
