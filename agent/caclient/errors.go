package caclient

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Kind says what a failure means for the next attempt.
type Kind int

const (
	// Unreachable: the server is away, slow, overloaded or starting; try again.
	Unreachable Kind = iota
	// Refused: the server has judged and will judge the same until something
	// changes (pod gone, wrong node, request refused); try again slowly.
	Refused
	// Unauthenticated: the token is not accepted; a fresh one may be.
	Unauthenticated
	// BadAnswer: the server answered what was not asked for. It is not used.
	BadAnswer
	// Invalid: the server calls the request itself wrong.
	Invalid
	// BadCredential: a token could not be read, or is not this workload's.
	BadCredential
)

// String returns the kind as metrics label it.
func (k Kind) String() string {
	switch k {
	case Refused:
		return "refused"
	case Unauthenticated:
		return "unauthenticated"
	case BadAnswer:
		return "bad_answer"
	case Invalid:
		return "invalid"
	case BadCredential:
		return "bad_credential"
	default:
		return "unreachable"
	}
}

// Error is why a call failed.
type Error struct {
	Kind Kind
	// RetryAfter is the server's wish, zero if it has none.
	RetryAfter time.Duration
	Err        error
}

func (e *Error) Error() string { return e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// KindOf returns the kind of err; what is unknown counts as unreachable, which is tried again.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Unreachable
}

// RetryAfter returns how long the server asked to wait.
func RetryAfter(err error) time.Duration {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.RetryAfter
	}
	return 0
}

func badAnswer(format string, args ...any) *Error {
	return &Error{Kind: BadAnswer, Err: fmt.Errorf("answer refused: "+format, args...)}
}

func badCredential(who string, err error) *Error {
	return &Error{Kind: BadCredential, Err: fmt.Errorf("%s: %w", who, err)}
}

// maxRetryAfter bounds what a server may ask for.
const maxRetryAfter = 5 * time.Minute

// fromStatus classifies what gRPC returned.
func fromStatus(method string, err error) *Error {
	e := &Error{Kind: Unreachable, Err: fmt.Errorf("%s: %w", method, err)}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return e
	}
	s := status.Convert(err)
	switch s.Code() {
	case codes.PermissionDenied, codes.FailedPrecondition, codes.NotFound, codes.Unimplemented:
		e.Kind = Refused
	case codes.InvalidArgument, codes.OutOfRange:
		e.Kind = Invalid
	case codes.Unauthenticated:
		e.Kind = Unauthenticated
	}
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok && info.GetRetryDelay().CheckValid() == nil {
			e.RetryAfter = min(max(info.GetRetryDelay().AsDuration(), 0), maxRetryAfter)
		}
	}
	return e
}
