package archtest_test

import (
	"os"
	"os/exec"
	"testing"
)

// TestOtherPlatform: what the images hold compiles for the platform that the tests do
// not run on. The flags are those of the Makefile, whose builds it shares.
func TestOtherPlatform(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles everything")
	}
	// Of several packages nothing is linked or written.
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace", "./cmd/...", "./deploy/samples/hello")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=arm64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
