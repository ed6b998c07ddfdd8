package judge

import (
	"slices"
	"strconv"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// HTTPPorts are the workload ports for which some rule names what only HTTP has:
// tokens of end users, methods, paths and the like. Where such a port declares no
// protocol, what is not HTTP is refused: the rules could not be evaluated on it.
type HTTPPorts struct {
	// all: some such rule names no port.
	all bool
	// some are ports that such a rule names, plain those that a rule without
	// anything of HTTP names: there bytes are meant, unless the former says otherwise.
	some, plain map[uint16]bool
}

// On reports whether there is such a rule for the port.
func (h HTTPPorts) On(port uint16) bool { return h.some[port] || h.all && !h.plain[port] }

// PortsWithHTTP reads the rules of the policies that select the workload.
func PortsWithHTTP(cfg authz.Config) (h HTTPPorts) {
	w := cfg.Workload
	for _, d := range cfg.Documents {
		if !authz.Selects(d, w.Account.Namespace(), w.Labels, cfg.Mesh) {
			continue
		}
		h.all = h.all || d.RequestAuthentication != nil
		if d.Authorization == nil {
			continue
		}
		for _, r := range d.Authorization.Rules {
			h.add(r)
		}
	}
	return h
}

// add counts a rule. Within one that names HTTP in its sources or conditions,
// each operation does; one that names no ports is about all.
func (h *HTTPPorts) add(r policy.Rule) {
	whole := slices.ContainsFunc(r.From, func(f policy.From) bool {
		return f.Source != nil && len(f.Source.RequestPrincipals)+len(f.Source.NotRequestPrincipals) > 0
	}) || slices.ContainsFunc(r.When, func(c policy.Condition) bool { return strings.HasPrefix(c.Key, "request.") })
	if whole && len(r.To) == 0 {
		h.all = true
	}
	for _, to := range r.To {
		o := to.Operation
		if o == nil {
			h.all = h.all || whole
			continue
		}
		ports := &h.plain
		if whole || len(o.Hosts)+len(o.NotHosts)+len(o.Methods)+len(o.NotMethods)+len(o.Paths)+len(o.NotPaths) > 0 {
			ports = &h.some
			h.all = h.all || len(o.Ports) == 0
		}
		for _, p := range o.Ports {
			n, err := strconv.ParseUint(p, 10, 16)
			if err != nil {
				continue // matches no port
			}
			if *ports == nil {
				*ports = map[uint16]bool{}
			}
			(*ports)[uint16(n)] = true
		}
	}
}
