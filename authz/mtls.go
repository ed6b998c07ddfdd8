package authz

import (
	"maps"
	"slices"
	"strconv"

	"castellan.dev/api/policy"
)

// mtlsModes are the modes of a workload's ports.
type mtlsModes struct {
	workload Mode
	ports    map[uint16]Mode
}

// MTLSMode returns the mode of a workload port (rule 31): that of the port, else
// of the workload, the namespace, the mesh, else PERMISSIVE. A nil Snapshot says
// STRICT, as does a document whose mode or port cannot be read.
func (s *Snapshot) MTLSMode(port uint16) Mode {
	if s == nil {
		return ModeStrict
	}
	if m, ok := s.modes.ports[port]; ok {
		return m
	}
	return s.modes.workload
}

// peerAuthentication composes the modes: in each scope the oldest document
// counts, and UNSET inherits.
func (c *compiler) peerAuthentication(docs []policy.Document) mtlsModes {
	var mesh, namespace, workload *policy.Document
	root := rootNamespace(c.cfg.Mesh)
	for i := range docs {
		d := &docs[i]
		if d.PeerAuthentication == nil {
			continue
		}
		scope := &namespace
		switch {
		case hasLabels(d.PeerAuthentication.Selector):
			scope = &workload
		case d.Metadata.Namespace == root:
			scope = &mesh
		}
		// docs are in order of name, which decides among equals.
		if *scope == nil || d.Metadata.CreationTimestamp.Before((*scope).Metadata.CreationTimestamp) {
			*scope = d
		}
	}
	mode := ModePermissive
	for _, d := range []*policy.Document{mesh, namespace, workload} {
		if d != nil && d.PeerAuthentication.MTLS != nil {
			mode = c.mode(d, "spec.mtls.mode", d.PeerAuthentication.MTLS.Mode, mode)
		}
	}
	m := mtlsModes{workload: mode}
	if workload != nil {
		c.portModes(workload, &m)
	}
	return m
}

func (c *compiler) portModes(d *policy.Document, m *mtlsModes) {
	m.ports = make(map[uint16]Mode)
	inherited, strict := m.workload, false
	for _, text := range slices.Sorted(maps.Keys(d.PeerAuthentication.PortLevelMTLS)) {
		tls := d.PeerAuthentication.PortLevelMTLS[text]
		field := "spec.portLevelMtls[" + text + "].mode"
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			c.problem(*d, field, text, "not a port; every port is STRICT")
			strict = true
			continue
		}
		m.ports[uint16(port)] = c.mode(d, field, tls.Mode, inherited)
	}
	if strict {
		*m = mtlsModes{workload: ModeStrict}
	}
}

func (c *compiler) mode(d *policy.Document, field, text string, inherited Mode) Mode {
	switch text {
	case "", policy.ModeUnset:
		return inherited
	case policy.ModeDisable:
		return ModeDisable
	case policy.ModePermissive:
		return ModePermissive
	case policy.ModeStrict:
		return ModeStrict
	default:
		c.problem(*d, field, text, "unknown mode; taken as STRICT")
		return ModeStrict
	}
}
