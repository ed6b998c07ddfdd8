package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"castellan.dev/ca"
)

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}

func mustMarshal(v any) []byte {
	der, err := asn1.Marshal(v)
	if err != nil {
		panic(err)
	}
	return der
}

func ext(last int, value []byte) pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, last}, Value: value}
}

func generalName(tag int, value string) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(value)}
}

// accepted CSRs, by what real clients send.
func TestCSRAccepted(t *testing.T) {
	a := newEnv(t).Open()
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	rsa2048, _ := rsa.GenerateKey(rand.Reader, 2048)
	id := []*url.URL{mustURL(ordersID)}
	for name, csr := range map[string][]byte{
		"P-256, no names":         newCSR(t, nil, nil),
		"P-384":                   newCSR(t, nil, p384),
		"Ed25519":                 newCSR(t, nil, ed),
		"RSA 2048 of istio-agent": newCSR(t, &x509.CertificateRequest{URIs: id}, rsa2048),
		"the attested identity":   newCSR(t, &x509.CertificateRequest{URIs: id}, nil),
		"empty organization of an older istio-agent": newCSR(t, &x509.CertificateRequest{
			Subject: pkix.Name{Organization: []string{""}}, URIs: id}, nil),
		"empty common name":           newCSR(t, &x509.CertificateRequest{RawSubject: mustMarshal(pkix.RDNSequence{{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: ""}}})}, nil),
		"basic constraints of a leaf": newCSR(t, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{ext(19, []byte{0x30, 0})}}, nil),
		"explicitly no CA":            newCSR(t, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{ext(19, []byte{0x30, 3, 1, 1, 0})}}, nil),
		"usages":                      newCSR(t, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{ext(15, []byte{3, 2, 5, 0xa0}), ext(37, mustMarshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}}))}}, nil),
		"empty SAN":                   newCSR(t, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{ext(17, []byte{0x30, 0})}}, nil),
		"other PEM label":             bytes.ReplaceAll(newCSR(t, nil, nil), []byte("CERTIFICATE REQUEST"), []byte("NEW CERTIFICATE REQUEST")),
		"blank lines around":          append([]byte("\n\n"), append(newCSR(t, nil, nil), "\r\n\n"...)...),
		"DER":                         der(newCSR(t, nil, nil)),
	} {
		t.Run(name, func(t *testing.T) {
			r := request(t)
			r.CSR = csr
			_, leaf := issue(t, a, r)
			if len(leaf.URIs) != 1 || leaf.URIs[0].String() != ordersID || leaf.Subject.String() != "" || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
				t.Errorf("leaf took something from the CSR: %v %v", leaf.URIs, leaf.Subject)
			}
		})
	}
}

func der(p []byte) []byte {
	block, _ := pem.Decode(p)
	return block.Bytes
}

func TestCSRRefused(t *testing.T) {
	a := newEnv(t).Open()
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	p521, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	good := newCSR(t, nil, nil)
	with := func(template x509.CertificateRequest) []byte { return newCSR(t, &template, nil) }
	withExt := func(e ...pkix.Extension) []byte { return with(x509.CertificateRequest{ExtraExtensions: e}) }
	san := func(names ...asn1.RawValue) []byte { return withExt(ext(17, mustMarshal(names))) }
	uri := generalName(6, ordersID)
	forged := der(good)
	forged = bytes.Clone(forged)
	forged[len(forged)-1] ^= 1

	for name, c := range map[string]struct {
		csr         []byte
		field, want string
	}{
		"empty":                       {nil, "csr", "is empty"},
		"oversized":                   {bytes.Repeat([]byte("A"), 16<<10+1), "csr", "has 16385 bytes, at most 16384 are taken"},
		"neither PEM nor DER":         {[]byte("hello"), "csr", "is neither PEM nor DER"},
		"other PEM":                   {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der(good)}), "csr", "is not a CERTIFICATE REQUEST"},
		"cut PEM":                     {good[:len(good)-20], "csr", "one whole PEM block is wanted"},
		"two PEM blocks":              {append(bytes.Clone(good), good...), "csr", "one whole PEM block is wanted"},
		"text after PEM":              {append(bytes.Clone(good), "more"...), "csr", "has data after its PEM block"},
		"text before PEM":             {append([]byte("more\n"), good...), "csr", "is neither PEM nor DER"},
		"trailing DER":                {append(der(good), 0), "csr", "cannot be parsed"},
		"cut DER":                     {der(good)[:100], "csr", "cannot be parsed"},
		"a certificate":               {a.Bundle().Roots[0].Raw, "csr", "cannot be parsed"},
		"bad signature":               {forged, "csr.signature", "does not prove possession of the key"},
		"another's key":               {swappedKey(t), "csr.signature", "does not prove possession of the key"},
		"weak RSA":                    {weakRSA(t), "csr.key", "RSA of 1024 bits is not accepted"},
		"huge RSA":                    {rawCSR(t, &rsa.PublicKey{N: new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 9000), big.NewInt(1)), E: 65537}), "csr.key", "RSA of 9001 bits is not accepted"},
		"RSA exponent 3":              {rawCSR(t, &rsa.PublicKey{N: new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 2047), big.NewInt(1)), E: 3}), "csr.key", "RSA exponent 3 is not accepted"},
		"P-224":                       {newCSR(t, nil, p224), "csr.key", "curve P-224 is not accepted"},
		"P-521":                       {newCSR(t, nil, p521), "csr.key", "curve P-521 is not accepted"},
		"SHA-1":                       {sha1CSR(t), "csr.signature", "algorithm ECDSA-SHA1 is not accepted"},
		"common name":                 {with(x509.CertificateRequest{Subject: pkix.Name{CommonName: "orders"}}), "csr.subject", "must be empty"},
		"common name is the identity": {with(x509.CertificateRequest{Subject: pkix.Name{CommonName: ordersID}}), "csr.subject", "must be empty"},
		"organization":                {with(x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"", "x"}}}), "csr.subject", "must be empty"},
		"DNS name":                    {with(x509.CertificateRequest{DNSNames: []string{"orders"}}), "csr.san", "only a URI is accepted"},
		"IP address":                  {with(x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}}), "csr.san", "only a URI is accepted"},
		"e-mail":                      {with(x509.CertificateRequest{EmailAddresses: []string{"a@b"}}), "csr.san", "only a URI is accepted"},
		"DNS name beside identity":    {san(uri, generalName(2, "orders")), "csr.san", "only a URI is accepted"},
		"registered ID, which the standard library skips": {san(uri, generalName(8, "\x2a\x03")), "csr.san", "only a URI is accepted"},
		"foreign identity":             {with(x509.CertificateRequest{URIs: []*url.URL{mustURL("spiffe://cluster.local/ns/shop/sa/payments")}}), "csr.san", `URI differs from the attested identity: "spiffe://cluster.local/ns/shop/sa/payments"`},
		"foreign trust domain":         {with(x509.CertificateRequest{URIs: []*url.URL{mustURL("spiffe://other.example/ns/shop/sa/orders")}}), "csr.san", "URI differs"},
		"trailing slash":               {with(x509.CertificateRequest{URIs: []*url.URL{mustURL(ordersID + "/")}}), "csr.san", "URI differs"},
		"upper case":                   {san(generalName(6, strings.ToUpper(ordersID))), "csr.san", "URI differs"},
		"encoded":                      {san(generalName(6, "spiffe://cluster.local/ns/shop/sa/%6frders")), "csr.san", "URI differs"},
		"NUL":                          {san(generalName(6, ordersID+"\x00")), "csr", ""},
		"spiffe-06 the same URI twice": {san(uri, uri), "csr.san", "more than one URI"},
		"SAN twice":                    {withExt(ext(17, mustMarshal([]asn1.RawValue{uri})), ext(17, mustMarshal([]asn1.RawValue{uri}))), "csr", ""},
		"broken SAN":                   {withExt(ext(17, []byte{0x30, 5, 1})), "csr", ""},
		"asks for a CA":                {withExt(ext(19, []byte{0x30, 3, 1, 1, 0xff})), "csr.basicConstraints", "asks for a CA"},
		"asks for a path length":       {withExt(ext(19, []byte{0x30, 3, 2, 1, 0})), "csr.basicConstraints", "asks for a CA"},
		"asks for keyCertSign":         {withExt(ext(15, []byte{3, 2, 2, 4})), "csr.keyUsage", "asks to sign certificates or CRLs"},
		"asks for cRLSign":             {withExt(ext(15, []byte{3, 2, 1, 2})), "csr.keyUsage", "asks to sign certificates or CRLs"},
		"broken key usage":             {withExt(ext(15, []byte{4, 0})), "csr.keyUsage", "cannot be parsed"},
		"asks for codeSigning":         {withExt(ext(37, mustMarshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 3}}))), "csr.extKeyUsage", "1.3.6.1.5.5.7.3.3 is not accepted"},
		"asks for any usage":           {withExt(ext(37, mustMarshal([]asn1.ObjectIdentifier{{2, 5, 29, 37, 0}}))), "csr.extKeyUsage", "is not accepted"},
		"name constraints":             {withExt(ext(30, []byte{0x30, 0})), "csr.extensions", "extension 2.5.29.30 is not accepted"},
		"unknown extension":            {withExt(pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}}), "csr.extensions", "extension 1.2.3 is not accepted"},
		"challenge password":           {attributeCSR(t, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}), "csr.attributes", "attribute 1.2.840.113549.1.9.7 is not accepted"},
		"version 2":                    {versionCSR(t), "csr.version", "1, want 0 (v1)"},
	} {
		t.Run("trust rule 1 "+name, func(t *testing.T) {
			r := request(t)
			r.CSR = c.csr
			issued, err := a.Issuer().Issue(t.Context(), r)
			var refused *ca.RequestError
			if issued != nil || !errors.As(err, &refused) {
				t.Fatalf("issued %v, error %v", issued != nil, err)
			}
			if !strings.HasPrefix(refused.Field, c.field) || !strings.Contains(refused.Reason, c.want) {
				t.Errorf("error %q; want field %s, reason %q", err, c.field, c.want)
			}
		})
	}
}

// rawParts is PKCS #10 made by hand, for what the standard library will not make.
type rawParts struct {
	Version    int
	Subject    asn1.RawValue
	PublicKey  asn1.RawValue
	Attributes []asn1.RawValue `asn1:"tag:0,set"`
}

var emptySequence = asn1.RawValue{FullBytes: []byte{0x30, 0}}

func assemble(t *testing.T, parts rawParts, public crypto.PublicKey, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	if public == nil {
		public = key.Public()
	}
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	parts.Subject, parts.PublicKey = emptySequence, asn1.RawValue{FullBytes: spki}
	info := mustMarshal(parts)
	digest := crypto.SHA256.New()
	digest.Write(info)
	signature, err := key.Sign(rand.Reader, digest.Sum(nil), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return mustMarshal(struct {
		Info      asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		asn1.RawValue{FullBytes: info}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}},
		asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)},
	})
}

func swappedKey(t *testing.T) []byte { return assemble(t, rawParts{}, newKey(t).Public(), newKey(t)) }

func rawCSR(t *testing.T, public crypto.PublicKey) []byte {
	return assemble(t, rawParts{}, public, newKey(t))
}

func weakRSA(t *testing.T) []byte {
	n := new(big.Int).Lsh(big.NewInt(1), 1023)
	return rawCSR(t, &rsa.PublicKey{N: n.Add(n, big.NewInt(1)), E: 65537})
}

func versionCSR(t *testing.T) []byte { return assemble(t, rawParts{Version: 1}, nil, newKey(t)) }

func attributeCSR(t *testing.T, oid asn1.ObjectIdentifier) []byte {
	attribute := mustMarshal(struct {
		ID     asn1.ObjectIdentifier
		Values []string `asn1:"set"`
	}{oid, []string{"x"}})
	return assemble(t, rawParts{Attributes: []asn1.RawValue{{FullBytes: attribute}}}, nil, newKey(t))
}

func sha1CSR(t *testing.T) []byte {
	raw := assemble(t, rawParts{}, nil, newKey(t))
	// ecdsa-with-SHA256 (…4.3.2) to ecdsa-with-SHA1 (…4.1): same length with a NULL less.
	from := mustMarshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2})
	var parts struct {
		Info      asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(raw, &parts); err != nil || !bytes.Contains(raw, from) {
		t.Fatal(err)
	}
	parts.Algorithm.Algorithm = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}
	return mustMarshal(parts)
}

// FuzzCSR: whatever comes in, the answer is a refusal or a leaf of the attested
// identity, never a panic or another error.
func FuzzCSR(f *testing.F) {
	key := newKey(f)
	seed := newCSR(f, nil, key)
	f.Add(seed)
	f.Add(der(seed))
	f.Add(der(newCSR(f, &x509.CertificateRequest{URIs: []*url.URL{mustURL(ordersID)}, DNSNames: []string{"a"}}, key)))
	f.Add(der(newCSR(f, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}, ExtraExtensions: []pkix.Extension{ext(15, []byte{3, 2, 5, 0xa0})}}, key)))
	a := plainAuthority(f)
	w := workload(f, ordersID)
	f.Fuzz(func(t *testing.T, csr []byte) {
		issued, err := a.Issuer().Issue(t.Context(), ca.Request{CSR: csr, Workload: w, TTL: time.Minute})
		if err != nil {
			var refused *ca.RequestError
			if !errors.As(err, &refused) || issued != nil {
				t.Fatalf("not a refusal: %v", err)
			}
			return
		}
		leaf := parse(t, issued.Chain[0])
		if fmt.Sprint(leaf.URIs) != "["+ordersID+"]" || len(leaf.DNSNames)+len(leaf.IPAddresses) > 0 || leaf.IsCA || leaf.Subject.String() != "" {
			t.Fatalf("leaf is %+v", leaf)
		}
	})
}
