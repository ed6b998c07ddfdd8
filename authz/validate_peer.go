package authz

import (
	"slices"
	"strconv"

	"castellan.dev/api/policy"
)

// peerAuthentication is rules 31 and 35.
func (v *validation) peerAuthentication(p *policy.PeerAuthentication) {
	v.selector(p.Selector)
	selects := p.Selector != nil && len(p.Selector.MatchLabels) > 0
	if selects && v.namespace == v.rootNamespace() {
		v.warn("spec.selector", "", "ignored: in the root namespace %q a PeerAuthentication is for the whole mesh or for nobody", v.namespace)
	}
	if p.MTLS != nil {
		v.mode("spec.mtls.mode", p.MTLS.Mode)
	}
	switch {
	case p.PortLevelMTLS == nil:
		return
	case len(p.PortLevelMTLS) == 0:
		v.refuse("spec.portLevelMtls", "", "must not be empty; leave it out")
	case !selects:
		v.refuse("spec.portLevelMtls", "", "needs a selector with labels: ports are those of a workload")
	}
	for _, port := range sortedKeys(p.PortLevelMTLS) {
		field := childPath("spec.portLevelMtls", port)
		// One spelling per port: "8080" and "08080" would be two settings for one.
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
			v.refuse(field, port, "not a port; allowed: 1 to 65535, of the workload, not of its service")
		}
		v.mode(field+".mode", p.PortLevelMTLS[port].Mode)
	}
}

func (v *validation) mode(field, mode string) {
	known := []string{"", policy.ModeUnset, policy.ModeDisable, policy.ModePermissive, policy.ModeStrict}
	switch {
	case !slices.Contains(known, mode):
		v.refuse(field, mode, "allowed: UNSET, DISABLE, PERMISSIVE, STRICT")
	case mode == policy.ModeDisable:
		v.warn(field, mode, "no caller has an identity where mutual TLS is off, so no rule that names one matches")
	}
}
