package sds

import (
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"castellan.dev/internal/xds"
)

// spiffeValidator is the name of Envoy's certificate validator extension that
// chooses the roots by the trust domain of the peer's SPIFFE ID.
const spiffeValidator = "envoy.tls.cert_validator.spiffe"

// source makes secrets of the provider's material, once for all streams.
type source struct {
	provider Provider
	log      *slog.Logger
	made     atomic.Pointer[made]
}

type made struct {
	of       *Material
	snapshot xds.Snapshot
}

// Resources implements xds.Source.
func (s *source) Resources(typeURL string) (xds.Snapshot, <-chan struct{}) {
	if typeURL != TypeSecret {
		return nil, nil
	}
	m, changed := s.provider.Material()
	if m == nil {
		return nil, changed
	}
	if last := s.made.Load(); last != nil && last.of == m {
		return last.snapshot, changed
	}
	snapshot, err := secrets(m)
	if err != nil {
		// Streams keep what they have, and new ones wait: better than half of it.
		s.log.Error("material cannot be served", slog.String("spiffe_id", m.ID.String()), slog.Any("error", err))
		if last := s.made.Load(); last != nil {
			return last.snapshot, changed
		}
		return nil, changed
	}
	s.made.Store(&made{of: m, snapshot: snapshot})
	return snapshot, changed
}

func (s *source) wipe() {
	if last := s.made.Load(); last != nil {
		for _, r := range last.snapshot {
			clear(r.Body.GetValue())
		}
	}
}

// secrets builds every name. It is all or nothing: above all a validation context
// without roots must never leave, since Envoy takes it for "verify nothing".
func secrets(m *Material) (xds.Snapshot, error) {
	if len(m.Chain) == 0 || len(m.KeyPKCS8) == 0 || m.ID.IsZero() {
		return nil, errors.New("sds: no certificate or no key")
	}
	if m.TrustDomain.IsZero() || len(m.Roots) == 0 {
		return nil, fmt.Errorf("sds: no roots of the workload's own trust domain %q", m.TrustDomain)
	}
	domains := map[spiffeid.TrustDomain][]byte{}
	for td, roots := range m.Federated {
		if !td.IsZero() && len(roots) > 0 { // one without roots (JWT only) is nobody to Envoy
			domains[td] = encode("CERTIFICATE", roots...)
		}
	}
	// Last, so that no federated bundle can take the place of our own.
	domains[m.TrustDomain] = encode("CERTIFICATE", m.Roots...)

	b := builder{snapshot: xds.Snapshot{}}
	b.certificate(NameDefault, m)
	b.certificate(m.ID.String(), m)
	b.validation(NameRoot, &tlsv3.CertificateValidationContext{TrustedCa: inline(domains[m.TrustDomain])})
	for td, roots := range domains {
		// trusted_ca is for clients that do not know the extension; Envoy leaves
		// everything to it.
		b.spiffe(td.IDString(), inline(roots), map[spiffeid.TrustDomain][]byte{td: roots})
	}
	b.spiffe(NameAll, nil, domains)
	return b.snapshot, b.err
}

// builder collects secrets and the first error.
type builder struct {
	snapshot xds.Snapshot
	err      error
}

func (b *builder) certificate(name string, m *Material) {
	body := b.pack(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(encode("CERTIFICATE", m.Chain...)),
		PrivateKey:       inline(encode("PRIVATE KEY", m.KeyPKCS8)),
	}}})
	// The leaf binds the key, so the chain alone says which version this is, and no
	// version has anything of a private key in it.
	b.snapshot[name] = xds.Resource{Name: name, Version: xds.ContentVersion(m.Chain...), Body: body}
}

func (b *builder) validation(name string, ctx *tlsv3.CertificateValidationContext) {
	body := b.pack(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: ctx}})
	b.snapshot[name] = xds.Resource{Name: name, Version: xds.ContentVersion(body.GetValue()), Body: body}
}

// spiffe is what SPIRE serves under trust domain IDs and "ALL".
func (b *builder) spiffe(name string, ca *corev3.DataSource, domains map[spiffeid.TrustDomain][]byte) {
	cfg := &tlsv3.SPIFFECertValidatorConfig{}
	for td, roots := range domains {
		cfg.TrustDomains = append(cfg.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{Name: td.Name(), TrustBundle: inline(roots)})
	}
	slices.SortFunc(cfg.TrustDomains, func(a, b *tlsv3.SPIFFECertValidatorConfig_TrustDomain) int {
		return strings.Compare(a.GetName(), b.GetName())
	})
	b.validation(name, &tlsv3.CertificateValidationContext{
		TrustedCa:             ca,
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: b.pack(cfg)},
	})
}

func (b *builder) pack(m proto.Message) *anypb.Any {
	out := &anypb.Any{}
	if err := anypb.MarshalFrom(out, m, proto.MarshalOptions{Deterministic: true}); err != nil && b.err == nil {
		b.err = errors.New("sds: packing a secret failed") // the cause could show the secret
	}
	return out
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func encode(kind string, blocks ...[]byte) []byte {
	var out []byte
	for _, der := range blocks {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
	}
	return out
}
