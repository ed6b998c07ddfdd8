// Package samples carries the sample policies inside the castellan binary.
package samples

import "embed"

// Quickstart holds the policies of the sample mesh that `castellan up` starts,
// under the folder "quickstart".
//
//go:embed quickstart/*.yaml
var Quickstart embed.FS
