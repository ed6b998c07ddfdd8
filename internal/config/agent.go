package config

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"castellan.dev/identity"
)

// maxSocketPath is what the kernel takes in sockaddr_un, less the final NUL.
const maxSocketPath = 107

// Agent configures castellan-agent.
type Agent struct {
	Header `json:",inline"`

	// TrustDomain is the mesh's own.
	TrustDomain string `json:"trustDomain"`
	// Node is this node's name, as in the tokens' node claim; default: what the
	// environment variable NODE_NAME says.
	Node string `json:"node,omitempty"`
	// Cluster goes with every request as clusterid; default "Kubernetes".
	Cluster string `json:"cluster,omitempty"`
	// TokenFile holds the agent's own token; read again for every use.
	TokenFile string       `json:"tokenFile"`
	Server    ServerTarget `json:"server"`
	// Admin is the host:port of /livez, /readyz and /metrics; default 127.0.0.1:15015.
	Admin string `json:"admin,omitempty"`
	// AdminSocket is the Unix socket of the operator's service; default with csi
	// /run/castellan/admin.sock, without it there is none.
	AdminSocket string `json:"adminSocket,omitempty"`
	// Workloads are those off Kubernetes.
	Workloads []AgentWorkload `json:"workloads,omitempty"`
	// CSI serves the pods of a Kubernetes node.
	CSI *AgentCSI `json:"csi,omitempty"`
	Log Log       `json:"log,omitzero"`
}

// AgentCSI is the kubelet's side of the agent.
type AgentCSI struct {
	// KubeletDir is the kubelet's root directory, by the path that the kubelet uses;
	// default /var/lib/kubelet.
	KubeletDir string `json:"kubeletDir,omitempty"`
	// StateDir keeps pods' tokens for the agent after this one, and should be on a
	// tmpfs of the node; default /run/castellan/agent.
	StateDir string `json:"stateDir,omitempty"`
	// Audience of the tokens in the volumes, one of those that the server takes;
	// default castellan.dev.
	Audience string `json:"audience,omitempty"`
}

// ServerTarget is where the server is and how it is known.
type ServerTarget struct {
	Address string `json:"address"`
	// Fallback is another host:port of it, tried where Address does not answer. Default
	// with csi: the address of the Service castellan-server as the kubelet gives it to
	// pods (CASTELLAN_SERVER_SERVICE_HOST), so that an agent does not wait for the
	// cluster's DNS, which may itself wait for nodes with a ready agent.
	Fallback string `json:"fallback,omitempty"`
	// Name is checked in the server's certificate; default: Address's host.
	Name string `json:"name,omitempty"`
	// BundleFile holds the roots as PEM; read again when it changes.
	BundleFile string `json:"bundleFile"`
}

// AgentWorkload is one workload off Kubernetes: its socket, who may use it, and its token.
type AgentWorkload struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	Socket         string `json:"socket"`
	// UIDs that may connect; an empty list admits nobody.
	UIDs      []uint32 `json:"uids"`
	TokenFile string   `json:"tokenFile"`
}

// Validate fills defaults and checks what can be checked without opening anything.
func (a *Agent) Validate() error {
	if err := a.check("AgentConfig"); err != nil {
		return err
	}
	setDefault(&a.Cluster, "Kubernetes")
	setDefault(&a.Admin, "127.0.0.1:15015")
	if _, err := identity.ParseTrustDomain(a.TrustDomain); err != nil {
		return fmt.Errorf("trustDomain: %w", err)
	}
	setDefault(&a.Node, os.Getenv("NODE_NAME"))
	for _, f := range []struct{ field, value string }{
		{"node", a.Node}, {"tokenFile", a.TokenFile}, {"server.address", a.Server.Address}, {"server.bundleFile", a.Server.BundleFile},
	} {
		if f.value == "" {
			return fmt.Errorf("%s: required", f.field)
		}
	}
	if err := a.validateServer(); err != nil {
		return err
	}
	if _, _, err := net.SplitHostPort(a.Admin); err != nil {
		return fmt.Errorf("admin: %w", err)
	}
	if err := a.validateCSI(); err != nil {
		return err
	}
	sockets := map[string]bool{}
	for i, w := range a.Workloads {
		if err := w.validate(); err != nil {
			return fmt.Errorf("workloads[%d].%w", i, err)
		}
		if sockets[w.Socket] {
			return fmt.Errorf("workloads[%d].socket: %q is used twice", i, w.Socket)
		}
		sockets[w.Socket] = true
	}
	return a.Log.validate()
}

func (a *Agent) validateServer() error {
	host, port, err := net.SplitHostPort(a.Server.Address)
	if err != nil {
		return fmt.Errorf("server.address: %w", err)
	}
	setDefault(&a.Server.Name, host)
	if service := os.Getenv("CASTELLAN_SERVER_SERVICE_HOST"); a.CSI != nil && service != "" {
		setDefault(&a.Server.Fallback, net.JoinHostPort(service, port))
	}
	if a.Server.Fallback == "" {
		return nil
	}
	if _, _, err := net.SplitHostPort(a.Server.Fallback); err != nil {
		return fmt.Errorf("server.fallback: %w", err)
	}
	return nil
}

func (a *Agent) validateCSI() error {
	if a.CSI != nil {
		setDefault(&a.CSI.KubeletDir, "/var/lib/kubelet")
		setDefault(&a.CSI.StateDir, "/run/castellan/agent")
		setDefault(&a.CSI.Audience, "castellan.dev")
		setDefault(&a.AdminSocket, "/run/castellan/admin.sock")
		for _, f := range []struct{ field, value string }{{"csi.kubeletDir", a.CSI.KubeletDir}, {"csi.stateDir", a.CSI.StateDir}} {
			if !filepath.IsAbs(f.value) || filepath.Clean(f.value) != f.value {
				return fmt.Errorf("%s: %q must be an absolute path in its shortest form", f.field, f.value)
			}
		}
		// The longest socket below it; the kubelet connects by this path.
		if err := CheckSocketPath(filepath.Join(a.CSI.KubeletDir, "plugins_registry", "csi.castellan.dev-reg.sock")); err != nil {
			return fmt.Errorf("csi.kubeletDir: %w", err)
		}
	}
	if a.AdminSocket == "" {
		return nil
	}
	if err := CheckSocketPath(a.AdminSocket); err != nil {
		return fmt.Errorf("adminSocket: %w", err)
	}
	return nil
}

func (w AgentWorkload) validate() error {
	if _, err := identity.NewAccount(w.Namespace, w.ServiceAccount); err != nil {
		return fmt.Errorf("namespace/serviceAccount: %w", err)
	}
	if w.TokenFile == "" {
		return errors.New("tokenFile: required")
	}
	if err := CheckSocketPath(w.Socket); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if len(w.UIDs) == 0 {
		return errors.New("uids: an empty list admits nobody; list the uids that may connect")
	}
	return nil
}

// CheckSocketPath refuses a path that the kernel would (unix(7)).
func CheckSocketPath(path string) error {
	if path == "" {
		return errors.New("required")
	}
	if len(path) > maxSocketPath {
		return fmt.Errorf("%q has %d bytes and the kernel takes %d; choose a shorter directory", path, len(path), maxSocketPath)
	}
	return nil
}
