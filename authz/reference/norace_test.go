//go:build !race

package reference_test

// rounds of rapid's hundred draws each: some ten thousand questions in seconds.
const rounds = 10
