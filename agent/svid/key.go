package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
)

// Key is a workload's private key. It lives in memory only, and every way of
// printing it says "[redacted]". Two keys cannot be compared with ==.
type Key struct {
	_       [0]func()
	private *ecdsa.PrivateKey
}

// NewKey makes a P-256 key.
func NewKey() (*Key, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("svid: making a key: %w", err)
	}
	return &Key{private: private}, nil
}

// Signer returns the key for signing with.
func (k *Key) Signer() crypto.Signer { return k.private }

// PKCS8 returns the key unencrypted, for the workload it belongs to.
func (k *Key) PKCS8() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k.private)
	if err != nil {
		return nil, fmt.Errorf("svid: encoding a key: %w", err)
	}
	return der, nil
}

// wipe overwrites the key. What the library keeps of it beside, and what was sent
// of it, is the garbage collector's.
func (k *Key) wipe() {
	clear(k.private.D.Bits()) //nolint:staticcheck // SA1019: an invalid key is what is wanted
}

// Equal compares in constant time.
func (k *Key) Equal(o *Key) bool { return k != nil && o != nil && k.private.Equal(o.private) }

const redacted = "[redacted]"

// Format hides the key from every verb of fmt.
func (*Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue hides the key from slog.
func (*Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText hides the key from encoders.
func (*Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }
