package discovery

import (
	"encoding/json"

	"castellan.dev/api/policy"
)

// defaultRootNamespace is where mesh-wide policies live unless the settings say otherwise.
const defaultRootNamespace = "castellan-system"

func rootNamespace(mesh policy.Mesh) string {
	if mesh.RootNamespace == "" {
		return defaultRootNamespace
	}
	return mesh.RootNamespace
}

// scope is the workloads that a refused document could select, read as widely as
// it can be meant: what cannot be told widens it.
type scope struct {
	// namespace, or "" for any.
	namespace string
	// labels that the workload must have; none is any workload.
	labels map[string]string
}

// covers reports whether the workload is one of them.
func (s scope) covers(namespace string, labels map[string]string, mesh policy.Mesh) bool {
	if s.namespace != "" && s.namespace != namespace && s.namespace != rootNamespace(mesh) {
		return false
	}
	for k, v := range s.labels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// identify reads what an object calls itself and whom it could select, from JSON
// that need not be a policy at all.
func identify(object []byte) (Ref, scope) {
	var ref Ref
	var s scope
	top := members(object)
	ref.Kind = text(top["kind"])
	meta := members(top["metadata"])
	ref.Namespace, ref.Name = text(meta["namespace"]), text(meta["name"])
	s.namespace = ref.Namespace
	selector := members(members(top["spec"])["selector"])
	// A selector with anything unknown in it may have been meant otherwise.
	if raw, ok := selector["matchLabels"]; ok && len(selector) == 1 {
		var labels map[string]string
		if json.Unmarshal(raw, &labels) == nil {
			s.labels = labels
		}
	}
	return ref, s
}

func members(raw json.RawMessage) map[string]json.RawMessage {
	var m map[string]json.RawMessage
	if len(raw) == 0 || json.Unmarshal(raw, &m) != nil {
		return nil
	}
	return m
}

func text(raw json.RawMessage) string {
	var s string
	if len(raw) == 0 || json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}
