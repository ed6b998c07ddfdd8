package main

import (
	"crypto/x509"
	"os"
	"os/exec"
	"testing"
)

// TestRoots: in an image without any file of root certificates the usual ones are
// trusted all the same.
func TestRoots(t *testing.T) {
	if os.Getenv("CASTELLAN_TEST_ROOTS") != "" {
		pool, err := x509.SystemCertPool()
		if err != nil || pool.Equal(x509.NewCertPool()) {
			t.Fatalf("no roots: %v", err)
		}
		return
	}
	child := exec.Command(os.Args[0], "-test.run=^TestRoots$")
	child.Env = append(os.Environ(), "CASTELLAN_TEST_ROOTS=1", "SSL_CERT_FILE=/nonexistent", "SSL_CERT_DIR=/nonexistent")
	if out, err := child.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
