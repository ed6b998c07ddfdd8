package kube

import (
	"errors"
	"fmt"
	"time"
)

// callTimeout bounds one call to the API server, retries of the client included.
const callTimeout = 10 * time.Second

// AwayError says that the API server did not answer, or not with what was asked
// for: it may pass, so ask again.
type AwayError struct {
	doing string
	err   error
}

// Error says what was being done.
func (e *AwayError) Error() string { return fmt.Sprintf("%s: %v", e.doing, e.err) }

// Unwrap returns the cause.
func (e *AwayError) Unwrap() error { return e.err }

func away(err error, format string, args ...any) error {
	return &AwayError{doing: fmt.Sprintf(format, args...), err: err}
}

// MayPass reports whether err is of the API server's being away or not set up yet.
func MayPass(err error) bool {
	var a *AwayError
	return errors.As(err, &a)
}
