package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// KeyStore keeps the authority's own keys with the certificates that belong to
// them. As documents now; a KMS, whose keys never leave it, fits the same two calls.
type KeyStore interface {
	// Load returns what was stored for role, or an error that is fs.ErrNotExist.
	Load(ctx context.Context, role Role) (*KeyPair, error)
	// Create makes a new key, asks certify for its chain, and returns when both
	// are durable; until then an older pair of that role stays.
	Create(ctx context.Context, role Role, certify func(key crypto.Signer) ([]*x509.Certificate, error)) (*KeyPair, error)
	// Where names the place of a pair, for messages.
	Where(role Role) string
}

// KeyPair is a key and its chain, own certificate first.
type KeyPair struct {
	Key   crypto.Signer
	Chain []*x509.Certificate
}

// pairStore keeps each pair in one document, so that no crash can part them.
type pairStore struct{ blobs Blobs }

func pairName(role Role) string { return string(role) + ".pem" }

// Where implements KeyStore.
func (p pairStore) Where(role Role) string { return p.blobs.Where(pairName(role)) }

// Load implements KeyStore.
func (p pairStore) Load(ctx context.Context, role Role) (*KeyPair, error) {
	data, err := p.blobs.Read(ctx, pairName(role))
	if err != nil {
		return nil, err
	}
	pair, err := parseKeyPair(data)
	if err != nil {
		return nil, &damagedError{fmt.Errorf("%s: %w", p.Where(role), err)}
	}
	return pair, nil
}

// damagedError says that a document was read and is no good; other errors of a
// store may pass.
type damagedError struct{ error }

// Unwrap returns the cause.
func (e *damagedError) Unwrap() error { return e.error }

func damaged(err error) bool {
	var d *damagedError
	return errors.As(err, &d)
}

// Create implements KeyStore.
func (p pairStore) Create(ctx context.Context, role Role, certify func(crypto.Signer) ([]*x509.Certificate, error)) (*KeyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	chain, err := certify(key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	data := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	for _, c := range chain {
		data = append(data, encodeCertificate(c)...)
	}
	if err := p.blobs.Write(ctx, pairName(role), data); err != nil {
		return nil, err
	}
	return &KeyPair{Key: key, Chain: chain}, nil
}

// parseKeyPair reads one private key and then at least one certificate, whole
// and nothing else, and checks that they belong together.
func parseKeyPair(data []byte) (*KeyPair, error) {
	blocks, err := pemBlocks(data)
	if err != nil {
		return nil, err
	}
	if len(blocks) < 2 || blocks[0].Type == "CERTIFICATE" {
		return nil, errors.New("is half-written: a private key and its certificate are wanted")
	}
	key, err := parsePrivateKey(blocks[0])
	if err != nil {
		return nil, err
	}
	chain, err := parseCertificates(blocks[1:])
	if err != nil {
		return nil, err
	}
	pair := &KeyPair{Key: key, Chain: chain}
	return pair, pair.check()
}

func (p *KeyPair) check() error {
	if len(p.Chain) == 0 {
		return errors.New("has no certificate")
	}
	public, ok := p.Key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(p.Chain[0].PublicKey) {
		return errors.New("the private key does not belong to the certificate")
	}
	return nil
}

// pemBlocks reads PEM strictly: nothing before, between or after the blocks.
func pemBlocks(data []byte) ([]*pem.Block, error) {
	var blocks []*pem.Block
	for data = bytes.TrimSpace(data); len(data) > 0; data = bytes.TrimSpace(data) {
		if !bytes.HasPrefix(data, []byte("-----BEGIN ")) {
			return nil, errors.New("is half-written or holds something else than PEM")
		}
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("is half-written: a PEM block does not end")
		}
		// Decode skips what it cannot read and takes a later block: a cut one
		// must not vanish that way.
		if used := data[:len(data)-len(rest)]; bytes.Count(used, []byte("-----BEGIN ")) != 1 {
			return nil, errors.New("is half-written: a PEM block does not end")
		}
		blocks = append(blocks, block)
		data = rest
	}
	if len(blocks) == 0 {
		return nil, errors.New("is empty")
	}
	return blocks, nil
}

func parsePrivateKey(block *pem.Block) (crypto.Signer, error) {
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("holds a PEM block %q where an unencrypted private key is wanted", block.Type)
	}
	if err != nil {
		// The cause could quote key bytes; the kind of failure is enough.
		return nil, errors.New("holds a private key that cannot be read")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("holds a key that cannot sign")
	}
	if err := checkPublicKey(signer.Public()); err != nil {
		return nil, fmt.Errorf("holds a weak key: %w", err)
	}
	return signer, nil
}

func parseCertificates(blocks []*pem.Block) ([]*x509.Certificate, error) {
	certs := make([]*x509.Certificate, 0, len(blocks))
	for _, b := range blocks {
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a PEM block %q where a certificate is wanted", b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("holds a certificate that cannot be read: %w", err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

func encodeCertificate(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}
