package authz

import "castellan.dev/api/policy"

// defaultRootNamespace is where mesh-wide policies live unless the mesh settings
// say otherwise.
const defaultRootNamespace = "castellan-system"

func rootNamespace(mesh policy.Mesh) string {
	if mesh.RootNamespace == "" {
		return defaultRootNamespace
	}
	return mesh.RootNamespace
}

// Selects says whether a document applies to a workload of the given namespace
// and labels (rules 1 and 2): it stands in that namespace or in the root one, and
// every label it asks for is there. Documents with targetRefs are for gateways
// and waypoints, and a PeerAuthentication of the root namespace with a selector
// applies to nobody (rule 31).
func Selects(doc policy.Document, namespace string, labels map[string]string, mesh policy.Mesh) bool {
	root := doc.Metadata.Namespace == rootNamespace(mesh)
	if doc.Metadata.Namespace != namespace && !root {
		return false
	}
	var selector *policy.Selector
	switch {
	case doc.Authorization != nil:
		a := doc.Authorization
		if a.TargetRef != nil || len(a.TargetRefs) > 0 {
			return false
		}
		selector = a.Selector
	case doc.RequestAuthentication != nil:
		r := doc.RequestAuthentication
		if r.TargetRef != nil || len(r.TargetRefs) > 0 {
			return false
		}
		selector = r.Selector
	case doc.PeerAuthentication != nil:
		selector = doc.PeerAuthentication.Selector
		if root && hasLabels(selector) {
			return false
		}
	}
	if selector == nil {
		return true
	}
	for k, v := range selector.MatchLabels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

func hasLabels(s *policy.Selector) bool { return s != nil && len(s.MatchLabels) > 0 }
