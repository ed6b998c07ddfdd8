package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"
)

const keyRingFile = "jwt-keys.json"

// dropLeeway is how much longer than its last token a key is published, for
// verifiers whose clocks are behind.
const dropLeeway = time.Minute

// maxJWTKeys bounds what is loaded: one that retires, one that signs, one that
// waits; more only while periods are shorter than tokens.
const maxJWTKeys = 64

// keyRing are the JWT keys as kept, oldest first. Each signs from its activeFrom
// until the next one's. The next is made, and so published, half a period before
// it signs; one that signs no more is kept until its last token has expired. It
// is guarded by the authority's mutex.
type keyRing struct {
	blobs   Blobs
	period  time.Duration
	longest time.Duration // the longest a token may live
	now     func() time.Time
	keys    []jwtKey
}

type jwtKey struct {
	id         string
	key        *ecdsa.PrivateKey
	activeFrom time.Time
	header     string
}

type savedKey struct {
	ActiveFrom time.Time `json:"activeFrom"`
	PKCS8      []byte    `json:"pkcs8"`
}

func loadKeyRing(ctx context.Context, blobs Blobs, period, longest time.Duration, now func() time.Time) (*keyRing, error) {
	r := &keyRing{blobs: blobs, period: period, longest: longest, now: now}
	data, err := blobs.Read(ctx, keyRingFile)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	var saved []savedKey
	if err := json.Unmarshal(data, &saved); err != nil || len(saved) == 0 || len(saved) > maxJWTKeys {
		return nil, fmt.Errorf("%s is half-written; restore it from a backup, or remove it and JWT-SVIDs signed so far become invalid", blobs.Where(keyRingFile))
	}
	for i, s := range saved {
		k, err := s.parse()
		if err != nil {
			return nil, fmt.Errorf("%s: key %d: %w", blobs.Where(keyRingFile), i, err)
		}
		r.keys = append(r.keys, k)
	}
	return r, nil
}

func (s savedKey) parse() (jwtKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(s.PKCS8)
	if err != nil {
		return jwtKey{}, errors.New("cannot be read") // the cause could quote key bytes
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() || s.ActiveFrom.IsZero() {
		return jwtKey{}, errors.New("is not a P-256 key with its time")
	}
	return newJWTKey(key, s.ActiveFrom)
}

func newJWTKey(key *ecdsa.PrivateKey, activeFrom time.Time) (jwtKey, error) {
	keyID, err := publicKeyID(key.Public())
	if err != nil {
		return jwtKey{}, err
	}
	id := hex.EncodeToString(keyID)
	header := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"` + algES256 + `","kid":"` + id + `","typ":"JWT"}`))
	return jwtKey{id: id, key: key, activeFrom: activeFrom.UTC(), header: header}, nil
}

// rotate adds the next key when the last is half-way, and drops those whose last
// token has expired. What it changes is durable when it returns.
func (r *keyRing) rotate(ctx context.Context) error {
	now := r.now()
	keys := r.keys
	for len(keys) > 1 && !now.Before(keys[1].activeFrom.Add(r.longest+dropLeeway)) {
		keys = keys[1:]
	}
	from, due := now, len(keys) == 0
	if n := len(keys); n > 0 {
		last := keys[n-1].activeFrom
		due = !now.Before(last.Add(r.period / 2))
		// After a long sleep the old key signs until the new one is known.
		if from = last.Add(r.period); from.Before(now.Add(r.period / 2)) {
			from = now.Add(r.period / 2)
		}
	}
	if due {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		k, err := newJWTKey(key, from)
		if err != nil {
			return err
		}
		keys = append(keys[:len(keys):len(keys)], k)
	}
	if !due && len(keys) == len(r.keys) {
		return nil
	}
	if err := r.save(ctx, keys); err != nil {
		return err
	}
	r.keys = keys
	return nil
}

func (r *keyRing) save(ctx context.Context, keys []jwtKey) error {
	saved := make([]savedKey, 0, len(keys))
	for _, k := range keys {
		pkcs8, err := x509.MarshalPKCS8PrivateKey(k.key)
		if err != nil {
			return err
		}
		saved = append(saved, savedKey{ActiveFrom: k.activeFrom, PKCS8: pkcs8})
	}
	data, err := json.Marshal(saved)
	if err != nil {
		return err
	}
	return r.blobs.Write(ctx, keyRingFile, append(data, '\n'))
}

// authorities are the public halves of all keys, by id.
func (r *keyRing) authorities() map[string]crypto.PublicKey {
	m := make(map[string]crypto.PublicKey, len(r.keys))
	for _, k := range r.keys {
		m[k.id] = k.key.Public()
	}
	return m
}
