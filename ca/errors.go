package ca

import (
	"errors"
	"fmt"
)

// RequestError is the caller's fault: what it asked for is refused, never
// corrected. Its text may be shown to the caller.
type RequestError struct {
	// Field is "csr", "csr.subject", "csr.san", "audience" and the like.
	Field  string
	Reason string
}

// Error names the field and the reason.
func (e *RequestError) Error() string { return fmt.Sprintf("ca: %s: %s", e.Field, e.Reason) }

// ErrLedger says that the intent could not be recorded, so nothing was signed.
// It may pass: retry later.
var ErrLedger = errors.New("ca: the ledger cannot be written, nothing was signed")

// ErrNoIssuer says that no issuer is valid at this time: expired, or the clock
// is before it. It may pass: retry later.
var ErrNoIssuer = errors.New("ca: no issuer is valid now, nothing was signed")

// ErrLint says that the bytes to sign were not what the profile demands: a fault
// of this program, and nothing was signed.
var ErrLint = errors.New("ca: refused to sign what does not meet the profile")
