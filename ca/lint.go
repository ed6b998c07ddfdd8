package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// tbs is a to-be-signed certificate, read back from the very bytes that will be
// signed and not from the template they came from.
type tbs struct {
	raw           []byte
	serial        []byte // two's complement, as encoded
	issuer        []byte
	subject       []byte
	spki          []byte
	notBefore     time.Time
	notAfter      time.Time
	extensions    [7]extension
	extensionSeen [7]bool
}

type extension struct {
	critical bool
	value    cryptobyte.String
}

// The extensions any of our profiles has; others are refused. All are
// 2.5.29.x, and index this array by x.
const (
	extSKI = iota
	extKeyUsage
	extSAN
	extBasicConstraints
	extNameConstraints
	extAKI
	extEKU
)

func extensionIndex(oid []byte) (int, bool) {
	if len(oid) != 3 || oid[0] != 0x55 || oid[1] != 0x1d {
		return 0, false
	}
	switch oid[2] {
	case 14:
		return extSKI, true
	case 15:
		return extKeyUsage, true
	case 17:
		return extSAN, true
	case 19:
		return extBasicConstraints, true
	case 30:
		return extNameConstraints, true
	case 35:
		return extAKI, true
	case 37:
		return extEKU, true
	}
	return 0, false
}

var errTBS = errors.New("cannot be parsed")

// readTBS parses the bytes, allocating next to nothing: it runs per signature.
func readTBS(raw []byte) (*tbs, error) {
	t := &tbs{raw: raw}
	outer := cryptobyte.String(raw)
	var in, serial, validity, extensions cryptobyte.String
	var version int64
	if !outer.ReadASN1(&in, cbasn1.SEQUENCE) || !outer.Empty() ||
		!in.ReadOptionalASN1Integer(&version, cbasn1.Tag(0).Constructed().ContextSpecific(), int64(0)) ||
		!in.ReadASN1(&serial, cbasn1.INTEGER) || !in.SkipASN1(cbasn1.SEQUENCE) ||
		!in.ReadASN1Element((*cryptobyte.String)(&t.issuer), cbasn1.SEQUENCE) ||
		!in.ReadASN1(&validity, cbasn1.SEQUENCE) ||
		!in.ReadASN1Element((*cryptobyte.String)(&t.subject), cbasn1.SEQUENCE) ||
		!in.ReadASN1Element((*cryptobyte.String)(&t.spki), cbasn1.SEQUENCE) {
		return nil, errTBS
	}
	t.serial = serial
	if version != 2 {
		return nil, fmt.Errorf("version is %d, want 2 (v3)", version)
	}
	if !readTime(&validity, &t.notBefore) || !readTime(&validity, &t.notAfter) || !validity.Empty() {
		return nil, errors.New("validity cannot be parsed")
	}
	var wrapped cryptobyte.String
	if !in.ReadASN1(&wrapped, cbasn1.Tag(3).Constructed().ContextSpecific()) || !in.Empty() ||
		!wrapped.ReadASN1(&extensions, cbasn1.SEQUENCE) || !wrapped.Empty() {
		return nil, errors.New("extensions cannot be parsed")
	}
	return t, t.readExtensions(extensions)
}

func (t *tbs) readExtensions(in cryptobyte.String) error {
	for !in.Empty() {
		var e, oid, value cryptobyte.String
		critical := false
		if !in.ReadASN1(&e, cbasn1.SEQUENCE) || !e.ReadASN1(&oid, cbasn1.OBJECT_IDENTIFIER) ||
			!readDefaultFalse(&e, &critical) ||
			!e.ReadASN1(&value, cbasn1.OCTET_STRING) || !e.Empty() {
			return errors.New("extensions cannot be parsed")
		}
		i, ok := extensionIndex(oid)
		if !ok {
			return fmt.Errorf("extension %x is in no profile", []byte(oid))
		}
		if t.extensionSeen[i] {
			return fmt.Errorf("extension %x is there twice", []byte(oid))
		}
		t.extensionSeen[i] = true
		t.extensions[i] = extension{critical, value}
	}
	return nil
}

// readDefaultFalse reads a BOOLEAN DEFAULT FALSE; DER has no place for an
// explicit false.
func readDefaultFalse(in *cryptobyte.String, out *bool) bool {
	*out = false
	if !in.PeekASN1Tag(cbasn1.BOOLEAN) {
		return true
	}
	return in.ReadASN1Boolean(out) && *out
}

// readTime holds RFC 5280 4.1.2.5: UTCTime through 2049, GeneralizedTime after.
func readTime(in *cryptobyte.String, out *time.Time) bool {
	if in.PeekASN1Tag(cbasn1.UTCTime) {
		return in.ReadASN1UTCTime(out)
	}
	return in.ReadASN1GeneralizedTime(out) && out.Year() >= 2050
}

// lintAny holds for every certificate: RFC 5280 4.1 and 4.2, and the bounds of
// its issuer. issuer is nil for a root.
func (t *tbs) lintAny(issuer *issuing) error {
	switch {
	case len(t.serial) == 0 || len(t.serial) > 20 || t.serial[0]&0x80 != 0 || bytes.Equal(t.serial, []byte{0}):
		return errors.New("serial number is not positive and of at most 20 octets")
	case len(t.issuer) <= 2:
		return errors.New("issuer is empty")
	case !t.notBefore.Before(t.notAfter):
		return errors.New("validity is empty")
	}
	keyID, err := keyIdentifier(t.spki)
	if err != nil {
		return err
	}
	ski, ok := t.subjectKeyID()
	if !ok || t.extensions[extSKI].critical || !bytes.Equal(ski, keyID) {
		return errors.New("subject key identifier is missing, critical or not the key's")
	}
	if issuer == nil {
		if !bytes.Equal(t.issuer, t.subject) {
			return errors.New("root is not issued by itself")
		}
		return nil
	}
	aki, ok := t.authorityKeyID()
	switch {
	case !bytes.Equal(t.issuer, issuer.cert.RawSubject):
		return errors.New("issuer is not the name of what signs")
	case !ok || t.extensions[extAKI].critical || !bytes.Equal(aki, issuer.cert.SubjectKeyId):
		return errors.New("authority key identifier is missing, critical or not that of what signs")
	case bytes.Equal(ski, aki):
		return errors.New("subject has the key of its issuer")
	case t.notBefore.Before(issuer.window.notBefore) || t.notAfter.After(issuer.window.notAfter):
		return errors.New("validity reaches beyond that of the issuer")
	}
	return nil
}

func (t *tbs) subjectKeyID() ([]byte, bool) {
	value, id := t.extensions[extSKI].value, cryptobyte.String(nil)
	ok := value.ReadASN1(&id, cbasn1.OCTET_STRING) && value.Empty() && len(id) > 0
	return id, ok
}

func (t *tbs) authorityKeyID() ([]byte, bool) {
	value := t.extensions[extAKI].value
	var seq, id cryptobyte.String
	ok := value.ReadASN1(&seq, cbasn1.SEQUENCE) && value.Empty() &&
		seq.ReadASN1(&id, cbasn1.Tag(0).ContextSpecific()) && seq.Empty() && len(id) > 0
	return id, ok
}

// What an SVID's extensions hold, byte for byte. DER has one form for each.
var (
	derDigitalSignature = []byte{0x03, 0x02, 0x07, 0x80}
	derServerAndClient  = []byte{0x30, 0x14,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02}
	derNotCA        = []byte{0x30, 0x00}
	derEmptySubject = []byte{0x30, 0x00}
)

// lintSVID holds the leaf rules of X509-SVID (spiffe-06 to spiffe-11) for the
// identity id.
func (t *tbs) lintSVID(id string) error {
	uri, n := t.soleURI()
	switch {
	case n != 1:
		return errors.New("spiffe-06: not exactly one name, a URI, in the SAN")
	case string(uri) != id:
		return errors.New("spiffe-06: URI is not the attested identity")
	case !workloadID(id):
		return errors.New("spiffe-07: the ID has no path")
	case !bytes.Equal(t.subject, derEmptySubject):
		return errors.New("spiffe-07: the subject is not empty")
	case !t.extensions[extSAN].critical:
		return errors.New("spiffe-07: subject is empty and the SAN not critical")
	case !t.holds(extBasicConstraints, true, derNotCA):
		return errors.New("spiffe-08: basic constraints are not those of a leaf")
	case !t.holds(extKeyUsage, true, derDigitalSignature):
		return errors.New("spiffe-09, spiffe-10: key usage is not critical and digitalSignature alone")
	case !t.holds(extEKU, false, derServerAndClient):
		return errors.New("spiffe-11: extended key usage is not serverAuth and clientAuth")
	case t.extensionSeen[extNameConstraints]:
		return errors.New("a leaf has name constraints")
	}
	return nil
}

func (t *tbs) holds(i int, critical bool, value []byte) bool {
	return t.extensionSeen[i] && t.extensions[i].critical == critical && bytes.Equal(t.extensions[i].value, value)
}

// soleURI returns the SAN's only URI and how many names there are; any name of
// another kind makes that -1.
func (t *tbs) soleURI() (uri []byte, names int) {
	value := t.extensions[extSAN].value
	var seq cryptobyte.String
	if !value.ReadASN1(&seq, cbasn1.SEQUENCE) || !value.Empty() {
		return nil, -1
	}
	for ; !seq.Empty(); names++ {
		var name cryptobyte.String
		var tag cbasn1.Tag
		if !seq.ReadAnyASN1(&name, &tag) || tag != cbasn1.Tag(6).ContextSpecific() {
			return nil, -1
		}
		uri = name
	}
	return uri, names
}

// workloadID reports whether id, "spiffe://TD/…", has a path.
func workloadID(id string) bool {
	const scheme = "spiffe://"
	if len(id) <= len(scheme) || id[:len(scheme)] != scheme {
		return false
	}
	i := bytes.IndexByte([]byte(id[len(scheme):]), '/')
	return i > 0 && len(id) > len(scheme)+i+1
}

// asCertificate parses the bytes as the standard library will later, which takes
// a signature for granted: for the rare certificates, where cost does not count.
func (t *tbs) asCertificate() (*x509.Certificate, error) {
	in := cryptobyte.String(t.raw)
	var seq, algorithm cryptobyte.String
	if !in.ReadASN1(&seq, cbasn1.SEQUENCE) ||
		!seq.SkipOptionalASN1(cbasn1.Tag(0).Constructed().ContextSpecific()) || !seq.SkipASN1(cbasn1.INTEGER) ||
		!seq.ReadASN1Element(&algorithm, cbasn1.SEQUENCE) {
		return nil, errTBS
	}
	der, err := asn1.Marshal([]any{
		asn1.RawValue{FullBytes: t.raw}, asn1.RawValue{FullBytes: algorithm}, asn1.BitString{Bytes: []byte{0}, BitLength: 8},
	})
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// lintCA holds the rules of a signing certificate (spiffe-08, 09, 12) against
// what was meant.
func (t *tbs) lintCA(want *x509.Certificate) error {
	got, err := t.asCertificate()
	if err != nil {
		return err
	}
	pathLen := want.MaxPathLen
	switch {
	case !got.BasicConstraintsValid || !got.IsCA || !t.extensions[extBasicConstraints].critical:
		return errors.New("spiffe-08: basic constraints are not critical and those of a CA")
	case got.MaxPathLen != pathLen || (pathLen == 0) != got.MaxPathLenZero:
		return fmt.Errorf("path length is %d, want %d", got.MaxPathLen, pathLen)
	case got.KeyUsage != want.KeyUsage || !t.extensions[extKeyUsage].critical:
		return errors.New("spiffe-09: key usage is not critical and as meant")
	case got.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("spiffe-12: key usage lacks keyCertSign")
	case len(got.URIs) > 1 || len(got.DNSNames)+len(got.IPAddresses)+len(got.EmailAddresses) > 0:
		return errors.New("spiffe-12: a signing certificate has other names than one SPIFFE ID")
	case len(got.URIs) == 1 && got.URIs[0].Path != "":
		return errors.New("spiffe-12: a signing certificate's ID has a path")
	case len(got.RawSubject) <= 2:
		return errors.New("subject of a CA is empty")
	case !slices.Equal(got.ExtKeyUsage, want.ExtKeyUsage):
		return errors.New("extended key usage is not as meant")
	}
	return sameConstraints(got, want)
}

// lintServing holds the rules of the server's own certificate.
func (t *tbs) lintServing(want *x509.Certificate) error {
	got, err := t.asCertificate()
	if err != nil {
		return err
	}
	switch {
	case got.IsCA || !t.holds(extBasicConstraints, true, derNotCA):
		return errors.New("basic constraints are not those of a leaf")
	case !t.holds(extKeyUsage, true, derDigitalSignature):
		return errors.New("key usage is not critical and digitalSignature alone")
	case !slices.Equal(got.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}):
		return errors.New("extended key usage is not serverAuth alone")
	case len(got.URIs)+len(got.EmailAddresses) > 0:
		return errors.New("a serving certificate has a URI or an e-mail address")
	case !slices.Equal(got.DNSNames, want.DNSNames) || len(got.IPAddresses) != len(want.IPAddresses):
		return errors.New("names are not those configured")
	}
	return nil
}

// sameConstraints compares the name constraints that two certificates carry.
func sameConstraints(got, want *x509.Certificate) error {
	if !slices.Equal(got.PermittedDNSDomains, want.PermittedDNSDomains) ||
		!slices.Equal(got.PermittedURIDomains, want.PermittedURIDomains) ||
		!sameRanges(got.PermittedIPRanges, want.PermittedIPRanges) ||
		!sameRanges(got.ExcludedIPRanges, want.ExcludedIPRanges) ||
		len(got.ExcludedDNSDomains)+len(got.ExcludedURIDomains)+len(got.ExcludedEmailAddresses)+len(got.PermittedEmailAddresses) > 0 ||
		got.PermittedDNSDomainsCritical != want.PermittedDNSDomainsCritical {
		return errors.New("name constraints are not as meant")
	}
	return nil
}
