package config

import (
	"errors"
	"fmt"
	"net"

	"castellan.dev/identity"
)

// maxSocketPath is what the kernel takes in sockaddr_un, less the final NUL.
const maxSocketPath = 107

// Agent configures castellan-agent.
type Agent struct {
	Header `json:",inline"`

	// TrustDomain is the mesh's own.
	TrustDomain string `json:"trustDomain"`
	// Node is this node's name, as in the tokens' node claim.
	Node string `json:"node"`
	// Cluster goes with every request as clusterid; default "Kubernetes".
	Cluster string `json:"cluster,omitempty"`
	// TokenFile holds the agent's own token; read again for every use.
	TokenFile string       `json:"tokenFile"`
	Server    ServerTarget `json:"server"`
	// Admin is the host:port of /livez, /readyz and /metrics; default 127.0.0.1:15015.
	Admin     string          `json:"admin,omitempty"`
	Workloads []AgentWorkload `json:"workloads,omitempty"`
	Log       Log             `json:"log,omitzero"`
}

// ServerTarget is where the server is and how it is known.
type ServerTarget struct {
	Address string `json:"address"`
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
	for _, f := range []struct{ field, value string }{
		{"node", a.Node}, {"tokenFile", a.TokenFile}, {"server.address", a.Server.Address}, {"server.bundleFile", a.Server.BundleFile},
	} {
		if f.value == "" {
			return fmt.Errorf("%s: required", f.field)
		}
	}
	host, _, err := net.SplitHostPort(a.Server.Address)
	if err != nil {
		return fmt.Errorf("server.address: %w", err)
	}
	setDefault(&a.Server.Name, host)
	if _, _, err := net.SplitHostPort(a.Admin); err != nil {
		return fmt.Errorf("admin: %w", err)
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
