package cli

import (
	"context"
	"io"
)

// Progress is what commands say while they take long.
func Progress(w io.Writer, what string) (stop func()) { return (&env{err: w}).progress(what) }

// Run is Main without signals.
func Run(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	return runMain(ctx, args, in, out, errw)
}
