package up

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Names of the two local issuers, which are never mixed: one says which pod a
// caller is, the other who the end user is.
const (
	workloadIssuerName = "https://workloads.castellan.test"
	userIssuerName     = "https://users.castellan.test"

	workloadTokenTTL = 10 * time.Minute
	userTokenTTL     = time.Hour
	// refreshEvery keeps every token well inside its lifetime.
	refreshEvery = 2 * time.Minute
)

// issuer signs tokens with one key.
type issuer struct {
	name   string
	signer jose.Signer
	public jose.JSONWebKey
}

// openIssuer reads the issuer's key, or makes it at first start. An RSA key is
// what Kubernetes signs service-account tokens with.
func openIssuer(name, keyFile string, alg jose.SignatureAlgorithm) (*issuer, error) {
	key, err := readKey(keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		key, err = makeKey(keyFile, alg)
	}
	if err != nil {
		return nil, err
	}
	public := jose.JSONWebKey{Key: key.Public(), Algorithm: string(alg), Use: "sig"}
	thumb, err := public.Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	public.KeyID = fmt.Sprintf("%x", thumb[:8])
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: public.KeyID}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	return &issuer{name: name, signer: signer, public: public}, nil
}

func readKey(path string) (crypto.Signer, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, inputErrorf("up: %s holds no PEM key; restore it, or remove it for a new one", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, inputErrorf("up: %s: %w; restore it, or remove it for a new one", path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, inputErrorf("up: %s holds a key that cannot sign", path)
	}
	return signer, nil
}

func makeKey(path string, alg jose.SignatureAlgorithm) (crypto.Signer, error) {
	var key crypto.Signer
	var err error
	if alg == jose.RS256 {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	return key, writeFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// jwks returns the issuer's public keys.
func (i *issuer) jwks() ([]byte, error) {
	return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{i.public}})
}

// sign returns a token with the given claims over [issued, expires).
func (i *issuer) sign(issued, expires time.Time, audience []string, claims map[string]any) (string, error) {
	std := jwt.Claims{
		Issuer:    i.name,
		Audience:  audience,
		IssuedAt:  jwt.NewNumericDate(issued),
		NotBefore: jwt.NewNumericDate(issued),
		Expiry:    jwt.NewNumericDate(expires),
		ID:        newUID(),
	}
	token, err := jwt.Signed(i.signer).Claims(std).Claims(claims).Serialize()
	if err != nil {
		return "", fmt.Errorf("up: %w", err)
	}
	return token, nil
}

// tokenFile is one token kept fresh on disk.
type tokenFile struct {
	path     string
	issuer   *issuer
	audience []string
	claims   map[string]any
	// lifetime below zero makes a token that is long expired.
	lifetime time.Duration
}

// issuers keeps every token file fresh.
type issuers struct {
	files []tokenFile
	now   func() time.Time
	log   *slog.Logger
}

// refresh writes every token anew.
func (i *issuers) refresh() error {
	now := i.now()
	for _, f := range i.files {
		// A second in the past, so that a reader with a slightly slower clock takes it.
		issued, expires := now.Add(-time.Second), now.Add(f.lifetime)
		if f.lifetime < 0 {
			issued = expires.Add(-time.Hour)
		}
		token, err := f.issuer.sign(issued, expires, f.audience, f.claims)
		if err != nil {
			return err
		}
		if err := writeFile(f.path, []byte(token), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Run refreshes tokens until ctx ends. A failed refresh is retried soon: what is
// on disk stays valid for minutes.
func (i *issuers) Run(ctx context.Context) error {
	wait := refreshEvery
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = refreshEvery
		if err := i.refresh(); err != nil {
			i.log.Error("tokens could not be refreshed", "error", err)
			wait = 5 * time.Second
		}
	}
}
