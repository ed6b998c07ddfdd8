package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/install"
	"castellan.dev/internal/kube"
)

// preFlags are those of check --pre: what would be installed.
type preFlags struct {
	asked  bool
	values *valueFlags
}

func addPreFlags(cmd *cobra.Command) *preFlags {
	p := &preFlags{values: addValueFlags(cmd)}
	cmd.Flags().BoolVar(&p.asked, "pre", false, "check whether the cluster can take Castellan (with these values)")
	return p
}

func (p *preFlags) check() error {
	if !p.asked && p.values.given() {
		return invalidf("--values and --set are of what would be installed: they go with --pre")
	}
	return nil
}

// cluster makes the clients of the cluster that is meant. -n names Castellan's own
// namespace, too: these commands have no other to name.
func (t *target) cluster() (*kube.Client, error) {
	namespace := t.kube.castellan
	if own := t.kube.flags.Namespace; own != nil && *own != "" && !t.cmd.Flags().Changed("castellan-namespace") {
		namespace = *own
	}
	return t.kube.open(namespace)
}

// checkBefore checks whether the cluster can take what would be installed.
func (e *env) checkBefore(ctx context.Context, t *target, pre *preFlags) ([]checkResult, error) {
	client, err := t.cluster()
	if err != nil {
		return nil, err
	}
	in, err := e.installerOn(client)
	if err != nil {
		return nil, err
	}
	values, err := pre.values.read(e.in)
	if err != nil {
		return nil, err
	}
	version, err := in.KubeVersion()
	if err != nil {
		return nil, err
	}
	r, err := renderChart(install.Options{Namespace: client.Namespace(), Values: values, KubeVersion: version})
	if err != nil {
		return nil, err
	}
	return in.Precheck(ctx, r), nil
}

// checkCluster checks what is installed: by what the API server knows, then by what
// the server itself says.
func (e *env) checkCluster(ctx context.Context, t *target) ([]checkResult, error) {
	client, err := t.cluster()
	if err != nil {
		return nil, err
	}
	in, err := e.installerOn(client)
	if err != nil {
		return nil, err
	}
	results := in.Check(ctx)
	for _, r := range results {
		if r.Check == install.ServerCheck && r.Status == checkOK {
			return append(results, askServer(ctx, client)...), nil
		}
	}
	return results, nil
}

// askServer asks the server in its pod for its certificates and for the proxies that
// have not taken what they were sent. Who may not run programs in the pod gets a
// warning: the rest of the check stands.
func askServer(ctx context.Context, client *kube.Client) []checkResult {
	const hint = "it needs the permission to create pods/exec in Castellan's namespace"
	c := &checker{ctx: ctx}
	conn, err := tunnelled(client.DialServer(ctx))
	if err != nil {
		c.add("server's own word", checkWarn, err.Error(), hint)
		return c.results
	}
	defer conn.Close()
	c.authoritiesOf(conn, hint)
	resp, err := castellanv1.NewDiscoveryAdminClient(conn).Policies(ctx, &castellanv1.PoliciesRequest{})
	if err != nil {
		c.add("proxies", checkWarn, conn.failed(err).Error(), hint)
		return c.results
	}
	each := &checker{ctx: ctx}
	for _, w := range resp.GetWorkloads() {
		each.programmed(w)
	}
	good := 0
	for _, r := range each.results {
		if r.Status == checkOK {
			good++
			continue
		}
		c.results = append(c.results, r)
	}
	c.add("proxies", checkOK, fmt.Sprintf("%d of %s acknowledged their policy", good, count(len(resp.GetWorkloads()), "workload")), "")
	return c.results
}
