package authz

import (
	"castellan.dev/api/policy"
)

// FieldError says which field of a document was refused, and why.
type FieldError struct {
	// Field is the path of the field, as in "spec.rules[0].to[1].operation.paths[0]".
	Field string
	// Value is what stood there, shortened; empty where the field as a whole is meant.
	Value string
	// Reason says what is wrong and what to write instead.
	Reason string
	// Allowed lists the values that would do, where there are few.
	Allowed []string
}

func (e *FieldError) Error() string { return e.Field }

// Decode reads one Kubernetes object given as JSON.
func Decode(object []byte) (policy.Document, error) {
	return policy.Document{}, &FieldError{}
}
