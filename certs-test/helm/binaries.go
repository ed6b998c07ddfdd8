//go:build binaries

// Package helm pins the helm that the tests install the chart with. Nothing of it is
// tested or linted here: the module exists to be built by certs-test/tools/parts.
package helm

import _ "helm.sh/helm/v4/pkg/cmd"
