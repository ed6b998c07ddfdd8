package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

const (
	// maxCSR bounds a request before it is parsed. An RSA 8192 request with
	// every allowed extension is about 3 KiB, as PEM 4.
	maxCSR        = 16 << 10
	minRSA        = 2048
	maxRSA        = 8192
	minRSAPublicE = 65537
)

var (
	oidExtensionRequest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}
	oidSAN              = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidServerAuth       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}
	oidClientAuth       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
)

// csrKey is all that is taken from a CSR: a public key whose private half the
// caller has.
type csrKey struct {
	public crypto.PublicKey
	// keyID is the key's identifier, by RFC 7093 2(1).
	keyID []byte
}

func refuse(field, format string, args ...any) error {
	return &RequestError{Field: field, Reason: fmt.Sprintf(format, args...)}
}

// checkCSR takes the public key out of a CSR after proof of possession. Names in
// it must be those of id or absent, and it may ask for nothing that the profile
// does not give; else it is refused, never corrected. Every error is a
// *RequestError.
func checkCSR(raw []byte, id spiffeid.ID) (*csrKey, error) {
	der, err := csrDER(raw)
	if err != nil {
		return nil, err
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, refuse("csr", "cannot be parsed as PKCS #10")
	}
	if req.Version != 0 {
		return nil, refuse("csr.version", "%d, want 0 (v1)", req.Version)
	}
	if err := checkPublicKey(req.PublicKey); err != nil {
		return nil, refuse("csr.key", "%v", err)
	}
	if !strongSignature(req.SignatureAlgorithm) {
		return nil, refuse("csr.signature", "algorithm %v is not accepted", req.SignatureAlgorithm)
	}
	// Names come before the signature: refusing them is the cheaper check.
	if err := checkSubject(req.RawSubject); err != nil {
		return nil, err
	}
	if err := checkAttributes(req); err != nil {
		return nil, err
	}
	if err := checkExtensions(req.Extensions, id); err != nil {
		return nil, err
	}
	if err := req.CheckSignature(); err != nil {
		return nil, refuse("csr.signature", "does not prove possession of the key")
	}
	keyID, err := keyIdentifier(req.RawSubjectPublicKeyInfo)
	if err != nil {
		return nil, refuse("csr.key", "cannot be parsed")
	}
	return &csrKey{public: req.PublicKey, keyID: keyID}, nil
}

// csrDER takes PEM or DER. PEM holds one block and nothing else.
func csrDER(raw []byte) ([]byte, error) {
	if len(raw) == 0 {
		return nil, refuse("csr", "is empty")
	}
	if len(raw) > maxCSR {
		return nil, refuse("csr", "has %d bytes, at most %d are taken", len(raw), maxCSR)
	}
	if raw[0] == 0x30 { // a DER sequence; no PEM begins so
		return raw, nil
	}
	text := bytes.TrimSpace(raw)
	if !bytes.HasPrefix(text, []byte("-----BEGIN ")) {
		return nil, refuse("csr", "is neither PEM nor DER")
	}
	block, rest := pem.Decode(text)
	if block == nil || bytes.Count(text, []byte("-----BEGIN ")) != 1 {
		return nil, refuse("csr", "one whole PEM block is wanted")
	}
	if block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
		return nil, refuse("csr", "PEM block is not a CERTIFICATE REQUEST")
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, refuse("csr", "has data after its PEM block")
	}
	return block.Bytes, nil
}

// checkPublicKey refuses keys that are weak or that verifiers do not know.
func checkPublicKey(public crypto.PublicKey) error {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return fmt.Errorf("curve %s is not accepted, use P-256 or P-384", k.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < minRSA || bits > maxRSA {
			return fmt.Errorf("RSA of %d bits is not accepted, use %d to %d", bits, minRSA, maxRSA)
		}
		if k.E < minRSAPublicE || k.E%2 == 0 {
			return fmt.Errorf("RSA exponent %d is not accepted, use 65537", k.E)
		}
		if k.N.Bit(0) == 0 {
			return fmt.Errorf("RSA modulus is even")
		}
	default:
		return fmt.Errorf("the key's type is not accepted, use ECDSA P-256 or P-384, Ed25519 or RSA")
	}
	return nil
}

func strongSignature(a x509.SignatureAlgorithm) bool {
	switch a {
	case x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.PureEd25519,
		x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS:
		return true
	}
	return false
}

// checkSubject takes an empty subject, and one of empty values as absent: an
// older istio-agent sends an empty organization.
func checkSubject(raw []byte) error {
	if bytes.Equal(raw, []byte{0x30, 0}) {
		return nil
	}
	var rdns pkix.RDNSequence
	if rest, err := asn1.Unmarshal(raw, &rdns); err != nil || len(rest) > 0 {
		return refuse("csr.subject", "cannot be parsed")
	}
	for _, rdn := range rdns {
		for _, attribute := range rdn {
			if s, ok := attribute.Value.(string); !ok || s != "" {
				return refuse("csr.subject", "must be empty: an identity is attested, not asked for")
			}
		}
	}
	return nil
}

// checkAttributes lets only one extension request through.
func checkAttributes(req *x509.CertificateRequest) error {
	outer := cryptobyte.String(req.RawTBSCertificateRequest)
	var info, attributes cryptobyte.String
	var has bool
	if !outer.ReadASN1(&info, cbasn1.SEQUENCE) ||
		!info.SkipASN1(cbasn1.INTEGER) || !info.SkipASN1(cbasn1.SEQUENCE) || !info.SkipASN1(cbasn1.SEQUENCE) ||
		!info.ReadOptionalASN1(&attributes, &has, cbasn1.Tag(0).Constructed().ContextSpecific()) || !info.Empty() {
		return refuse("csr.attributes", "cannot be parsed")
	}
	seen := false
	for !attributes.Empty() {
		var attribute, values, extensions cryptobyte.String
		var oid asn1.ObjectIdentifier
		if !attributes.ReadASN1(&attribute, cbasn1.SEQUENCE) || !attribute.ReadASN1ObjectIdentifier(&oid) ||
			!attribute.ReadASN1(&values, cbasn1.SET) || !attribute.Empty() {
			return refuse("csr.attributes", "cannot be parsed")
		}
		if !oid.Equal(oidExtensionRequest) {
			return refuse("csr.attributes", "attribute %v is not accepted", oid)
		}
		if seen || !values.ReadASN1(&extensions, cbasn1.SEQUENCE) || !values.Empty() {
			return refuse("csr.attributes", "more than one extension request")
		}
		seen = true
	}
	return nil
}

func checkExtensions(extensions []pkix.Extension, id spiffeid.ID) error {
	for i, e := range extensions {
		if slices.ContainsFunc(extensions[:i], func(o pkix.Extension) bool { return o.Id.Equal(e.Id) }) {
			return refuse("csr.extensions", "extension %v is requested twice", e.Id)
		}
		var err error
		switch {
		case e.Id.Equal(oidSAN):
			err = checkSAN(e.Value, id)
		case e.Id.Equal(oidBasicConstraints):
			err = checkBasicConstraints(e.Value)
		case e.Id.Equal(oidKeyUsage):
			err = checkKeyUsage(e.Value)
		case e.Id.Equal(oidExtKeyUsage):
			err = checkExtKeyUsage(e.Value)
		default:
			err = refuse("csr.extensions", "extension %v is not accepted", e.Id)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkSAN reads every general name: the standard library skips kinds it does
// not know.
func checkSAN(value []byte, id spiffeid.ID) error {
	input := cryptobyte.String(value)
	var names cryptobyte.String
	if !input.ReadASN1(&names, cbasn1.SEQUENCE) || !input.Empty() {
		return refuse("csr.san", "cannot be parsed")
	}
	for seen := false; !names.Empty(); seen = true {
		var name cryptobyte.String
		var tag cbasn1.Tag
		if !names.ReadAnyASN1(&name, &tag) {
			return refuse("csr.san", "cannot be parsed")
		}
		if tag != cbasn1.Tag(6).ContextSpecific() {
			return refuse("csr.san", "only a URI is accepted, not DNS names, IP addresses, e-mail or others")
		}
		if seen {
			return refuse("csr.san", "more than one URI")
		}
		if string(name) != id.String() {
			// For the audit record: who asked to be whom. It is the caller's text,
			// so it is quoted and short.
			return refuse("csr.san", "URI differs from the attested identity: %q", name[:min(len(name), 256)])
		}
	}
	return nil
}

func checkBasicConstraints(value []byte) error {
	input := cryptobyte.String(value)
	var seq cryptobyte.String
	isCA := false
	if !input.ReadASN1(&seq, cbasn1.SEQUENCE) || !input.Empty() || !optionalBoolean(&seq, &isCA) {
		return refuse("csr.basicConstraints", "cannot be parsed")
	}
	if isCA || !seq.Empty() {
		return refuse("csr.basicConstraints", "asks for a CA")
	}
	return nil
}

// optionalBoolean also takes an explicit false, which some clients write.
func optionalBoolean(in *cryptobyte.String, out *bool) bool {
	return !in.PeekASN1Tag(cbasn1.BOOLEAN) || in.ReadASN1Boolean(out)
}

// checkKeyUsage refuses the usages of a CA; among the others the profile
// chooses.
func checkKeyUsage(value []byte) error {
	var bits asn1.BitString
	if rest, err := asn1.Unmarshal(value, &bits); err != nil || len(rest) > 0 {
		return refuse("csr.keyUsage", "cannot be parsed")
	}
	const keyCertSign, cRLSign = 5, 6
	if bits.At(keyCertSign) != 0 || bits.At(cRLSign) != 0 {
		return refuse("csr.keyUsage", "asks to sign certificates or CRLs")
	}
	return nil
}

func checkExtKeyUsage(value []byte) error {
	var usages []asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(value, &usages); err != nil || len(rest) > 0 {
		return refuse("csr.extKeyUsage", "cannot be parsed")
	}
	for _, u := range usages {
		if !u.Equal(oidServerAuth) && !u.Equal(oidClientAuth) {
			return refuse("csr.extKeyUsage", "%s is not accepted, only serverAuth and clientAuth", strings.TrimSpace(u.String()))
		}
	}
	return nil
}
