package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/client-go/rest"

	"castellan.dev/internal/kube"
)

// kubeFlags are kubectl's own flags for which cluster, as whom.
type kubeFlags struct {
	flags   *genericclioptions.ConfigFlags
	command *cobra.Command
	// names of the flags here.
	names []string
}

// rareFlags are there as in kubectl, but help does not list them with every command.
var rareFlags = []string{"as", "as-group", "as-uid", "user", "server", "tls-server-name", "certificate-authority", "request-timeout"}

// addKubeFlags adds them to a command. Like kubectl it reads $KUBECONFIG and
// ~/.kube/config where no flag says otherwise. Flags that would put a secret into
// the process's arguments are left out, and so is the one that makes the API
// server's certificate count for nothing: a kubeconfig has room for all of them.
func addKubeFlags(cmd *cobra.Command) *kubeFlags {
	c := genericclioptions.NewConfigFlags(true)
	c.CacheDir, c.BearerToken, c.CertFile, c.KeyFile, c.Insecure, c.DisableCompression, c.ImpersonateUserExtra = nil, nil, nil, nil, nil, nil, nil
	c.Namespace = nil // install means another one by it than cert inspect
	k := &kubeFlags{flags: c, command: cmd}
	own := pflag.NewFlagSet("cluster", pflag.ContinueOnError)
	c.AddFlags(own)
	for name, usage := range map[string]string{
		"kubeconfig": "kubeconfig `FILE` (default: $KUBECONFIG, ~/.kube/config)",
		"context":    "context of the kubeconfig",
		"cluster":    "cluster of the kubeconfig",
	} {
		own.Lookup(name).Usage = usage
	}
	for _, name := range rareFlags {
		own.Lookup(name).Hidden = true
	}
	k.add(own)
	return k
}

func (k *kubeFlags) add(set *pflag.FlagSet) {
	set.VisitAll(func(f *pflag.Flag) { k.names = append(k.names, f.Name) })
	k.command.Flags().AddFlagSet(set)
}

// given reports whether any of the flags was.
func (k *kubeFlags) given() bool {
	for _, name := range k.names {
		if k.command.Flags().Changed(name) {
			return true
		}
	}
	return false
}

// configured reports whether there is a cluster to be had without any flag.
func (k *kubeFlags) configured() bool {
	raw, err := k.flags.ToRawKubeConfigLoader().RawConfig()
	if err != nil || len(raw.Clusters) > 0 {
		return true // what is wrong with it is said when it is used
	}
	_, err = rest.InClusterConfig()
	return !errors.Is(err, rest.ErrNotInCluster)
}

// restConfig says how the cluster is reached.
func (k *kubeFlags) restConfig() (*rest.Config, error) {
	if !k.configured() && !k.command.Flags().Changed("server") {
		return nil, errors.New("no cluster is configured: set KUBECONFIG, or give --kubeconfig")
	}
	rc, err := k.flags.ToRESTConfig()
	if err != nil {
		return nil, invalidf("which cluster: %w; give --kubeconfig or --context, or set KUBECONFIG", err)
	}
	rc.UserAgent = "castellan/" + Version
	rc.WarningHandler = rest.NoWarnings{}
	return rc, nil
}

// open makes the clients; Castellan's own objects are in namespace.
func (k *kubeFlags) open(namespace string) (*kube.Client, error) {
	rc, err := k.restConfig()
	if err != nil {
		return nil, err
	}
	return kube.New(rc, namespace)
}

// meshFlags are those of a command about what is in the cluster's mesh.
type meshFlags struct {
	*kubeFlags
	// castellan is the namespace of Castellan itself.
	castellan string
}

func addMeshFlags(cmd *cobra.Command) *meshFlags {
	m := &meshFlags{kubeFlags: addKubeFlags(cmd)}
	m.flags.Namespace = new(string)
	own := pflag.NewFlagSet("mesh", pflag.ContinueOnError)
	own.StringVarP(m.flags.Namespace, "namespace", "n", "", "namespace of what is named (default: the context's)")
	own.StringVar(&m.castellan, "castellan-namespace", "castellan-system", "namespace that Castellan is installed in")
	m.add(own)
	return m
}

// client makes the clients; it contacts nobody.
func (m *meshFlags) client() (*kube.Client, error) { return m.open(m.castellan) }

// namespace is the one given, or the context's.
func (m *meshFlags) namespace() (string, error) {
	if *m.flags.Namespace != "" {
		return *m.flags.Namespace, nil
	}
	ns, _, err := m.flags.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return "", fmt.Errorf("which namespace: %w", err)
	}
	return ns, nil
}

// unused refuses the flags where what is asked about is not in a cluster.
func (m *meshFlags) unused(source string) error {
	if m.given() {
		return invalidf("flags of a cluster are for pod/NAME, which %q is not", source)
	}
	return nil
}
