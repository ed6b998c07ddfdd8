package jws

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	_ "crypto/sha256" // links SHA-256 for crypto.Hash
	_ "crypto/sha512" // links SHA-384 and SHA-512
	"math/big"
)

// family is a way of signing.
type family uint8

const (
	pkcs1 family = iota + 1
	pss
	ecdsaFixed
)

// algorithm is one entry of the allow-list (RFC 7518 section 3).
type algorithm struct {
	name   string
	family family
	hash   crypto.Hash
	// bits is the curve's size, for ecdsaFixed.
	bits int
}

// algorithmNamed is the allow-list. "none", the HMACs and everything else are
// not on it, whatever a key set says.
func algorithmNamed(name string) (algorithm, bool) {
	switch name {
	case "RS256":
		return algorithm{name, pkcs1, crypto.SHA256, 0}, true
	case "RS384":
		return algorithm{name, pkcs1, crypto.SHA384, 0}, true
	case "RS512":
		return algorithm{name, pkcs1, crypto.SHA512, 0}, true
	case "PS256":
		return algorithm{name, pss, crypto.SHA256, 0}, true
	case "PS384":
		return algorithm{name, pss, crypto.SHA384, 0}, true
	case "PS512":
		return algorithm{name, pss, crypto.SHA512, 0}, true
	case "ES256":
		return algorithm{name, ecdsaFixed, crypto.SHA256, 256}, true
	case "ES384":
		return algorithm{name, ecdsaFixed, crypto.SHA384, 384}, true
	case "ES512":
		return algorithm{name, ecdsaFixed, crypto.SHA512, 521}, true
	}
	return algorithm{}, false
}

// fits says whether the key may verify the algorithm: by its type, its curve,
// and the algorithm its document binds it to.
func (k *verificationKey) fits(a algorithm) bool {
	if k.algorithm != "" && k.algorithm != a.name {
		return false
	}
	if a.family == ecdsaFixed {
		return k.ec != nil && k.ec.Curve.Params().BitSize == a.bits
	}
	return k.rsa != nil
}

// verify checks one signature. The key fits the algorithm. The standard library
// is called without a JOSE library between: the token has been parsed already,
// more strictly than go-jose would, and a second parse costs a third of an RSA
// verification. A fuzz test holds the two equal.
func (k *verificationKey) verify(a algorithm, signed string, signature []byte) bool {
	h := a.hash.New()
	h.Write([]byte(signed))
	digest := h.Sum(nil)
	switch a.family {
	case pkcs1:
		return rsa.VerifyPKCS1v15(k.rsa, a.hash, digest, signature) == nil
	case pss:
		// RFC 7518 3.5: the salt is as long as the hash.
		return rsa.VerifyPSS(k.rsa, a.hash, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
	case ecdsaFixed:
		// RFC 7518 3.4: r and s, each exactly as long as the curve's order.
		size := (a.bits + 7) / 8
		if len(signature) != 2*size {
			return false
		}
		r, s := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
		return ecdsa.Verify(k.ec, digest, r, s)
	}
	return false
}
