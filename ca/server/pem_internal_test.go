package server

import (
	"crypto/rand"
	"encoding/pem"
	"testing"
)

func TestCertificatePEM(t *testing.T) {
	for n := range 500 {
		der := make([]byte, n)
		_, _ = rand.Read(der)
		if want := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); certificatePEM(der) != want {
			t.Fatalf("%d bytes: %q, want %q", n, certificatePEM(der), want)
		}
	}
}
