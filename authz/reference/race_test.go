//go:build race

package reference_test

// rounds is small under the race detector, which has little to find in casbin.
const rounds = 2
