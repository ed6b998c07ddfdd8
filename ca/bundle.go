package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/internal/disk"
)

// refreshHint is what the SPIFFE Federation specification takes as default.
const refreshHint = 5 * time.Minute

const bundleFile = "bundle.json"

// Bundle is what one trust domain is trusted by. It is immutable.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	// Roots verify X509-SVIDs.
	Roots []*x509.Certificate
	// JWTAuthorities verify JWT-SVIDs, by key id.
	JWTAuthorities map[string]crypto.PublicKey
	// Sequence rises with every change of content, restarts included.
	Sequence uint64
	// RefreshHint is how often to ask again.
	RefreshHint time.Duration

	der                 [][]byte
	jwks, jwtJWKS, text []byte
}

// RootsDER returns the roots' bytes. They are shared: do not change them.
func (b *Bundle) RootsDER() [][]byte { return b.der }

// RootsPEM returns the roots, and only roots, as PEM.
func (b *Bundle) RootsPEM() []byte { return bytes.Clone(b.text) }

// MarshalJWKS returns the whole bundle in SPIFFE format (Trust Domain and Bundle 4).
func (b *Bundle) MarshalJWKS() []byte { return bytes.Clone(b.jwks) }

// MarshalJWTAuthorities returns a JWKS of the JWT keys only, each with the use
// "jwt-svid" and a key id.
func (b *Bundle) MarshalJWTAuthorities() []byte { return bytes.Clone(b.jwtJWKS) }

// WriteBundleFile writes the roots as PEM, replacing path atomically.
func WriteBundleFile(path string, b *Bundle) error {
	if err := disk.Write(path, b.text, 0o644); err != nil {
		return fmt.Errorf("ca: bundle file: %w", err)
	}
	return nil
}

// jwks is the SPIFFE bundle document. Sequence and hint are left out of the
// plain key set of JWT authorities.
type jwks struct {
	Keys        []json.RawMessage `json:"keys"`
	Sequence    uint64            `json:"spiffe_sequence,omitempty"`
	RefreshHint int64             `json:"spiffe_refresh_hint,omitempty"`
}

// newBundle makes every form once; all are asked for far oftener than they change.
func newBundle(td spiffeid.TrustDomain, roots []*x509.Certificate, authorities map[string]crypto.PublicKey, sequence uint64) (*Bundle, error) {
	b := &Bundle{TrustDomain: td, Roots: roots, JWTAuthorities: authorities, Sequence: sequence, RefreshHint: refreshHint}
	whole := jwks{Keys: []json.RawMessage{}, Sequence: sequence, RefreshHint: int64(refreshHint / time.Second)}
	for _, r := range roots {
		b.der = append(b.der, r.Raw)
		b.text = append(b.text, encodeCertificate(r)...)
		// spiffe-15: use, no kid, exactly one x5c.
		key, err := rootJWK(r)
		if err != nil {
			return nil, err
		}
		whole.Keys = append(whole.Keys, key)
	}
	tokens := jwks{Keys: []json.RawMessage{}}
	for _, kid := range slices.Sorted(maps.Keys(authorities)) {
		// spiffe-21: use and kid.
		key, err := jose.JSONWebKey{Key: authorities[kid], KeyID: kid, Algorithm: algES256, Use: "jwt-svid"}.MarshalJSON()
		if err != nil {
			return nil, err
		}
		tokens.Keys = append(tokens.Keys, key)
	}
	whole.Keys = append(whole.Keys, tokens.Keys...)
	var err error
	if b.jwks, err = json.Marshal(whole); err != nil {
		return nil, err
	}
	b.jwtJWKS, err = json.Marshal(tokens)
	return b, err
}

func rootJWK(root *x509.Certificate) (json.RawMessage, error) {
	plain, err := jose.JSONWebKey{Key: root.PublicKey, Use: "x509-svid"}.MarshalJSON()
	if err != nil {
		return nil, err
	}
	var key map[string]json.RawMessage
	if err := json.Unmarshal(plain, &key); err != nil {
		return nil, err
	}
	if key["x5c"], err = json.Marshal([]string{base64.StdEncoding.EncodeToString(root.Raw)}); err != nil {
		return nil, err
	}
	return json.Marshal(key)
}

// bundleState keeps the sequence across restarts.
type bundleState struct {
	blobs       Blobs
	trustDomain spiffeid.TrustDomain
	saved       savedBundle
	current     *Bundle
}

type savedBundle struct {
	TrustDomain string `json:"trustDomain"`
	Sequence    uint64 `json:"sequence"`
	// Digest is the SHA-256 of the content, in hex.
	Digest string `json:"digest"`
}

func loadBundleState(ctx context.Context, blobs Blobs, td spiffeid.TrustDomain) (*bundleState, error) {
	s := &bundleState{blobs: blobs, trustDomain: td}
	data, err := blobs.Read(ctx, bundleFile)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &s.saved); err != nil || s.saved.Sequence == 0 {
		return nil, fmt.Errorf("%s is half-written; remove it and the sequence goes on from the clock", blobs.Where(bundleFile))
	}
	if s.saved.TrustDomain != td.Name() {
		return nil, fmt.Errorf("%s is of trust domain %q and not of %q; use another data directory or set trustDomain back", blobs.Where(bundleFile), s.saved.TrustDomain, td.Name())
	}
	return s, nil
}

// next returns the bundle of this content; the same one while nothing changed.
// A new sequence is durable before anybody sees it. It starts from the clock, so
// that it rises even where the document was lost.
func (s *bundleState) next(ctx context.Context, roots []*x509.Certificate, authorities map[string]crypto.PublicKey, now time.Time) (*Bundle, error) {
	digest, err := contentDigest(roots, authorities)
	if err != nil {
		return nil, err
	}
	if s.current != nil && digest == s.saved.Digest {
		return s.current, nil
	}
	saved := s.saved
	if digest != saved.Digest {
		saved = savedBundle{TrustDomain: s.trustDomain.Name(), Digest: digest, Sequence: max(saved.Sequence+1, uint64(max(now.Unix(), 1)))}
	}
	b, err := newBundle(s.trustDomain, roots, authorities, saved.Sequence)
	if err != nil {
		return nil, err
	}
	if saved != s.saved {
		data, err := json.Marshal(saved)
		if err != nil {
			return nil, err
		}
		if err := s.blobs.Write(ctx, bundleFile, append(data, '\n')); err != nil {
			return nil, err
		}
	}
	s.saved, s.current = saved, b
	return b, nil
}

func contentDigest(roots []*x509.Certificate, authorities map[string]crypto.PublicKey) (string, error) {
	h := sha256.New()
	for _, r := range roots {
		sum := sha256.Sum256(r.Raw)
		h.Write(sum[:])
	}
	for _, kid := range slices.Sorted(maps.Keys(authorities)) {
		spki, err := x509.MarshalPKIXPublicKey(authorities[kid])
		if err != nil {
			return "", err
		}
		sum := sha256.Sum256(append([]byte(kid+"\x00"), spki...))
		h.Write(sum[:])
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
