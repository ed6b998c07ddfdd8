package cli

import "io"

// Progress is what commands say while they take long.
func Progress(w io.Writer, what string) (stop func()) { return (&env{err: w}).progress(what) }
