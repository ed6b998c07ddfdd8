// Package jwstest makes token issuers and tokens for tests. It signs with
// go-jose, so that what jws accepts is what another implementation wrote.
package jwstest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"maps"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Issuer signs tokens with one key.
type Issuer struct {
	Name  string
	KeyID string
	Alg   jose.SignatureAlgorithm
	Key   crypto.Signer
}

// RSA returns an issuer with a new RSA key that signs RS256.
func RSA(t testing.TB, name, kid string) *Issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return &Issuer{Name: name, KeyID: kid, Alg: jose.RS256, Key: key}
}

// EC returns an issuer with a new P-256 key that signs ES256.
func EC(t testing.TB, name, kid string) *Issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &Issuer{Name: name, KeyID: kid, Alg: jose.ES256, Key: key}
}

// JWK returns the issuer's public key.
func (i *Issuer) JWK() jose.JSONWebKey {
	return jose.JSONWebKey{Key: i.Key.Public(), KeyID: i.KeyID, Algorithm: string(i.Alg), Use: "sig"}
}

// JWKS returns a key set of the issuers' keys.
func JWKS(t testing.TB, issuers ...*Issuer) []byte {
	t.Helper()
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, i := range issuers {
		set.Keys = append(set.Keys, i.JWK())
	}
	data, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Claims are a payload.
type Claims map[string]any

// With returns a copy with members set; a nil value removes one.
func (c Claims) With(more Claims) Claims {
	out := maps.Clone(c)
	for k, v := range more {
		if v == nil {
			delete(out, k)
		} else {
			out[k] = v
		}
	}
	return out
}

// Base are claims of a valid token of the issuer at now.
func (i *Issuer) Base(now time.Time, audience ...string) Claims {
	return Claims{
		"iss": i.Name, "sub": "alice", "aud": audience,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(10 * time.Minute).Unix(),
	}
}

// Sign returns a token of the claims.
func (i *Issuer) Sign(t testing.TB, claims Claims) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return i.SignRaw(t, payload, nil)
}

// SignRaw returns a token of any payload, with more header members.
func (i *Issuer) SignRaw(t testing.TB, payload []byte, header map[jose.HeaderKey]any) string {
	t.Helper()
	opts := &jose.SignerOptions{ExtraHeaders: header}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: i.Alg, Key: jose.JSONWebKey{Key: i.Key, KeyID: i.KeyID}}, opts)
	if err != nil {
		t.Fatal(err)
	}
	object, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := object.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// Pod is what a service-account token says.
type Pod struct {
	Namespace, Account, AccountUID string
	Name, UID                      string
	Node, NodeUID                  string
}

// PodClaims are claims of the shape the kubelet's tokens have.
func (i *Issuer) PodClaims(now time.Time, p Pod, audience ...string) Claims {
	return i.Base(now, audience...).With(Claims{
		"sub": "system:serviceaccount:" + p.Namespace + ":" + p.Account,
		"kubernetes.io": map[string]any{
			"namespace":      p.Namespace,
			"serviceaccount": map[string]any{"name": p.Account, "uid": p.AccountUID},
			"pod":            map[string]any{"name": p.Name, "uid": p.UID},
			"node":           map[string]any{"name": p.Node, "uid": p.NodeUID},
		},
	})
}

// PodToken returns a token of the shape the kubelet gives a pod.
func (i *Issuer) PodToken(t testing.TB, now time.Time, p Pod, audience ...string) string {
	t.Helper()
	return i.Sign(t, i.PodClaims(now, p, audience...))
}
