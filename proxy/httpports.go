package proxy

import (
	"castellan.dev/authz"
	"castellan.dev/internal/judge"
)

// httpPorts are the workload ports that have rules about HTTP.
type httpPorts struct{ judge.HTTPPorts }

func (h httpPorts) on(port uint16) bool { return h.On(port) }

// portsWithHTTP reads the rules of the policies that select the workload.
func portsWithHTTP(cfg authz.Config) httpPorts { return httpPorts{judge.PortsWithHTTP(cfg)} }
