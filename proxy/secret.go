package proxy

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// secret is what we read of an envoy.extensions.transport_sockets.tls.v3.Secret.
// It is read field by field: the generated package would bring a third of
// Envoy's configuration into every sidecar's memory.
type secret struct {
	// chain and key are of tls_certificate, PEM.
	chain, key []byte
	// roots is validation_context.trusted_ca, PEM.
	roots []byte
}

// Field numbers in extensions/transport_sockets/tls/v3/{secret,common}.proto and config/core/v3/base.proto.
const (
	secretCertificate       = 2
	secretValidationContext = 4
	certificateChain        = 1
	certificatePrivateKey   = 2
	validationTrustedCA     = 1
	dataSourceInlineBytes   = 2
	dataSourceInlineString  = 3
)

func parseSecret(b []byte) (s secret, err error) {
	err = fields(b, func(n protowire.Number, v []byte) error {
		switch n {
		case secretCertificate:
			return fields(v, func(n protowire.Number, v []byte) (err error) {
				switch n {
				case certificateChain:
					s.chain, err = inline(v)
				case certificatePrivateKey:
					s.key, err = inline(v)
				}
				return err
			})
		case secretValidationContext:
			return fields(v, func(n protowire.Number, v []byte) (err error) {
				if n == validationTrustedCA {
					s.roots, err = inline(v)
				}
				return err
			})
		}
		return nil
	})
	if err != nil {
		return secret{}, fmt.Errorf("malformed secret: %w", err)
	}
	return s, nil
}

// inline reads a DataSource, of which only contents given inline are taken: a
// file name would have us read what the agent's socket names.
func inline(b []byte) (data []byte, err error) {
	err = fields(b, func(n protowire.Number, v []byte) error {
		if n != dataSourceInlineBytes && n != dataSourceInlineString {
			return errors.New("data is not inline")
		}
		data = v
		return nil
	})
	return data, err
}

// fields visits the length-delimited fields of a message, and passes over others.
func fields(b []byte, visit func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return protowire.ParseError(size)
		}
		b = b[size:]
		if kind != protowire.BytesType {
			if size = protowire.ConsumeFieldValue(n, kind, b); size < 0 {
				return protowire.ParseError(size)
			}
			b = b[size:]
			continue
		}
		v, size := protowire.ConsumeBytes(b)
		if size < 0 {
			return protowire.ParseError(size)
		}
		b = b[size:]
		if err := visit(n, v); err != nil {
			return err
		}
	}
	return nil
}
