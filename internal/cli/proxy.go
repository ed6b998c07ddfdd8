package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// watchEvery is how often a watch looks again.
const watchEvery = time.Second

func (e *env) proxyCommand() *cobra.Command {
	return group("proxy", "Show proxies", e.proxyStatusCommand())
}

// proxyQuery is what was asked of proxy status.
type proxyQuery struct {
	env    *env
	target *target
	// pod, if not empty, and namespace, if not empty, are the only ones wanted.
	pod, namespace string
	format         string
}

func (e *env) proxyStatusCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "status [POD]",
		Short: "Show every proxy: its certificate, and whether it follows the server",
		Long: `Show every proxy, or that of one pod (NAME, pod/NAME or NAMESPACE/NAME): the certificate
that it is served, and whether it has acknowledged the policy that it is offered. Exit
code 2 unless each is SYNCED; else it is
  NACKED       it refused what it was sent, and says why
  DENIES       everything, because a policy that may select it was refused
  EXPIRED      its certificate ran out
  AWAY         no proxy follows the workload's policy
  STALE        it has not acknowledged the version that is offered
  UNCERTIFIED  its agent has no certificate for it

` + howTargeted,
		Example: `  castellan proxy status
  castellan proxy status orders-7d4b9 -n shop -o yaml
  castellan proxy status -n shop --watch`,
		Args: cobra.MaximumNArgs(1),
	}
	target := e.targetFlags(cmd)
	cmd.ValidArgsFunction = target.kube.completePods("", cobra.ShellCompDirectiveNoFileComp)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on: print a line whenever one changes, until Ctrl-C")
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		if watch && *format != "table" {
			return invalidf("--watch prints lines, not %s", *format)
		}
		q := &proxyQuery{env: e, target: target, format: *format}
		if err := q.read(args); err != nil {
			return err
		}
		if watch {
			return q.watch(cmd.Context())
		}
		return q.once(cmd.Context())
	}
	return cmd
}

// read takes the arguments. A pod's namespace is that of its name, of -n or of the
// context; all pods are those of -n, or of all namespaces.
func (q *proxyQuery) read(args []string) error {
	q.namespace = *q.target.kube.flags.Namespace
	if len(args) == 0 {
		return nil
	}
	name := args[0]
	if ref, ok := parsePodRef(name); ok && ref.kind == "pod" {
		name = ref.name
	}
	if ns, pod, ok := strings.Cut(name, "/"); ok {
		if q.namespace != "" && q.namespace != ns {
			return invalidf("%q is not in namespace %q, which -n names", args[0], q.namespace)
		}
		q.namespace, name = ns, pod
	}
	if name == "" || strings.Contains(name, "/") {
		return invalidf("%q names no pod; want NAME, pod/NAME or NAMESPACE/NAME", args[0])
	}
	q.pod = name
	if q.namespace == "" {
		var err error
		q.namespace, err = q.target.kube.namespace()
		return err
	}
	return nil
}

func (q *proxyQuery) ask(ctx context.Context) ([]proxyView, error) {
	ctx, cancel := context.WithTimeout(ctx, tunnelTimeout)
	defer cancel()
	conn, err := q.target.server(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return q.among(proxies(ctx, conn))
}

// among leaves what was asked for.
func (q *proxyQuery) among(all []proxyView, err error) ([]proxyView, error) {
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(p proxyView) bool {
		return q.namespace != "" && p.Namespace != q.namespace || q.pod != "" && p.Pod != q.pod && p.ServiceAccount != q.pod
	}), nil
}

func (q *proxyQuery) once(ctx context.Context) error {
	stop := q.env.progress("asking the server")
	all, err := q.ask(ctx)
	stop()
	if err != nil {
		return err
	}
	if len(all) == 0 {
		if q.pod != "" {
			return invalidf("the server knows no proxy of pod %s/%s; is it in the mesh (label security.istio.io/tlsMode=istio), and was its namespace labelled for injection before it was made?", q.namespace, q.pod)
		}
		fmt.Fprintln(q.env.err, "castellan: there is no proxy")
	}
	if q.format != "table" {
		err = writeData(q.env.out, q.format, all)
	} else {
		err = q.table(all)
	}
	if err == nil && slices.ContainsFunc(all, func(p proxyView) bool { return !p.ok() }) {
		err = errNegative
	}
	return err
}

func (q *proxyQuery) table(all []proxyView) error {
	t := tableWriter{w: q.env.out, rows: [][]string{proxyHeader()}}
	now := time.Now() //nolint:forbidigo // a command line reads the real clock
	for i := range all {
		if err := t.add(all[i].cells(now)...); err != nil {
			return err
		}
	}
	return t.flush()
}

// watch prints what changes. It goes on when the server or the way to it is away.
func (q *proxyQuery) watch(ctx context.Context) error {
	t := tableWriter{w: q.env.out, rows: [][]string{proxyHeader()}}
	var conn *admin
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	seen := map[string]proxyView{}
	first, said := true, ""
	for {
		all, err := q.again(ctx, &conn)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && first:
			return err // a watch that cannot even begin
		case err != nil && err.Error() != said:
			said = err.Error()
			fmt.Fprintf(q.env.err, "castellan: trying again: %v\n", err)
		case err == nil:
			first, said = false, ""
			if err := changes(&t, seen, all); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchEvery):
		}
	}
}

// again asks over the connection there is, or a new one.
func (q *proxyQuery) again(ctx context.Context, conn **admin) ([]proxyView, error) {
	ctx, cancel := context.WithTimeout(ctx, tunnelTimeout)
	defer cancel()
	if *conn == nil {
		made, err := q.target.server(ctx)
		if err != nil {
			return nil, err
		}
		*conn = made
	}
	all, err := q.among(proxies(ctx, *conn))
	if err != nil {
		(*conn).Close()
		*conn = nil
	}
	return all, err
}

// changes writes the rows that are new or have changed, and remembers them.
func changes(t *tableWriter, seen map[string]proxyView, all []proxyView) error {
	now := time.Now() //nolint:forbidigo // a command line reads the real clock
	there := map[string]bool{}
	for _, p := range all {
		there[p.PodUID] = true
		before, known := seen[p.PodUID]
		seen[p.PodUID] = p
		if known && before.State == p.State && before.Reason == p.Reason && before.Serial == p.Serial && before.Offered == p.Offered && before.Acknowledged == p.Acknowledged {
			continue
		}
		if err := t.add(p.cells(now)...); err != nil {
			return err
		}
	}
	for uid, p := range seen {
		if there[uid] {
			continue
		}
		delete(seen, uid)
		p.State, p.Reason = "GONE", ""
		if err := t.add(p.cells(now)...); err != nil {
			return err
		}
	}
	return t.flush()
}
