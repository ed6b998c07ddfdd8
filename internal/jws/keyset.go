package jws

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"
)

// maxJWKS bounds a key set's document, and with it the number of keys.
const maxJWKS = 64 << 10

const (
	minRSABits = 2048
	// maxRSABits bounds the work one forged token can cause.
	maxRSABits = 8192
)

// KeySet holds the public keys of one issuer. It is immutable. A nil or empty
// set verifies nothing.
type KeySet struct {
	version string
	keys    []verificationKey
	byID    map[string][]verificationKey
	jwks    []byte
}

// verificationKey is one usable key; exactly one of rsa and ec is set.
type verificationKey struct {
	id        string
	algorithm string // "" when the document does not bind one
	rsa       *rsa.PublicKey
	ec        *ecdsa.PublicKey
}

// ParseJWKS reads a JWK Set (RFC 7517). Keys that cannot verify signatures, are
// weak, or are private are left out; a document that is no key set is an error.
// A well-formed set without a usable key is accepted and verifies nothing: an
// issuer that withdraws all its keys must be obeyed.
func ParseJWKS(data []byte) (*KeySet, error) {
	if len(data) > maxJWKS {
		return nil, fmt.Errorf("jws: key set has %d bytes, %d are allowed", len(data), maxJWKS)
	}
	var doc struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("jws: not a JSON key set: %w", err)
	}
	if doc.Keys == nil {
		return nil, errors.New(`jws: not a key set: the member "keys" is missing`)
	}
	sum := sha256.Sum256(data)
	s := &KeySet{
		version: hex.EncodeToString(sum[:16]),
		byID:    map[string][]verificationKey{},
		jwks:    append([]byte(nil), data...),
	}
	for _, raw := range doc.Keys {
		if k, ok := usableKey(raw); ok {
			s.keys = append(s.keys, k)
			s.byID[k.id] = append(s.byID[k.id], k)
		}
	}
	return s, nil
}

// usableKey reads one JWK; false leaves it out of the set (RFC 7517 section 5:
// keys that are not understood are ignored).
func usableKey(raw []byte) (verificationKey, bool) {
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(raw); err != nil || !jwk.Valid() {
		return verificationKey{}, false
	}
	switch jwk.Use {
	case "", "sig", "jwt-svid":
	default:
		return verificationKey{}, false
	}
	if !mayVerify(raw) {
		return verificationKey{}, false
	}
	k := verificationKey{id: jwk.KeyID, algorithm: jwk.Algorithm}
	switch key := jwk.Key.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return verificationKey{}, false
		}
		k.rsa = key
	case *ecdsa.PublicKey:
		k.ec = key
	default: // symmetric, private, Ed25519: never
		return verificationKey{}, false
	}
	return k, true
}

// mayVerify reads key_ops, which go-jose does not.
func mayVerify(raw []byte) bool {
	var ops struct {
		KeyOps []string `json:"key_ops"`
	}
	if err := json.Unmarshal(raw, &ops); err != nil {
		return false
	}
	if ops.KeyOps == nil {
		return true
	}
	for _, op := range ops.KeyOps {
		if op == "verify" {
			return true
		}
	}
	return false
}

// Version changes with the document.
func (s *KeySet) Version() string {
	if s == nil {
		return ""
	}
	return s.version
}

// Len is the number of usable keys.
func (s *KeySet) Len() int {
	if s == nil {
		return 0
	}
	return len(s.keys)
}

// JWKS returns the document the set was read from. The caller must not change it.
func (s *KeySet) JWKS() []byte {
	if s == nil {
		return nil
	}
	return s.jwks
}

// candidates returns the keys a token of the given kid may be signed by. Without
// a kid there is a candidate only where there is a single key to choose from.
func (s *KeySet) candidates(kid string) []verificationKey {
	if s == nil {
		return nil
	}
	if kid != "" {
		return s.byID[kid]
	}
	if len(s.keys) == 1 {
		return s.keys
	}
	return nil
}
