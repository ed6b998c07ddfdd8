package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/strvals"

	"castellan.dev/internal/install"
	"castellan.dev/internal/kube"
)

// installFlags are what the commands about an installation have in common.
type installFlags struct {
	kube      *kubeFlags
	namespace string
	timeout   time.Duration
}

func addInstallFlags(cmd *cobra.Command, timeout time.Duration) *installFlags {
	f := &installFlags{kube: addKubeFlags(cmd)}
	cmd.Flags().StringVarP(&f.namespace, "namespace", "n", install.DefaultNamespace, "namespace that Castellan lives in")
	cmd.Flags().DurationVar(&f.timeout, "timeout", timeout, "how long all of it may take")
	return f
}

func (f *installFlags) check() error {
	if f.timeout <= 0 {
		return invalidf("--timeout: %v is no time", f.timeout)
	}
	return nil
}

// installer makes one that says on stderr what it does.
func (e *env) installer(f *installFlags) (*install.Installer, error) {
	client, err := f.kube.open(f.namespace)
	if err != nil {
		return nil, err
	}
	return e.installerOn(client)
}

func (e *env) installerOn(client *kube.Client) (*install.Installer, error) {
	return install.New(install.Config{
		Dynamic: client.Dynamic(), Kubernetes: client.Kubernetes(), Namespace: client.Namespace(),
		Progress: func(line string) { fmt.Fprintln(e.err, visible(line)) },
	})
}

// valueFlags are Helm's own flags for the chart's values.
type valueFlags struct{ files, sets, setStrings []string }

func addValueFlags(cmd *cobra.Command) *valueFlags {
	v := &valueFlags{}
	cmd.Flags().StringArrayVarP(&v.files, "values", "f", nil, "`FILE` with values, or - for standard input; may be repeated, the last wins")
	cmd.Flags().StringArrayVar(&v.sets, "set", nil, "set a value: `NAME=VALUE`, NAME.INNER=VALUE; may be repeated")
	cmd.Flags().StringArrayVar(&v.setStrings, "set-string", nil, "set a value that is a string whatever it looks like: `NAME=VALUE`")
	return v
}

func (v *valueFlags) given() bool { return len(v.files)+len(v.sets)+len(v.setStrings) > 0 }

// read reads what the flags say, in Helm's order: files first.
func (v *valueFlags) read(stdin io.Reader) (map[string]any, error) {
	values := map[string]any{}
	for _, name := range v.files {
		more, err := readValues(name, stdin)
		if err != nil {
			return nil, invalidf("--values: %w", err)
		}
		values = loader.MergeMaps(values, more)
	}
	for _, s := range v.sets {
		if err := strvals.ParseInto(s, values); err != nil {
			return nil, invalidf("--set %q: %w", s, err)
		}
	}
	for _, s := range v.setStrings {
		if err := strvals.ParseIntoString(s, values); err != nil {
			return nil, invalidf("--set-string %q: %w", s, err)
		}
	}
	return values, nil
}

// maxValues is the largest file of values that is read.
const maxValues = 4 << 20

func readValues(name string, stdin io.Reader) (map[string]any, error) {
	in := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxValues+1))
	if err == nil && len(data) > maxValues {
		err = fmt.Errorf("more than %d bytes", maxValues)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	values, err := loader.LoadValues(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return values, nil
}

func (e *env) installCommand() *cobra.Command {
	var dryRun, wait, skipChecks bool
	var kubeVersion string
	cmd := &cobra.Command{
		Use: "install", Short: "Put Castellan into a cluster, or change it there in place", Args: noArgs,
		Long: `Put Castellan into a Kubernetes cluster, or change it in place: the same command
installs, upgrades and changes settings. It applies the Helm chart that it carries,
waits until every part is ready, and ends with the checks of "castellan check".

Settings are the chart's values; what a run does not give has its default again.
Secrets and volumes of a former installation are used as they are.`,
		Example: `  castellan install
  castellan install -f values.yaml --set mesh.trustDomain=example.org
  castellan install --dry-run > castellan.yaml`,
	}
	flags := addInstallFlags(cmd, 5*time.Minute)
	from := addValueFlags(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print what would be applied; needs no cluster")
	cmd.Flags().StringVar(&kubeVersion, "kube-version", install.TestedKubernetes, "version of the cluster, for --dry-run")
	cmd.Flags().BoolVar(&wait, "wait", true, "wait for each part to be ready before the next, and check at the end")
	cmd.Flags().BoolVar(&skipChecks, "skip-checks", false, "install although a check before it fails")
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := errors.Join(flags.check(), checkOutput(*format, formats...)); err != nil {
			return err
		}
		values, err := from.read(e.in)
		if err != nil {
			return err
		}
		opts := install.Options{Namespace: flags.namespace, Values: values, KubeVersion: kubeVersion}
		if dryRun {
			r, err := renderChart(opts)
			if err != nil {
				return err
			}
			return r.Write(e.out)
		}
		if cmd.Flags().Changed("kube-version") {
			return invalidf("--kube-version: the cluster is asked for its version; the flag is for --dry-run")
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), flags.timeout)
		defer cancel()
		results, err := e.install(ctx, flags, opts, wait, skipChecks)
		if err != nil || results == nil {
			return err
		}
		return e.report(results, *format)
	}
	return cmd
}

// report prints the outcomes of checks; it fails when one of them did.
func (e *env) report(results []checkResult, format string) error {
	var err error
	if format != "table" {
		err = writeData(e.out, format, results)
	} else {
		err = e.printChecks(results)
	}
	if err == nil && failed(results) {
		err = errNegative
	}
	return err
}

// install returns the outcomes of the checks that did not let it begin, or of those
// at its end.
func (e *env) install(ctx context.Context, flags *installFlags, opts install.Options, wait, skipChecks bool) ([]checkResult, error) {
	in, err := e.installer(flags)
	if err != nil {
		return nil, err
	}
	if opts.KubeVersion, err = in.KubeVersion(); err != nil {
		return nil, err
	}
	r, err := renderChart(opts)
	if err != nil {
		return nil, err
	}
	if !skipChecks {
		bad := slices.DeleteFunc(in.Precheck(ctx, r), func(r checkResult) bool { return r.Status == checkOK })
		if failed(bad) {
			return bad, nil
		}
		for _, warning := range bad {
			fmt.Fprintf(e.err, "warning: %s: %s (%s)\n", visible(warning.Check), visible(warning.Message), visible(warning.Hint))
		}
	}
	if err := in.Install(ctx, r, wait); err != nil || !wait {
		return nil, err
	}
	return in.Check(ctx), nil
}

func failed(results []checkResult) bool {
	return slices.ContainsFunc(results, func(r checkResult) bool { return r.Status == checkFail })
}

// renderChart makes a mistake in the values one of input.
func renderChart(opts install.Options) (*install.Rendered, error) {
	r, err := install.Render(opts)
	var values *install.ValuesError
	if errors.As(err, &values) {
		return nil, invalidf("%w", err)
	}
	return r, err
}
