package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"

	"castellan.dev/ca/ledger"
)

// issuing is a certificate that signs, with its key. It is immutable. The key is
// used by order.SignMessage and nowhere else.
type issuing struct {
	key  crypto.Signer
	cert *x509.Certificate
	// chain goes with what is signed: cert and what is above it, without roots, DER.
	chain [][]byte
	// window is when the whole chain up to its root is valid.
	window window
}

// order is one certificate to be signed, once. It is the crypto.MessageSigner
// that x509.CreateCertificate hands the to-be-signed bytes to, so what is linted
// and recorded is what is signed, by construction (trust rule 7).
type order struct {
	ctx    context.Context
	ledger ledger.Recorder
	// issuer signs; nil for a root, which key signs.
	issuer *issuing
	key    crypto.Signer
	// entry is what the attestation knows; SignMessage adds what the bytes say.
	entry ledger.Entry
	// lint is the profile's part.
	lint func(*tbs) error

	used bool
	seq  uint64
}

var _ crypto.MessageSigner = (*order)(nil)

// sign carries out the order: template → (lint → intent → sign) → result.
func (o *order) sign(template *x509.Certificate, public crypto.PublicKey) ([]byte, error) {
	parent := template
	if o.issuer != nil {
		parent, o.key = o.issuer.cert, o.issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, o)
	if o.seq != 0 {
		result := ledger.Result{Outcome: ledger.Failed}
		if err == nil {
			result = ledger.Result{Outcome: ledger.Issued, LeafHash: sha256.Sum256(der)}
		}
		o.ledger.Result(o.seq, result)
	}
	if err != nil {
		return nil, err
	}
	return der, nil
}

// Public implements crypto.Signer.
func (o *order) Public() crypto.PublicKey { return o.key.Public() }

// Sign implements crypto.Signer by refusing: a digest cannot be linted.
func (o *order) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, fmt.Errorf("%w: only whole certificates are signed, not digests", ErrLint)
}

// SignMessage lints, records, then signs, in this order; any failure before the
// last step leaves nothing signed.
func (o *order) SignMessage(random io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if o.used {
		return nil, fmt.Errorf("%w: an order is signed once", ErrLint)
	}
	o.used = true
	t, err := readTBS(message)
	if err == nil {
		err = t.lintAny(o.issuer)
	}
	if err == nil {
		err = o.lint(t)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLint, err)
	}
	o.describe(t)
	seq, err := o.ledger.Intent(o.ctx, o.entry)
	if err != nil {
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return nil, fmt.Errorf("ca: given up before signing: %w", err)
		}
		return nil, fmt.Errorf("%w: %w", ErrLedger, err)
	}
	o.seq = seq
	return crypto.SignMessage(o.key, random, message, opts)
}

// describe fills the row from the bytes, not from the template.
func (o *order) describe(t *tbs) {
	o.entry.Serial = serialString(t.serial)
	o.entry.SubjectKeyID, _ = t.subjectKeyID()
	o.entry.IssuerKeyID = o.entry.SubjectKeyID
	if o.issuer != nil {
		o.entry.IssuerKeyID = o.issuer.cert.SubjectKeyId
	}
	o.entry.TBSHash = sha256.Sum256(t.raw)
	o.entry.NotBefore, o.entry.NotAfter = t.notBefore, t.notAfter
}

// serialString is lower-case hex without leading zeros, as everywhere.
func serialString(b []byte) string {
	s := strings.TrimLeft(hex.EncodeToString(b), "0")
	return s
}

// SerialString returns a certificate's serial number as the ledger has it.
func SerialString(serial *big.Int) string { return serial.Text(16) }

func sameRanges(a, b []*net.IPNet) bool {
	return slices.EqualFunc(a, b, func(x, y *net.IPNet) bool { return x.IP.Equal(y.IP) && x.Mask.String() == y.Mask.String() })
}
