package run_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"castellan.dev/internal/run"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAllFirstErrorCancelsSiblings(t *testing.T) {
	boom := errors.New("boom")
	ended := false
	err := run.All(context.Background(),
		func(ctx context.Context) error { <-ctx.Done(); ended = true; return ctx.Err() },
		func(context.Context) error { return boom },
	)
	if !errors.Is(err, boom) || !ended {
		t.Fatalf("err %v, sibling ended %v", err, ended)
	}
}

func TestAllEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := run.All(ctx, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }); err != nil {
		t.Fatalf("err %v", err)
	}
}

func TestAllTurnsPanicIntoError(t *testing.T) {
	err := run.All(context.Background(), func(context.Context) error { panic("odd") })
	if err == nil || !strings.Contains(err.Error(), "panic: odd") {
		t.Fatalf("err %v", err)
	}
}
