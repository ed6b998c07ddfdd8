// Package workloads says which pods exist, as whom, on which node, and which
// services there are. Off Kubernetes it reads that from the workloads file, where
// removing an entry is deleting the pod; on Kubernetes internal/kube fills in the
// same structs.
//
// It refuses a file with any unknown, duplicate or malformed field, whole, and
// then keeps the last good one. It assumes that whoever may write the file may
// decide who exists.
package workloads

import "castellan.dev/identity"

// File is one reading of the file. It is immutable.
type File struct {
	Workloads []Workload
	Services  []Service
	// Resolved: a workload's Ports are all that is declared about it, and an
	// endpoint serves the ports that it lists and no other. Without it, as in a file
	// that people write, what is left out is the obvious.
	Resolved bool
}

// Workload is one pod.
type Workload struct {
	Namespace         string            `json:"namespace"`
	ServiceAccount    string            `json:"serviceAccount"`
	PodUID            string            `json:"podUID"`
	PodName           string            `json:"podName,omitempty"`
	ServiceAccountUID string            `json:"serviceAccountUID,omitempty"`
	Node              string            `json:"node"`
	Labels            map[string]string `json:"labels,omitempty"`
	// Address is the IP address or name others reach it at.
	Address string `json:"address,omitempty"`
	Ports   []Port `json:"ports,omitempty"`
	// OutsideMesh: no proxy stands before it. It is told no policy, and others
	// speak to it in the clear where the mesh settings allow that.
	OutsideMesh bool `json:"outsideMesh,omitempty"`
	// Addresses are its further addresses (of the other family).
	Addresses []string `json:"-"`
	// Revision, unless 0, is another whenever anything here is.
	Revision uint64 `json:"-"`
}

// Account returns the workload's namespace and service account.
func (w *Workload) Account() identity.Account {
	// Parse has checked both.
	a, _ := identity.NewAccount(w.Namespace, w.ServiceAccount)
	return a
}

// Port is a port the workload listens on.
type Port struct {
	Number uint16 `json:"number"`
	// Protocol is http, http2, grpc, tcp, tls, https or empty (told apart by first bytes).
	Protocol string `json:"protocol,omitempty"`
}

// Service is one destination.
type Service struct {
	Namespace       string        `json:"namespace"`
	Name            string        `json:"name"`
	Hosts           []string      `json:"hosts,omitempty"`
	Addresses       []string      `json:"addresses,omitempty"`
	Ports           []ServicePort `json:"ports"`
	Endpoints       []Endpoint    `json:"endpoints,omitempty"`
	SubjectAltNames []string      `json:"subjectAltNames,omitempty"`
	// Accounts, unless nil, are those that may answer for the service, besides
	// SubjectAltNames; nil: those of its endpoints. An endpoint of any other account
	// is refused by whoever calls it.
	Accounts []identity.Account `json:"-"`
	// Revision, unless 0, is another whenever anything here is, or the account of a
	// workload that it names.
	Revision uint64 `json:"-"`
}

// ServicePort is a port of a service.
type ServicePort struct {
	Name     string `json:"name,omitempty"`
	Number   uint16 `json:"number"`
	Protocol string `json:"protocol,omitempty"`
}

// Endpoint is a workload behind a service, or an address that is no workload's.
type Endpoint struct {
	// Workload is its pod UID; empty for an address that is no workload's.
	Workload string `json:"workload"`
	// Ports maps a service port to the port on the workload's address.
	Ports map[uint16]uint16 `json:"ports,omitempty"`
	// Address is where it is; empty: the workload's Address.
	Address string `json:"-"`
	// OutsideMesh: no proxy of the mesh answers there. Unless the file is Resolved, a
	// workload's OutsideMesh says the same of its endpoints.
	OutsideMesh bool `json:"-"`
}
