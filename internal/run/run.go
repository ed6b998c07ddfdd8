// Package run starts the long-lived parts of a process, ends them together, turns
// signals into that end, and reaches a process over its standard input and output.
// It starts nothing by itself.
package run

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
)

// Part is one long-lived piece of a process: it returns when ctx ends or when it cannot go on.
type Part func(ctx context.Context) error

// All runs every part until ctx ends or one returns; then the others are
// cancelled and waited for. It returns the first error that is not the
// cancellation itself. A part that panics counts as one that failed.
func All(ctx context.Context, parts ...Part) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, part := range parts {
		wg.Go(func() {
			cancel(guard(ctx, part))
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// guard runs part; a panic becomes an error, nil becomes the plain cancellation.
func guard(ctx context.Context, part Part) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	return part(ctx)
}

// WithSignals returns a context that ends at the first SIGINT or SIGTERM; the
// second ends the process at once with code 1. Call stop when done.
func WithSignals(parent context.Context) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		for range 2 {
			select {
			case <-signals:
				if ctx.Err() != nil {
					os.Exit(1)
				}
				cancel()
			case <-done:
				return
			}
		}
	}()
	return ctx, sync.OnceFunc(func() {
		signal.Stop(signals)
		close(done)
		cancel()
	})
}
