package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"castellan.dev/ca"
	"castellan.dev/ca/attest"
)

// requestError is a refusal that this package itself decides.
type requestError struct {
	code   codes.Code
	reason string
	wait   time.Duration // with ResourceExhausted
	err    error
}

func (e *requestError) Error() string { return "server: " + e.err.Error() }

func invalid(reason, format string, args ...any) error {
	return &requestError{code: codes.InvalidArgument, reason: reason, err: fmt.Errorf(format, args...)}
}

func unauthenticated(reason, format string, args ...any) error {
	return &requestError{code: codes.Unauthenticated, reason: reason, err: fmt.Errorf(format, args...)}
}

func limited(scope string, wait time.Duration) error {
	return &requestError{
		code: codes.ResourceExhausted, reason: "limit-" + scope, wait: wait,
		err: fmt.Errorf("rate limit (%s) reached, for %v", scope, wait),
	}
}

// verdict is what becomes of a cause: the code and reason that clients and
// metrics get. The cause itself goes to the log only.
type verdict struct {
	code   codes.Code
	reason string
	wait   time.Duration
}

// verdictOf is the one place that maps causes to codes. Clients retry on
// ResourceExhausted, Internal, Unavailable, Canceled and DeadlineExceeded, and
// give up for good on InvalidArgument, so that one is for their own fault only.
func verdictOf(cause error) verdict {
	var own *requestError
	var who *attest.Error
	var request *ca.RequestError
	switch {
	case errors.As(cause, &own):
		return verdict{own.code, own.reason, own.wait}
	case errors.As(cause, &who):
		switch who.Kind {
		case attest.Unauthenticated:
			return verdict{code: codes.Unauthenticated, reason: who.Reason}
		case attest.Denied:
			return verdict{code: codes.PermissionDenied, reason: who.Reason}
		case attest.Unavailable:
			return verdict{code: codes.Unavailable, reason: who.Reason}
		}
	case errors.As(cause, &request):
		return verdict{code: codes.InvalidArgument, reason: "request"}
	case errors.Is(cause, context.Canceled):
		return verdict{code: codes.Canceled, reason: "canceled"}
	case errors.Is(cause, context.DeadlineExceeded):
		return verdict{code: codes.DeadlineExceeded, reason: "deadline"}
	case errors.Is(cause, ca.ErrLedger):
		return verdict{code: codes.Unavailable, reason: "ledger"}
	case errors.Is(cause, ca.ErrNoIssuer):
		return verdict{code: codes.Unavailable, reason: "no-issuer"}
	}
	// Fails closed: what is not known is our own fault, and nothing was issued.
	return verdict{code: codes.Internal, reason: "internal"}
}

// text is all a caller learns in words.
func (v verdict) text() string {
	switch v.code {
	case codes.InvalidArgument:
		return "request refused: it is malformed or asks for what it may not name"
	case codes.Unauthenticated:
		return "credentials not accepted"
	case codes.PermissionDenied:
		return "identity not permitted"
	case codes.ResourceExhausted:
		return "too many requests, retry later"
	case codes.Unavailable:
		return "not available now, retry later"
	case codes.Canceled:
		return "request canceled"
	case codes.DeadlineExceeded:
		return "request took too long"
	}
	return "internal error"
}

func (v verdict) status() error {
	st := status.New(v.code, v.text())
	if v.code == codes.ResourceExhausted {
		if detailed, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(v.wait)}); err == nil {
			st = detailed
		}
	}
	return st.Err()
}
