// Package layout says where everything of a test cluster is: its directories and its
// addresses. The launcher and the daemon agree through it.
//
// Addresses are the same in every cluster: each has network namespaces of its own,
// with no route between them or out.
package layout

import (
	"fmt"
	"path/filepath"
)

// Addresses of the control plane, on the bridge that joins it to the nodes.
const (
	Control4  = "10.240.0.1"
	Control6  = "fd00:240::1"
	Services4 = "10.96.0.0/16"
	Services6 = "fd00:96::/112"
	Kube4     = "10.96.0.1" // the service "kubernetes": the first of the range
	Pods4     = "10.244.0.0/16"
	Pods6     = "fd00:244::/48"
	APIPort   = 6443
)

// PauseImage holds a pod's namespaces.
const PauseImage = "docker.io/local/pause:1"

// Options is what the launcher tells the daemon.
type Options struct {
	Name string // unique on the machine: cgroups have it
	Dir  string
	// Nodes are the names of the nodes.
	Nodes []string
	// Kube, Etcd and CoreDNS are directories of binaries.
	Kube, Etcd, CoreDNS string
	// LoopbackPort is where the API server answers outside the namespaces.
	LoopbackPort int
	// FeatureGates are given to the API server, the controller manager and the
	// kubelets; RuntimeConfig to the API server.
	FeatureGates  map[string]bool
	RuntimeConfig map[string]string
}

// Path is a file or folder of the cluster.
func (o Options) Path(elem ...string) string {
	return filepath.Join(append([]string{o.Dir}, elem...)...)
}

// Cgroup is the cluster's cgroup in each hierarchy, with one below it per node.
func (o Options) Cgroup() string { return "/" + Cgroup(o.Name) }

// Cgroup is the name of a cluster's cgroup.
func Cgroup(name string) string { return "castellan-" + name }

// A Node is one node's addresses.
type Node struct {
	Name         string
	IP4, IP6     string
	Pods4, Pods6 string
}

// NodeAt is the i-th node, counted from 0.
func NodeAt(i int, name string) Node {
	return Node{
		Name:  name,
		IP4:   fmt.Sprintf("10.240.0.%d", 11+i),
		IP6:   fmt.Sprintf("fd00:240::%d", 11+i),
		Pods4: fmt.Sprintf("10.244.%d.0/24", 1+i),
		Pods6: fmt.Sprintf("fd00:244:0:%d::/64", 1+i),
	}
}

// Ready is what the daemon reports when the cluster is ready, or why it never will be.
type Ready struct {
	Error string `json:",omitempty"`
	// Holders are, by node, the process that holds the node's namespaces, numbered
	// as the cluster's own PID namespace does.
	Holders map[string]int `json:",omitempty"`
}
