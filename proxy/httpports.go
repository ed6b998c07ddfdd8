package proxy

import (
	"slices"
	"strconv"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// httpPorts are the workload ports for which some rule names what only HTTP has.
type httpPorts struct {
	// all: some such rule holds for every port.
	all  bool
	some map[uint16]bool
}

func (h httpPorts) on(port uint16) bool { return h.all || h.some[port] }

// portsWithHTTP reads the rules of the policies that select the workload.
func portsWithHTTP(cfg authz.Config) (h httpPorts) {
	w := cfg.Workload
	for _, d := range cfg.Documents {
		if d.Authorization == nil || !authz.Selects(d, w.Account.Namespace(), w.Labels, cfg.Mesh) {
			continue
		}
		for _, r := range d.Authorization.Rules {
			h.add(r)
		}
	}
	return h
}

// add counts a rule. Within one that names HTTP in its sources or conditions,
// each operation does; what names no ports, or cannot be read, is about all.
func (h *httpPorts) add(r policy.Rule) {
	whole := slices.ContainsFunc(r.From, func(f policy.From) bool {
		return f.Source != nil && len(f.Source.RequestPrincipals)+len(f.Source.NotRequestPrincipals) > 0
	}) || slices.ContainsFunc(r.When, func(c policy.Condition) bool { return strings.HasPrefix(c.Key, "request.") })
	if whole && len(r.To) == 0 {
		h.all = true
	}
	for _, to := range r.To {
		o := to.Operation
		switch {
		case o == nil:
			h.all = h.all || whole
			continue
		case !whole && len(o.Hosts)+len(o.NotHosts)+len(o.Methods)+len(o.NotMethods)+len(o.Paths)+len(o.NotPaths) == 0:
			continue
		case len(o.Ports) == 0:
			h.all = true
		}
		for _, p := range o.Ports {
			n, err := strconv.ParseUint(p, 10, 16)
			if err != nil {
				h.all = true
				continue
			}
			if h.some == nil {
				h.some = map[uint16]bool{}
			}
			h.some[uint16(n)] = true
		}
	}
}
