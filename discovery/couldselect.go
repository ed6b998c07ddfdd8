package discovery

import "castellan.dev/api/policy"

// CouldSelect reports whether the document, be it refused or not, could select such
// a workload, read as widely as it can be meant. Who is covered by one that is
// refused and has no last good version denies everything.
func (d FileDocument) CouldSelect(namespace string, labels map[string]string, mesh policy.Mesh) bool {
	return d.scope.covers(namespace, labels, mesh)
}
