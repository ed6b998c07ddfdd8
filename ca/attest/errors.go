package attest

import (
	"errors"
	"fmt"
	"strings"

	"castellan.dev/internal/jws"
)

// Kind is what a caller can make of a refusal.
type Kind uint8

const (
	// Unauthenticated: the credentials are no good.
	Unauthenticated Kind = iota + 1
	// Denied: the credentials are genuine, and do not entitle to this.
	Denied
	// Unavailable: it cannot be decided now; ask again.
	Unavailable
)

// Error is why somebody was not attested. Its text is for logs, never for the caller.
type Error struct {
	Kind Kind
	// Reason is a short constant, fit for a metric's label.
	Reason string
	err    error
}

// Error returns the cause.
func (e *Error) Error() string { return "attest: " + e.err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.err }

func refusal(kind Kind, reason, format string, args ...any) error {
	return &Error{Kind: kind, Reason: reason, err: fmt.Errorf(format, args...)}
}

func unauthenticated(reason, format string, args ...any) error {
	return refusal(Unauthenticated, reason, format, args...)
}

func denied(reason, format string, args ...any) error {
	return refusal(Denied, reason, format, args...)
}

func unavailable(reason, format string, args ...any) error {
	return refusal(Unavailable, reason, format, args...)
}

// prefix says which of the two tokens an error is about.
func prefix(what string, err error) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	return &Error{Kind: e.Kind, Reason: e.Reason, err: fmt.Errorf("%s: %w", what, e.err)}
}

// reasonOf names a token error for metrics.
func reasonOf(err error) string {
	for _, r := range []struct {
		err  error
		name string
	}{
		{jws.ErrTooLarge, "too-large"}, {jws.ErrMalformed, "malformed"}, {jws.ErrAlgorithm, "algorithm"},
		{jws.ErrUnavailable, "keys"}, {jws.ErrUnknownKey, "unknown-key"}, {jws.ErrSignature, "signature"},
		{jws.ErrIssuer, "issuer"}, {jws.ErrAudience, "audience"}, {jws.ErrExpired, "expired"},
		{jws.ErrNotYetValid, "not-yet-valid"},
	} {
		if errors.Is(err, r.err) {
			return r.name
		}
	}
	return "other"
}

// clip keeps what a caller wrote short in our logs.
func clip(s string) string {
	const limit = 256
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "..."
}
