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
	"sync"

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
	// command is how the user calls us, plugin that this is as kubectl's.
	command string
	plugin  bool
}

// sharedWriter takes lines from several goroutines.
type sharedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *sharedWriter) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(b)
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
	return runMain(ctx, args, in, out, errw)
}

func runMain(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	errw = &sharedWriter{w: errw} // progress is said while the work goes on
	e := &env{in: in, out: out, err: errw, command: args[0]}
	name := filepath.Base(args[0])
	// kubectl runs plugins as kubectl-NAME; help then shows what the user types.
	if plugin, ok := strings.CutPrefix(name, "kubectl-"); ok {
		name = "kubectl " + plugin
		e.command, e.plugin = name, true
	}
	root := e.root(name)
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
	root := &cobra.Command{
		Use:           "castellan",
		Short:         "Identities, certificates and access policy for workloads",
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: name},
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noneOf,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return invalidf("%w; see `%s --help`", err, cmd.CommandPath())
	})
	root.AddCommand(e.upCommand(), e.certCommand(), e.authzCommand(), e.proxyCommand(), e.caCommand(), e.checkCommand(), e.installCommand(), e.uninstallCommand(), e.versionCommand(), e.sampleAppCommand())
	root.Version = Version
	root.SetVersionTemplate("castellan {{.Version}}\n")
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	strictGroups(root)
	wrapArgs(root)
	return root
}

// strictGroups gives the commands that cobra adds the manners of our own: what
// they do not know is a mistake, not a reason to print help and call it success.
func strictGroups(root *cobra.Command) {
	for _, cmd := range root.Commands() {
		switch cmd.Name() {
		case "completion":
			cmd.Short = "Print a completion script for a shell"
			cmd.Args, cmd.RunE = noneOf, func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		case "help":
			cmd.Args = func(cmd *cobra.Command, args []string) error {
				if _, rest, err := root.Find(args); err != nil || len(rest) > 0 {
					return invalidf("there is no help on %q; see `%s --help`", strings.Join(args, " "), root.CommandPath())
				}
				return nil
			}
		}
	}
}

// noneOf refuses arguments of a command that only holds others.
func noneOf(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := ""
	cmd.SuggestionsMinimumDistance = 2
	if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
		hint = fmt.Sprintf(" (did you mean %s?)", strings.Join(like, ", "))
	}
	return invalidf("unknown command %q%s; see `%s --help`", args[0], hint, cmd.CommandPath())
}

// noArgs refuses arguments of a command that takes flags only.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return invalidf("unexpected argument %q; see `%s --help`", args[0], cmd.CommandPath())
	}
	return nil
}

// oneArg wants exactly one argument, and says what it is.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return invalidf("%d arguments given; give one, %s; see `%s --help`", len(args), what, cmd.CommandPath())
		}
		return nil
	}
}

const certSource = "a file, -, HOST:PORT or unix:SOCKET"

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
		Args: noneOf,
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
